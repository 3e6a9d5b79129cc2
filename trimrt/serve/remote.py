"""In a worker: an engine that another process runs, for all workers; see `trimrt.serve.owner`."""

from __future__ import annotations

import math
import os
import socket
import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.engine import Outputs
from runtime.health import EngineAwayError
from runtime.manifest import EngineError, Manifest
from trimrt.serve.shared_slot import AWAY, COUNT_BYTES, MOST_BYTES, Answer, SlotMemory, key_of


class Link:
    """This process's way to the owner of the engines, whoever that is at the time. Safe on any thread."""

    def __init__(self) -> None:
        self._end: socket.socket | None = None
        self._lock = threading.Lock()

    def renew(self, end: socket.socket | None) -> None:
        """Reach the owner over `end` from now on; None: there is none."""
        with self._lock:
            if self._end is not None:
                self._end.close()
            self._end = end

    def hand(self, key: bytes, descriptors: Sequence[int]) -> None:
        """Hand the owner a new slot of the engine `key`: the other end of the slot's socket, and its memory.

        Raises:
            EngineAwayError: there is no owner.
        """
        with self._lock:
            if self._end is None:
                raise EngineAwayError(AWAY)
            try:
                socket.send_fds(self._end, [key], descriptors)
            except OSError:
                raise EngineAwayError(AWAY) from None


class RemoteEngine:
    """An engine whose slots are run by the owner, which forms its batches of the images of all workers.

    Args:
        manifest: of the engine, which the owner has loaded.
        link: to the owner.
        slots: how many a worker has: threads that decode, or wait.
        most: images that a slot takes at once: so many are decoded before the first of them is computed.
    """

    def __init__(self, manifest: Manifest, link: Link, *, slots: int, most: int) -> None:
        self._key = key_of(manifest)
        # The owner fills batches up to the least size.
        self._manifest = manifest.model_copy(update={"batch": manifest.batch.model_copy(update={"min": 1})})
        self._link = link
        self._slots = slots
        self._most = most

    @property
    def manifest(self) -> Manifest:
        """What the package says of itself, but for the least batch: there is none."""
        return self._manifest

    @property
    def slots(self) -> int:
        """Threads that decode, or wait for the owner."""
        return self._slots

    @property
    def best_batch(self) -> int:
        """Few: the owner makes larger batches of what all slots have."""
        return min(self._most, self._manifest.batch.max)

    @property
    def run_sizes(self) -> Sequence[int]:
        """All."""
        return range(1, self.best_batch + 1)

    @property
    def on_cpu(self) -> bool:
        """True: what this process computes with is its cores, and its slots' threads decode."""
        return True

    @property
    def alone_s(self) -> float:
        """Infinite: the event loop must not wait for another process."""
        return math.inf

    def open_slot(self) -> RemoteSlot:
        """A slot for the calling thread; the owner's are warm.

        Raises:
            EngineError: the owner is gone, or has no such engine.
        """
        return RemoteSlot(self._manifest, self._key, self._link)

    def close(self) -> None:
        """Nothing to do: the owner closes the engine."""


class RemoteSlot:
    """Memory that the owner reads pixels from and writes outputs to.

    Raises:
        EngineError: no memory; or the owner is gone, or has no such engine.
    """

    def __init__(self, manifest: Manifest, key: bytes, link: Link) -> None:
        self._key = key
        self._link = link
        self._memory = SlotMemory(manifest)
        self._end: socket.socket | None = None
        try:
            self._connect()
        except EngineError:
            self.close()
            raise

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """See `runtime.engine.Slot`."""
        return self._memory.pixels

    def infer(self, count: int, *, alone: bool = False) -> Outputs:
        """See `runtime.engine.Slot`; the owner knows whether it is `alone`.

        Raises:
            EngineAwayError: the owner has ended; the next call tries the one in its place.
            DeviceLostError: the owner has lost its GPU.
            EngineError: the engine failed.
        """
        if not 1 <= count <= len(self.pixels):
            raise ValueError(f"batch of {count} is outside 1..{len(self.pixels)}")
        message = count.to_bytes(COUNT_BYTES, "little")
        if self._end is None or not self._send(message):  # it ended while this slot was idle
            self._connect()
            self._send(message)
        timings = self._receive().timings_ms
        return Outputs(self._memory.logits[:count], self._memory.probabilities[:count], timings)

    def close(self) -> None:
        """Let the owner forget the slot."""
        if self._end is not None:
            self._end.close()
        os.close(self._memory.descriptor)

    def _connect(self) -> None:
        if self._end is not None:
            self._end.close()
        self._end, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its_end:
            self._link.hand(self._key, [its_end.fileno(), self._memory.descriptor])
        self._receive()

    def _send(self, message: bytes) -> bool:
        assert self._end is not None
        try:
            return self._end.send(message) > 0
        except OSError:
            return False

    def _receive(self) -> Answer:
        assert self._end is not None
        try:
            data = self._end.recv(MOST_BYTES)
        except OSError:
            data = b""
        if not data:
            raise EngineAwayError(AWAY)
        answer = Answer.of_bytes(data)
        if answer.failure:
            raise answer.kind(answer.failure)
        return answer
