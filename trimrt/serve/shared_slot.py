"""A slot that one process fills and another runs: the memory that both map, and what they say to each other.

Each slot of a worker has a pair of sockets to the process that owns the engine. Over it go the number of
images to run and, when they have, an `Answer`; pixels and outputs stay where they are. Sockets tell when the
process at the other end has ended, so nobody waits for it.
"""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Final

import numpy as np

from runtime.manifest import EngineError, Manifest, read_manifest
from server.settings import Settings

AWAY: Final = "the process that runs the engine has ended; another takes its place"

KEY_BYTES: Final = 32
COUNT_BYTES: Final = 4
MOST_BYTES: Final = 64 << 10  # of an answer
_ALIGNMENT: Final = 64  # of arrays, as vector instructions want it


def is_shared(folder: Path, settings: Settings) -> bool:
    """Whether one process runs the engine in `folder` for all workers; False where there is none."""
    try:
        return settings.share_engines or read_manifest(folder, settings.trust).backend != "openvino"
    except EngineError:
        return False


def key_of(manifest: Manifest) -> bytes:
    """What two processes call an engine that both have read the package of; `KEY_BYTES` long."""
    return sha256(manifest.model_dump_json().encode()).digest()


@dataclass(frozen=True)
class Answer:
    """What became of a slot's images.

    Attributes:
        failure: why they have no outputs; empty if they have.
        kind: of the failure, as the worker raises it.
        timings_ms: see `runtime.engine.Outputs`.
    """

    failure: str = ""
    kind: type[EngineError] = EngineError
    timings_ms: Mapping[str, float] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """As it is sent: one message."""
        return pickle.dumps((self.failure[: MOST_BYTES // 8], self.kind, dict(self.timings_ms)))

    @classmethod
    def of_bytes(cls, data: bytes) -> Answer:
        """What was sent."""
        return cls(*pickle.loads(data))


class SlotMemory:
    """The pixels and outputs of a slot.

    It has no name, so nothing can be left behind: it is freed with the last of the two processes.

    Args:
        manifest: of the engine.
        descriptor: of the memory that another process made; None: new memory.

    Attributes:
        descriptor: for the other process; the caller closes it.
        pixels: `uint8` of shape `(batch.max, height, width, 3)`.
        logits: `float32` of shape `(batch.max, classes)`.
        probabilities: same shape and dtype.

    Raises:
        EngineError: there is no memory, or it is not that of such an engine.
    """

    def __init__(self, manifest: Manifest, descriptor: int | None = None) -> None:
        pixels = (manifest.batch.max, *manifest.input.shape[1:])
        outputs = (manifest.batch.max, len(manifest.labels))
        logits_at = _aligned(int(np.prod(pixels)))
        probabilities_at = logits_at + _aligned(4 * int(np.prod(outputs)))
        size = probabilities_at + 4 * int(np.prod(outputs))
        try:
            if descriptor is None:
                descriptor = os.memfd_create("trimrt-slot")
                os.ftruncate(descriptor, size)  # rows that are never used take no memory
            memory = mmap.mmap(descriptor, size)
        except (OSError, ValueError) as error:
            raise EngineError(f"no memory for a slot of {manifest.name}: {error}") from error
        self.descriptor = descriptor
        self.pixels = np.ndarray(pixels, np.uint8, memory)
        self.logits = np.ndarray(outputs, np.float32, memory, logits_at)
        self.probabilities = np.ndarray(outputs, np.float32, memory, probabilities_at)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
