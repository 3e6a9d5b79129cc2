"""OpenVINO runtime: an engine package's `engine.blob` on this machine's CPU."""

from __future__ import annotations

import math
import mmap
import os
import platform
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.cores import cores
from runtime.absent import absent
from runtime.engine import BRIEF_S, Options, Outputs
from runtime.finite import check_finite
from runtime.manifest import Compatibility, EngineError, Manifest, read_artefact
from runtime.processor import WIDE_SUMS, processor

with absent("openvino.tools.ovc"):  # which converts models, and takes twice as long to import as all the rest
    import openvino

# By default the CPU plugin computes FP32 graphs in BF16 where the processor supports it.
CONFIGURATION: Final[dict[str, Any]] = {"INFERENCE_PRECISION_HINT": "f32"}

# A loaded model prepares its kernels again whenever the batch size changes. That takes longer than a small
# network's inference, and a tenth of a large one's. So each slot loads models for a few sizes, and runs a
# batch of 7 as 4 + 2 + 1. A small network has a model for each size. Every model has its own copy of the
# weights, so in a large network sizes that seldom follow each other share a model.
_SMALL_NETWORK: Final = ((1,), (2,), (4,), (8,), (16,), (32,))
_LARGE_NETWORK: Final = ((1, 2, 4), (8,))
_BEST_BATCH: Final = 8  # roughly where throughput stops growing
_MOST_SLOTS: Final = 8  # by default: each slot loads its own models; with more cores each slot gets several
_MEMORY_BYTES: Final = 150 << 20
_LOADED_FACTOR: Final = 2  # loaded size relative to blob size, roughly
_RUNS_TIMED: Final = 10


def this_machine() -> Compatibility:
    """What a blob built here is bound to."""
    name, features = processor()
    return Compatibility(
        os=platform.system(), cpu_architecture=platform.machine(), cpu_name=name, cpu_features=features
    )


def load(folder: Path, manifest: Manifest, options: Options) -> OpenVINOEngine:
    """Check that the package fits this machine, then import its blob.

    Raises:
        EngineError: built by another OpenVINO or for another processor, damaged, or refused by OpenVINO.
    """
    _check_machine(folder, manifest)
    return OpenVINOEngine(folder, manifest, options)


def _check_machine(folder: Path, manifest: Manifest) -> None:
    """Refuse a blob that was not made for this OpenVINO and this kind of processor."""
    built, here = manifest.compatibility, this_machine()
    missing = sorted(set(built.cpu_features) - set(here.cpu_features))
    if manifest.backend_version != openvino.get_version():
        difference = f"by OpenVINO {manifest.backend_version}; here is OpenVINO {openvino.get_version()}"
    elif (built.os, built.cpu_architecture) != (here.os, here.cpu_architecture):
        difference = (
            f"for {built.os} on {built.cpu_architecture}; this is {here.os} on {here.cpu_architecture}"
        )
    elif missing:
        difference = (
            f"for {built.cpu_name or 'a processor'} with {', '.join(missing)}, "
            f"which {here.cpu_name or 'this processor'} does not have"
        )
    elif _saturates(manifest, here):
        difference = (
            "with INT8 weights whose sums overflow here: "
            f"{here.cpu_name or 'this processor'} has no VNNI (or may not use it)"
        )
    else:
        return
    raise EngineError(f"{folder} was built {difference}. Rebuild it here: {manifest.build_command}")


def _saturates(manifest: Manifest, here: Compatibility) -> bool:
    """Whether this machine would add products of INT8 weights in 16 bits, where they need more."""
    return (
        manifest.precision in ("int8", "int8-dynamic")
        and not manifest.saturation_safe
        and here.cpu_architecture in ("x86_64", "AMD64")
        and not WIDE_SUMS.intersection(here.cpu_features)
    )


class OpenVINOEngine:
    """The package's blob, from which each slot loads its own models.

    A model of one stream and one thread is run by the thread that asks for it, where any other would
    hand over to a thread of OpenVINO's and back: with one slot a core, nothing is handed over.

    Raises:
        EngineError: damaged, or refused by OpenVINO.
    """

    def __init__(self, folder: Path, manifest: Manifest, options: Options) -> None:
        self._folder = folder
        self._manifest = manifest
        # Several processes would all bind their threads to the same first cores.
        self._pinning = options.pinning and options.share == 1
        self._threads = max(1, (options.threads or cores()) // options.share)
        self._slots = (
            max(1, options.slots // options.share) if options.slots else min(self._threads, _MOST_SLOTS)
        )
        # A rough estimate of the loaded size: loading a model to measure it takes a while.
        self._blob = _memory(read_artefact(folder, manifest))
        loaded = _LOADED_FACTOR * len(self._blob) * self._slots * len(_SMALL_NETWORK)
        self._models = _models(manifest, small=loaded <= _MEMORY_BYTES)
        largest = max(self.run_sizes)
        self._best_batch = options.batch or min(
            largest * max(1, round(_BEST_BATCH / largest)), manifest.batch.max
        )
        self._alone_seconds = math.inf
        # For a single image on an idle machine. With a thread for every core they are pinned: in a virtual
        # machine the scheduler mistakes idle cores for busy ones, and would wake all threads on one.
        self._wide = (
            self._load(self._threads, pinning=self._pinning or self._threads == os.cpu_count())
            if self._slots > 1 and manifest.batch.min == 1
            else None
        )

    @property
    def manifest(self) -> Manifest:
        """What the package says of itself."""
        return self._manifest

    @property
    def slots(self) -> int:
        """One for each thread, up to eight, unless the options say otherwise."""
        return self._slots

    @property
    def best_batch(self) -> int:
        """What was asked for, or about eight: whole runs of the largest size that has a model."""
        return self._best_batch

    @property
    def run_sizes(self) -> list[int]:
        """Those that have a model."""
        return [size for sizes in self._models for size in sizes]

    @property
    def on_cpu(self) -> bool:
        """True: decoding competes with inference for the cores."""
        return True

    @property
    def alone_s(self) -> float:
        """Of the fastest of the slots, with one slot's share of the threads."""
        return self._alone_seconds

    def open_slot(self) -> OpenVINOSlot:
        """A warm slot for the calling thread.

        Raises:
            EngineError: refused by OpenVINO, or its first batches failed.
        """
        # Off by default: every model would pin its first thread to core 0.
        threads = max(1, self._threads // self._slots)
        models: dict[int, openvino.CompiledModel] = {}
        for sizes in self._models:
            models |= dict.fromkeys(sizes, self._load(threads, pinning=self._pinning))
        slot = OpenVINOSlot(self._manifest, models, self._wide, self._blob)
        check_finite(slot.infer(self._manifest.batch.min, alone=True))
        for size in self.run_sizes:
            check_finite(slot.infer(size))
        self._alone_seconds = min(self._alone_seconds, _seconds(slot, self._manifest.batch.min))
        return slot

    def close(self) -> None:
        """Nothing to do: models are freed with the last reference to them."""

    def _load(self, threads: int, *, pinning: bool) -> openvino.CompiledModel:
        configuration = {
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": threads,
            "ENABLE_CPU_PINNING": pinning,
        }
        blob = _shared(np.frombuffer(self._blob, np.uint8))
        try:
            return openvino.Core().import_model(blob, "CPU", CONFIGURATION | configuration)
        except RuntimeError as error:
            kernels = re.findall(r"\bisa=(.+)", str(error))
            if len(kernels) == 2:
                reason = f"{self._folder} was built for {kernels[0]}; OpenVINO uses {kernels[1]} here"
            else:
                reason = f"OpenVINO {openvino.get_version()} cannot load {self._folder}: {error}"
            raise EngineError(f"{reason}. Rebuild it here: {self._manifest.build_command}") from error


def _models(manifest: Manifest, *, small: bool) -> list[tuple[int, ...]]:
    """The batch sizes of each model that a slot loads, ascending; runs of them make up any other size."""
    batch = manifest.batch
    if batch.min > 1:
        return [(batch.max,)]
    models = [
        tuple(size for size in sizes if size <= batch.max)
        for sizes in (_SMALL_NETWORK if small else _LARGE_NETWORK)
    ]
    return [sizes for sizes in models if sizes]


class OpenVINOSlot:
    """Inference requests over memory that OpenVINO reads and writes in place."""

    def __init__(
        self,
        manifest: Manifest,
        models: Mapping[int, openvino.CompiledModel],
        wide: openvino.CompiledModel | None,
        blob: mmap.mmap,
    ) -> None:
        self._batch = manifest.batch
        self._requests = {size: models[size].create_infer_request() for size in sorted(models, reverse=True)}
        self._wide = wide and wide.create_infer_request()
        self._pixels = np.zeros((manifest.batch.max, *manifest.input.shape[1:]), np.uint8)
        classes = len(manifest.labels)
        self._logits = np.zeros((manifest.batch.max, classes), np.float32)
        self._probabilities = np.zeros_like(self._logits)
        self._bound: dict[openvino.InferRequest, tuple[int, int]] = {}
        self._blob = blob  # which the models must not outlive

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """`uint8` NHWC of shape `(batch.max, height, width, 3)`, to be filled before `infer`."""
        return self._pixels

    def infer(self, count: int, *, alone: bool = False) -> Outputs:
        """Run the first `count` images of `pixels`.

        Raises:
            ValueError: `count` is outside the engine's batch sizes.
            EngineError: OpenVINO failed.
        """
        if not self._batch.min <= count <= self._batch.max:
            raise ValueError(f"batch of {count} is outside {self._batch.min}..{self._batch.max}")
        try:
            if alone and count == 1 and self._wide is not None:
                self._run(self._wide, 0, 1)
            elif self._batch.min > 1:
                (request,) = self._requests.values()
                self._run(request, 0, count)
            else:
                first = 0
                for size, request in self._requests.items():
                    while count - first >= size:
                        self._run(request, first, first + size)
                        first += size
        except RuntimeError as error:
            raise EngineError(f"OpenVINO failed on a batch of {count}: {error}") from error
        return Outputs(self._logits[:count], self._probabilities[:count])

    def _run(self, request: openvino.InferRequest, first: int, end: int) -> None:
        """Run images `first` to `end`, which the request may have been bound to by the last run."""
        if self._bound.get(request) != (first, end):
            request.set_input_tensor(0, _shared(self._pixels[first:end]))
            request.set_output_tensor(0, _shared(self._logits[first:end]))
            request.set_output_tensor(1, _shared(self._probabilities[first:end]))
            self._bound[request] = first, end
        request.infer()

    def close(self) -> None:
        """Free the models."""
        self._requests.clear()
        self._bound.clear()
        self._wide = None


def _seconds(slot: OpenVINOSlot, count: int) -> float:
    """The least time that a batch takes; a long one is timed once."""
    seconds = math.inf
    for _ in range(_RUNS_TIMED):
        began = time.perf_counter()
        slot.infer(count)
        seconds = min(seconds, time.perf_counter() - began)
        if seconds > 4 * BRIEF_S:
            break
    return seconds


def _memory(blob: bytes) -> mmap.mmap:
    """A copy that all models made of it share, and that must outlive them: they use its weights in place.

    A mapping is aligned as vector instructions want it. OpenVINO takes no read-only memory.
    """
    memory = mmap.mmap(-1, len(blob), access=mmap.ACCESS_COPY)
    memory.write(blob)
    return memory


def _shared(rows: NDArray[Any]) -> openvino.Tensor:
    return openvino.Tensor(rows, shared_memory=True)
