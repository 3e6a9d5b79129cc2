"""What a runtime offers: an engine opens slots, a slot runs one batch at a time.

A slot owns the memory that a batch is written into (pinned, where there is a GPU) and belongs to
one thread: the thread that opened it fills `pixels`, calls `infer`, and closes it. Of an engine on the
CPU, another thread may do the first two while that one waits. Several slots of one engine may
run at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.manifest import Manifest
from runtime.signatures import ANYONE, Trust

BRIEF_S: Final = 750e-6
"""An engine is brief if it takes at most so long for its smallest batch, seconds."""


@dataclass(frozen=True)
class Options:
    """How an engine uses this machine; None leaves the choice to the runtime.

    Attributes:
        slots: batches that may run at once.
        threads: CPU threads for all slots together; only CPU runtimes use it.
        batch: the most images that a slot is given at once.
        pinning: bind each CPU thread to a core; only CPU runtimes use it.
        cuda: the CUDA interface of GPU runtimes.
        cuda_graphs: capture a CUDA graph for each batch size, where the CUDA interface can.
        host_code: let a plan run code of its own on the CPU (version-compatible TensorRT plans do);
            only for plans from a trusted place.
        share: so many processes run the engine at once, each with its share of the slots and threads; only
            CPU runtimes use it.
        trust: whose packages are loaded.
    """

    slots: int | None = None
    threads: int | None = None
    batch: int | None = None
    pinning: bool = False
    cuda: Literal["cuda-bindings", "pycuda"] | None = None
    cuda_graphs: bool = True
    host_code: bool = False
    share: int = 1
    trust: Trust = ANYONE


@dataclass(frozen=True)
class Outputs:
    """What one batch gave; the arrays are overwritten by the slot's next `infer`.

    Attributes:
        logits: `float32` of shape `(count, classes)`.
        probabilities: their softmax or sigmoid, as the manifest says, same shape and dtype.
        timings_ms: device stages by name, milliseconds (empty where there is no device to ask).
    """

    logits: NDArray[np.float32]
    probabilities: NDArray[np.float32]
    timings_ms: Mapping[str, float] = field(default_factory=dict)


class Slot(Protocol):
    """One batch at a time, on one thread."""

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """`uint8` NHWC of shape `(batch.max, height, width, 3)`, to be filled before `infer`."""

    def infer(self, count: int, *, alone: bool = False) -> Outputs:
        """Run the first `count` images of `pixels`.

        Args:
            count: images in the batch.
            alone: no other slot has work, so this one may use the whole machine.

        Raises:
            ValueError: `count` is outside the engine's batch sizes.
            EngineError: the backend failed.
        """

    def close(self) -> None:
        """Free what the slot holds."""


class Engine(Protocol):
    """A loaded engine package."""

    @property
    def manifest(self) -> Manifest:
        """What the package says of itself."""

    @property
    def slots(self) -> int:
        """How many slots keep this machine busy."""

    @property
    def best_batch(self) -> int:
        """Images beyond which a larger batch gains nothing."""

    @property
    def run_sizes(self) -> Sequence[int]:
        """Sizes of batches that are computed as they are, ascending; others take several, or are padded."""

    @property
    def on_cpu(self) -> bool:
        """Whether inference takes the cores that decoding needs too."""

    @property
    def alone_s(self) -> float:
        """Seconds that the smallest batch takes in a slot; infinite on a device, or before one is open."""

    def open_slot(self) -> Slot:
        """A slot for the calling thread. It is warm: it has run a batch of each of `run_sizes`.

        Raises:
            EngineError: no memory for it, refused by the backend, or its first batches failed.
        """

    def close(self) -> None:
        """Free the engine; all slots must be closed."""
