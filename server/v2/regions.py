"""Triton's extension for system shared memory: tensors that programs on this machine put down, not send.

Nothing is mapped: a client could shrink what is mapped, and its next reader would be killed by a signal. What
is read is copied out at once, so that it cannot change while it is used, and a region is opened for writing
only when an output is to go there. A region goes with its object: once the client has removed that from
/dev/shm, the region is unregistered. What clients leave behind that were killed gives way to new regions.
"""

from __future__ import annotations

import asyncio
import os
import re
import stat
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from server.auth import Caller, is_local
from server.problems import Problem

_FOLDER: Final = "/dev/shm"
_KEY: Final = re.compile(r"/?(?!sem\.)[^/\0]{1,200}")  # what begins with sem. is a semaphore
_MOST_REGIONS: Final = 256
_LONGEST_NAME: Final = 200  # characters
_UNUSED_S: Final = 60.0  # a region that was not used for so long may give way to a new one
_LOOK_S: Final = 5.0  # how often to look whether clients have removed their objects


class Placement(NamedTuple):
    """Where a tensor lies: the region's name, and offset and size in bytes."""

    region: str
    offset: int
    size: int


@dataclass
class Region:
    """A registered region.

    Attributes:
        key: name of the object in /dev/shm.
        offset: where in the object the region begins, bytes.
        size: its bytes.
        reading: the object, open for reading.
        writing: the object, open for writing, once an output was to go there.
        used: when it was registered or used last, by `time.monotonic`.
    """

    key: str
    offset: int
    size: int
    reading: int
    writing: int | None = None
    used: float = field(default_factory=time.monotonic)

    def close(self) -> None:
        """Close the object."""
        for descriptor in (self.reading, self.writing):
            if descriptor is not None:
                os.close(descriptor)


class Regions:
    """The regions that clients have registered; safe to use from any thread, but for `register`.

    Args:
        enabled: whether there may be any.
        largest: the most bytes that a request may read.
    """

    def __init__(self, *, enabled: bool, largest: int) -> None:
        self.enabled = enabled and sys.platform == "linux"
        self._largest = largest
        self._regions: dict[str, Region] = {}
        self._lock = threading.Lock()
        self._timer: asyncio.TimerHandle | None = None

    def check(self, caller: Caller) -> None:
        """Let a program on this machine pass, if there is shared memory.

        Raises:
            Problem: `not-supported` or `forbidden`.
        """
        if not self.enabled:
            raise Problem(
                "not-supported", "shared memory is off; --client-shared-memory turns it on, on Linux"
            )
        if not is_local(caller):
            raise Problem(
                "forbidden", "shared memory is for programs on this machine, over loopback or a Unix socket"
            )

    def register(self, name: str, key: str, offset: int, size: int) -> None:
        """Open an object in /dev/shm, of which `size` bytes from `offset` become the region `name`.

        Raises:
            Problem: `invalid-parameter`: the name is taken, or there is no such object, or it is too small,
                or it may not be read; `queue-full`: there are too many regions.
        """
        self._forget_removed()
        if not 0 < len(name) <= _LONGEST_NAME:
            raise Problem("invalid-parameter", f"a region's name has 1 to {_LONGEST_NAME} characters")
        if name in self._regions:
            raise Problem("invalid-parameter", f"region {name!r} is registered already; unregister it first")
        if len(self._regions) == _MOST_REGIONS and not self._forget_unused():
            raise Problem("queue-full", f"there are {_MOST_REGIONS} regions; unregister what is not used")
        region = Region(key, offset, size, _open(key))
        try:
            _check_extent(region)
        except Problem:
            region.close()
            raise
        with self._lock:
            self._regions[name] = region
        if self._timer is None:
            self._look_later()

    def unregister(self, name: str = "") -> None:
        """Forget the region `name`, if it is there; all, if `name` is empty."""
        with self._lock:
            for gone in [name] if name else list(self._regions):
                if (region := self._regions.pop(gone, None)) is not None:
                    region.close()

    def status(self, name: str = "") -> dict[str, dict[str, Any]]:
        """The region `name`, or all if that is empty, as the protocol describes them.

        Raises:
            Problem: `not-found`.
        """
        self._forget_removed()
        with self._lock:
            regions = {name: self._find(name)} if name else self._regions
            return {
                each: {"name": each, "key": it.key, "offset": it.offset, "byte_size": it.size}
                for each, it in regions.items()
            }

    def read(self, place: Placement, read_before: int = 0) -> bytes:
        """A copy of what lies there, for a request that has read so many bytes before.

        Raises:
            Problem: `not-found`, `invalid-parameter` or `body-too-large`.
        """
        if read_before + place.size > self._largest:
            raise Problem(
                "body-too-large", f"what a request has in shared memory has at most {self._largest:,} bytes"
            )
        with self._lock:
            region = self._within(place)
            data = os.pread(region.reading, place.size, region.offset + place.offset)
        if len(data) < place.size:
            raise _shrunk(place.region)
        return data

    def write(self, place: Placement, data: bytes) -> None:
        """Copy `data` to that place.

        Raises:
            Problem: `not-found`, or `invalid-parameter`: there is no room, or it may not be written.
        """
        if len(data) > place.size:
            raise Problem(
                "invalid-parameter",
                f"the output has {len(data):,} bytes; its place in {place.region!r} has {place.size:,}",
            )
        with self._lock:
            region = self._within(place)
            _check_extent(region)  # what is written beyond its end would make it grow
            try:
                if region.writing is None:
                    region.writing = os.open(f"/proc/self/fd/{region.reading}", os.O_WRONLY | os.O_CLOEXEC)
                written = os.pwrite(region.writing, data, region.offset + place.offset)
            except OSError as error:
                detail = f"region {place.region!r} cannot be written: {error.strerror}"
                raise Problem("invalid-parameter", detail) from None
        if written < len(data):
            raise Problem("invalid-parameter", f"the memory of region {place.region!r} is full")

    def close(self) -> None:
        """Forget all."""
        if self._timer is not None:
            self._timer.cancel()
        self.unregister()

    def _find(self, name: str) -> Region:
        region = self._regions.get(name)
        if region is None:
            raise Problem("not-found", f"no region {name[:_LONGEST_NAME]!r} is registered")
        return region

    def _within(self, place: Placement) -> Region:
        region = self._find(place.region)
        if place.offset < 0 or place.size < 0 or place.offset + place.size > region.size:
            raise Problem(
                "invalid-parameter",
                f"{place.size} bytes at {place.offset} are not in region {place.region!r} of {region.size}",
            )
        region.used = time.monotonic()
        return region

    def _look_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_LOOK_S, self._look)

    def _look(self) -> None:
        self._timer = None
        self._forget_removed()
        if self._regions:
            self._look_later()

    def _forget_removed(self) -> None:
        for name, region in list(self._regions.items()):
            if not os.fstat(region.reading).st_nlink:
                self.unregister(name)

    def _forget_unused(self) -> bool:
        """Forget the region that was not used for longest, if that is long enough."""
        name, region = min(self._regions.items(), key=lambda item: item[1].used)
        if time.monotonic() < region.used + _UNUSED_S:
            return False
        self.unregister(name)
        return True


def _open(key: str) -> int:
    """The object `key`, open for reading.

    Raises:
        Problem: `invalid-parameter`.
    """
    if not _KEY.fullmatch(key) or key.lstrip("/") in (".", ".."):
        raise Problem("invalid-parameter", f"{key[:200]!r} is no name of a shared memory object")
    # What is no object may be waited for, like a pipe, or lead elsewhere, like a link.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(f"{_FOLDER}/{key.lstrip('/')}", flags)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise Problem("invalid-parameter", f"shared memory object {key!r}: {reason}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise Problem("invalid-parameter", f"{key!r} is no shared memory object")
    return descriptor


def _check_extent(region: Region) -> None:
    size = os.fstat(region.reading).st_size
    if region.offset < 0 or region.size < 1 or region.offset + region.size > size:
        raise Problem(
            "invalid-parameter",
            f"{region.size} bytes at {region.offset} are not in object {region.key!r} of {size}",
        )


def _shrunk(name: str) -> Problem:
    return Problem("invalid-parameter", f"the object of region {name!r} has become smaller")
