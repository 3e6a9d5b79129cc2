"""What TensorRT learned about kernel speeds, kept so that the next build is quick.

A cache is valid for one TensorRT version on one GPU model, so there is one file for each pair. It
makes builds fast, not repeatable.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tensorrt as trt


def timing_cache_path(folder: Path, version: str, gpu_name: str, compute_capability: str) -> Path:
    """Where the cache of a TensorRT version on a GPU model is kept."""
    gpu = re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-")
    return folder / f"{gpu}-sm{compute_capability.replace('.', '')}-tensorrt-{version}.timing"


def attach_timing_cache(config: trt.IBuilderConfig, path: Path) -> trt.ITimingCache:
    """Give a builder configuration the cache in `path`, or an empty one; keep it until the build ends.

    A cache of another version or GPU is not used: TensorRT could then pick wrong or slow kernels.
    """
    stored = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(stored)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def save_timing_cache(config: trt.IBuilderConfig, path: Path) -> None:
    """Store what a build has learned, over what was there; readers never see half a file."""
    data = bytes(config.get_timing_cache().serialize())
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
