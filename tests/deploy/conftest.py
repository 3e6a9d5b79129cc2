from serving import encode, engine_dir, server  # noqa: F401
