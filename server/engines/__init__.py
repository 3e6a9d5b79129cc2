"""Engine runtimes: one module a backend, imported only when an engine of that kind is loaded."""
