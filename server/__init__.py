"""What is run: engine runtimes, batching, HTTP and metrics. Never needs torch."""
