from serving import engine_dir  # noqa: F401
