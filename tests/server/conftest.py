from serving import encode, engine_dir, reference, server  # noqa: F401
