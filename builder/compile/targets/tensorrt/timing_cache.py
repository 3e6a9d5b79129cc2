"""What TensorRT learned about kernel speeds, kept so that the next build is quick.

A cache is valid for one TensorRT version on one GPU model, so there is one file for each pair. It
makes builds fast, not repeatable. Without it a build takes longer, so nothing about it ends one.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from models.files import replace_file, require_writable
from runtime.cuda import Device

if TYPE_CHECKING:
    import tensorrt as trt

_MEMORY_STEP: Final = 4 << 30  # sizes of one model differ by less, those of two models by more

logger = logging.getLogger("trimrt.tensorrt")


def timing_cache_folder() -> Path | None:
    """Where caches are kept: in `$XDG_CACHE_HOME`, or in `~/.cache`; None for a user who has no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimrt" / "timing"
    except RuntimeError:
        _warn("this user has no home folder")
        return None


def timing_cache_path(folder: Path, version: str, device: Device) -> Path:
    """Where the cache of a TensorRT version on a GPU model is kept.

    Multiprocessors and memory are part of the name: the GPU of every Jetson Orin is called `Orin`.
    """
    gpu = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    capability = device.compute_capability.replace(".", "")
    gibibytes = -(-device.memory // _MEMORY_STEP) * _MEMORY_STEP >> 30
    size = f"{device.multiprocessors}mp-{gibibytes}g"
    return folder / f"{gpu}-sm{capability}-{size}-tensorrt-{version}.timing"


def usable_timing_cache(path: Path) -> Path | None:
    """`path`, if a cache can be kept there; else None, and a warning before the build takes minutes."""
    try:
        require_writable(path.parent)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    except OSError as error:
        _warn(f"{error.filename}: {error.strerror}")
        return None
    return path


def _warn(reason: str) -> None:
    logger.warning(
        "the next build will take as long as this one, for no timing cache can be kept: %s "
        "(XDG_CACHE_HOME names another place)",
        reason,
    )


def attach_timing_cache(config: trt.IBuilderConfig, path: Path) -> trt.ITimingCache | None:
    """Give a builder configuration the cache in `path`, or an empty one; keep it until the build ends.

    A cache of another version or GPU is not used: TensorRT could then pick wrong or slow kernels. None, and
    a warning, where TensorRT makes none.
    """
    try:
        stored = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        logger.warning("%s is not used: %s", path, error.strerror)
        stored = b""
    cache = config.create_timing_cache(stored)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            logger.warning("building without the timing cache %s: TensorRT made none", path)
            return None
    return cache


def save_timing_cache(config: trt.IBuilderConfig, path: Path) -> None:
    """Store what a build has learned, over what was there; readers never see half a file.

    What cannot be stored is a warning: the engine is finished.
    """
    cache: trt.ITimingCache | None = config.get_timing_cache()
    learned: trt.IHostMemory | None = None if cache is None else cache.serialize()
    if learned is None:
        logger.warning("the timing cache %s was not kept: TensorRT did not give it", path)
        return
    try:
        with replace_file(path) as new:
            new.write_bytes(bytes(learned))
    except OSError as error:
        logger.warning("the timing cache %s was not kept: %s", path, error.strerror)
