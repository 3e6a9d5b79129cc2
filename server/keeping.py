"""A folder of hard cases for the next training: images that an engine was unsure of, and what it said.

Nothing of it happens on the event loop but the choice. The folder has an end: once it is full, nothing more
is kept, and nothing is removed. A file is whole or not there, whatever ends the server.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import orjson
from PIL import Image

from models.files import locked, replace_file
from models.images.formats import read_header
from models.preprocessing import Pixels
from runtime.manifest import Manifest
from server.jobs import Result
from server.telemetry import Ended

log = logging.getLogger("trimrt")

CASES: Final = "cases.jsonl"
_FOLDER: Final = "images"
_MOST_HELD: Final = 64 << 20  # bytes of images that wait to be written; beyond it they are passed over
_MOST_WAITING: Final = 1000  # images; what is said of each takes more than a small one
_LABELS: Final = 5
_LOOK_AGAIN_S: Final = 60.0  # how often to see whether a full folder has room again, or a disk is well again
_LONGEST_LINE: Final = 64 << 10  # bytes


class Keeper:
    """Writes hard cases, on a thread of its own; see `RequestObserver`.

    Args:
        folder: made if it is not there.
        below: an image is a hard case if its likeliest label is less probable than this.
        share: of the hard cases that is kept.
        most_bytes: of all images in the folder.

    Raises:
        OSError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, *, below: float, share: float, most_bytes: int) -> None:
        make_folder(folder)
        self._images = folder / _FOLDER
        self._cases = folder / CASES
        self._below = below
        self._share = share
        self._most = most_bytes
        self._used = self._measure()
        self._look_at = 0.0
        self._rest_until = 0.0  # after a failure
        self._held, self._waiting, self._lock = 0, 0, threading.Lock()
        self._writing = ThreadPoolExecutor(1, "trimrt-keep")

    def record(self, request: Ended) -> None:
        """Choose the hard cases among a request's images."""
        if request.manifest is None:
            return
        for image, result in zip(request.images, request.results, strict=False):
            if float(result.probabilities.max()) < self._below and random.random() < self._share:
                self._keep(request.manifest, image, result)

    def _keep(self, manifest: Manifest, image: bytes | Pixels, result: Result) -> None:
        size = len(image) if isinstance(image, bytes) else image.nbytes
        with self._lock:
            if self._held + size > _MOST_HELD or self._waiting == _MOST_WAITING:
                return
            self._held += size
            self._waiting += 1
        if not isinstance(image, bytes):
            image = image.copy()  # it may be a small part of a large body, all of which it would hold
        case = _described(manifest, result)
        self._writing.submit(self._write, image, case).add_done_callback(partial(self._release, size))

    def _release(self, size: int, _done: object) -> None:
        with self._lock:
            self._held -= size
            self._waiting -= 1

    def close(self) -> None:
        """Write what waits."""
        self._writing.shutdown()

    def _write(self, image: bytes | Pixels, case: dict[str, Any]) -> None:
        if time.monotonic() < self._rest_until:
            return
        try:
            data, suffix = _encoded(image)
            name = f"{hashlib.sha256(data).hexdigest()[:32]}.{suffix}"
            path = self._images / name
            if path.exists() or not self._has_room(len(data)):
                return
            with replace_file(path) as new, open(new, "wb", opener=_private) as file:
                file.write(data)
            try:
                _append(self._cases, orjson.dumps({"file": f"{_FOLDER}/{name}", **case}) + b"\n")
            except OSError:
                path.unlink(missing_ok=True)  # lest it be taken for one that is described
                raise
            self._used += len(data)
        except OSError as error:
            self._rest_until = time.monotonic() + _LOOK_AGAIN_S
            log.warning("a hard case could not be kept: %s; the next try is in %g s", error, _LOOK_AGAIN_S)
        except Exception:
            log.exception("a hard case could not be kept")

    def _has_room(self, size: int) -> bool:
        if self._used + size <= self._most:
            return True
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + _LOOK_AGAIN_S
            self._used = self._measure()
            if self._used + size > self._most:
                log.warning("the folder of hard cases is full", extra={"folder": str(self._images.parent)})
        return self._used + size <= self._most

    def _measure(self) -> int:
        used = 0
        for entry in os.scandir(self._images):
            with suppress(FileNotFoundError):  # who trains has taken it, or another worker has finished it
                used += entry.stat().st_size
        return used


def _described(manifest: Manifest, result: Result) -> dict[str, Any]:
    probability = result.probabilities.item
    order: Sequence[int] = (-result.logits).argsort(kind="stable")[:_LABELS].tolist()
    return {
        "time": round(time.time(), 3),
        "engine": manifest.name,
        "version": manifest.version,
        "predictions": [
            {
                "label": manifest.labels[index],
                "index": index,
                "probability": probability(index),
            }
            for index in order
        ],
    }


def _encoded(image: bytes | Pixels) -> tuple[bytes, str]:
    """An image file, and its suffix; pixels become a PNG."""
    if isinstance(image, bytes):
        return image, read_header(image).format.lower()
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue(), "png"


def make_folder(folder: Path) -> None:
    """Make what is needed of the folder, and end its list of cases with a whole line.

    Raises:
        OSError: it cannot be made or written.
    """
    (folder / _FOLDER).mkdir(parents=True, exist_ok=True, mode=0o700)
    cases = folder / CASES
    with locked(cases), open(cases, "a+b", opener=_private) as file:
        size = file.seek(0, os.SEEK_END)
        start = file.seek(max(0, size - _LONGEST_LINE))
        last = file.read()
        if last and not last.endswith(b"\n"):  # the server was killed as it wrote, or the disk was full
            file.truncate(start + last.rfind(b"\n") + 1)


def _append(path: Path, line: bytes) -> None:
    with locked(path), open(path, "ab", buffering=0, opener=_private) as file:
        end = file.seek(0, os.SEEK_END)
        if file.write(line) < len(line):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _private(path: str, flags: int) -> int:
    """Open a file which the server's user alone may read, if it is made."""
    return os.open(path, flags, 0o600)
