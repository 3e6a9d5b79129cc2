from ray_cluster import cluster  # noqa: F401
from serving import encode, engine_dir, reference, server  # noqa: F401
