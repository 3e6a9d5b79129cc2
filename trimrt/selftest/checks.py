"""The checks: each returns what it found, in a few words, or raises."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from builder.compile.packages import build_package, package_name
from builder.compile.targets.choice import open_target
from builder.compile.verification import Gate, compare
from builder.kit import Kit, VerificationSet
from models.errors import TrimRTError
from runtime.cuda import attached, open_cuda
from runtime.engine import Engine, Options, Slot
from runtime.jetson import available_memory
from runtime.loading import load_engine
from runtime.manifest import Backend, BatchSizes, Precision, read_manifest
from runtime.threads import EngineThread
from runtime.timing import TimedSlots

KIT: Final = Path(__file__).parent / "kit"
BATCH: Final = BatchSizes(min=1, opt=8, max=32)
TIMED: Final = (1, 8, 32)

_MIB: Final = 1 << 20
_SLOTS: Final = 3
_ROUNDS: Final = 60  # batches that a slot runs
_TIMED_SECONDS: Final = 0.3
_MOST_WRONG: Final = 0.02  # share of labels that rounding may change
# What a soak may add: allocators settle, and memory that GPU and CPU share has other users.
_PROCESS, _DEVICE, _SHARED = "the process", "the device's use", "what is in use of the shared memory"
_GROWTH: Final = {_PROCESS: 32 * _MIB, _DEVICE: 32 * _MIB, _SHARED: 256 * _MIB}
_TURN: Final = 50  # batches of a soak between opening a slot and closing it


class CheckFailedError(TrimRTError):
    """Something does not do what it must."""


class Latency(BaseModel):
    """One engine at one batch size."""

    precision: Precision
    cuda_graphs: bool | None = Field(description="None where there is no GPU")
    batch: int
    median_ms: float
    images_per_second: float


def find_library(backend: Backend) -> str:
    """Import the backend's library."""
    if backend == "openvino":
        open_target(backend)
        import openvino

        return f"openvino {openvino.get_version()}"
    from runtime.tensorrt.library import load_tensorrt

    return f"{backend} {load_tensorrt(backend).version}"


def find_device() -> str:
    """Open CUDA and ask what the GPU is."""
    with attached(open_cuda()) as cuda:
        device, (free, total) = cuda.device(), cuda.memory()
    return (
        f"{device.name}, compute capability {device.compute_capability}, {device.multiprocessors} "
        f"multiprocessors, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, "
        f"CUDA {device.cuda} by {cuda.name}"
    )


def build(kit: Kit, backend: Backend, precision: Precision, folder: Path) -> str:
    """Build the package into `folder`, unless it is there already."""
    target = open_target(backend)
    package = folder / package_name(kit, target, precision)
    if package.is_dir():
        return f"{package} was built by {read_manifest(package).backend_version} before"
    built = build_package(
        *(kit, target, precision, folder),
        batch=BATCH,
        gate=Gate(),
        command="trimrt selftest",
        report=lambda _step: None,
    )
    if built.unverified:
        raise CheckFailedError(built.unverified)
    size = (built.folder / built.manifest.provenance.artefact).stat().st_size
    return f"{built.folder.name}, {size / 1e6:.2f} MB"


def check_labels(package: Path, images: VerificationSet) -> str:
    """The engine's labels against the recorded ones of the FP32 network."""
    with _loaded(package) as engine:
        found = compare(engine, images)
    Gate().check(found)
    return f"{found.label_agreement:.1%} of {found.images} labels are the FP32 network's"


def check_batches(package: Path, images: VerificationSet) -> str:
    """Batches of changing sizes, each with its own images, so that a stale buffer or graph would be seen."""
    with _loaded(package) as engine, closing(engine.open_slot()) as slot:
        wrong, seen = _run_batches(slot, images, seed=0)
    return _judge(wrong, seen)


def check_slots(package: Path, images: VerificationSet) -> str:
    """Several slots at once, each on a thread of its own."""
    with _loaded(package, Options(slots=_SLOTS)) as engine:
        threads = [EngineThread() for _ in range(_SLOTS)]
        runs = [
            thread.submit(partial(_run_slot, engine, images, number)) for number, thread in enumerate(threads)
        ]
        for thread in threads:
            thread.close()
        counts = [run.result() for run in runs]
    return f"{_SLOTS} at once: {_judge(sum(wrong for wrong, _ in counts), sum(seen for _, seen in counts))}"


def check_graphs(package: Path, images: VerificationSet) -> str:
    """CUDA graphs give what plain launches give."""
    with_graphs, without = (_logits(package, images, graphs) for graphs in (True, False))
    scale, difference = np.abs(without).max(), np.abs(with_graphs - without).max()
    if not difference <= 0.01 * scale:
        raise CheckFailedError(
            f"logits differ by {difference:.3g} from those without graphs (up to {scale:.3g})"
        )
    return f"logits differ by {difference:.1e} from those without, which are up to {scale:.1f}"


def time_batches(package: Path, latencies: list[Latency]) -> str:
    """Time a few sizes, on a GPU with CUDA graphs and without; adds to `latencies`."""
    manifest = read_manifest(package)
    for graphs in (None,) if manifest.backend == "openvino" else (True, False):
        with (
            _loaded(package, Options(cuda_graphs=graphs is not False)) as engine,
            closing(TimedSlots(engine, 1)) as slots,
        ):
            for batch in TIMED:
                slots.run(batch, _TIMED_SECONDS / 10, alone=True)
                seconds = median(slots.run(batch, _TIMED_SECONDS, alone=True)[0])
                latencies.append(
                    Latency(
                        precision=manifest.precision,
                        cuda_graphs=graphs,
                        batch=batch,
                        median_ms=1000 * seconds,
                        images_per_second=batch / seconds,
                    )
                )
    return f"batches of {', '.join(map(str, TIMED))}"


def soak(package: Path, images: VerificationSet, seconds: float) -> str:
    """Changing batches in slots that come and go: the labels stay right, the memory does not grow."""
    started, turns, wrong, seen, settled = time.monotonic(), 0, 0, 0, None
    with _loaded(package) as engine:
        thread = EngineThread()
        try:
            while (passed := time.monotonic() - started) < seconds or turns < 3:
                found = thread.submit(partial(_run_slot, engine, images, turns, _TURN)).result()
                wrong, seen, turns = wrong + found[0], seen + found[1], turns + 1
                if settled is None and passed >= seconds / 3:
                    settled = _memory(engine)
            grown = {
                name: bytes_ - (settled or {}).get(name, bytes_) for name, bytes_ in _memory(engine).items()
            }
        finally:
            thread.close()
    told = ", ".join(f"{name} grew by {max(more, 0) / _MIB:.1f} MiB" for name, more in grown.items())
    if any(more > _GROWTH[name] for name, more in grown.items()):
        raise CheckFailedError(f"{told} in {seconds:.0f} s")
    return f"{_judge(wrong, seen)}; {told}"


@contextmanager
def _loaded(package: Path, options: Options | None = None) -> Iterator[Engine]:
    with closing(load_engine(package, options)) as engine:
        yield engine


def _run_slot(engine: Engine, images: VerificationSet, seed: int, rounds: int = _ROUNDS) -> tuple[int, int]:
    with closing(engine.open_slot()) as slot:
        return _run_batches(slot, images, seed, rounds)


def _run_batches(slot: Slot, images: VerificationSet, seed: int, rounds: int = _ROUNDS) -> tuple[int, int]:
    """How many labels are not the recorded ones, and how many there were."""
    wrong, seen, expected = 0, 0, images.logits.argmax(axis=1)
    for chosen in _choices(images, seed, rounds):
        slot.pixels[: len(chosen)] = images.pixels[chosen]
        wrong += int((slot.infer(len(chosen)).logits.argmax(axis=1) != expected[chosen]).sum())
        seen += len(chosen)
    return wrong, seen


def _choices(images: VerificationSet, seed: int, rounds: int) -> Iterator[NDArray[np.int64]]:
    """Which images each batch has; sizes follow each other in no order."""
    random = np.random.default_rng(seed)
    for _ in range(rounds):
        yield random.integers(0, len(images.pixels), random.integers(BATCH.min, BATCH.max + 1))


def _logits(package: Path, images: VerificationSet, graphs: bool) -> NDArray[np.float32]:
    parts = []
    with _loaded(package, Options(cuda_graphs=graphs)) as engine, closing(engine.open_slot()) as slot:
        for chosen in _choices(images, 0, _ROUNDS):
            slot.pixels[: len(chosen)] = images.pixels[chosen]
            parts.append(slot.infer(len(chosen)).logits.copy())
    return np.concatenate(parts)


def _judge(wrong: int, seen: int) -> str:
    if wrong > _MOST_WRONG * seen:
        raise CheckFailedError(f"{wrong} of {seen} labels are not the FP32 network's")
    return f"{seen - wrong} of {seen} labels are the FP32 network's"


def _memory(engine: Engine) -> dict[str, int]:
    """Bytes in use, by whom: the process, and the device or what it shares."""
    found = {_PROCESS: _resident()}
    if not engine.on_cpu:
        with attached(open_cuda()) as cuda:
            shared, (free, total) = cuda.device().integrated, cuda.memory()
        # CUDA's figure on a Jetson falls with every file that is read.
        found[_SHARED if shared else _DEVICE] = -(available_memory() or free) if shared else total - free
    return found


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize()


Check = Callable[[], str]
