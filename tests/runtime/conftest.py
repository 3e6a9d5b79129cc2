from serving import encode, engine_dir, reference  # noqa: F401
