"""OpenVINO runtime: an engine package's `engine.blob` on this machine's CPU."""

from __future__ import annotations

import io
import platform
from pathlib import Path
from typing import Any, Final

import numpy as np
import openvino
from numpy.typing import NDArray

from server.engines.base import Options, Outputs
from server.manifest import Compatibility, EngineError, Manifest, check_artefact

# Left to itself the CPU plugin computes FP32 graphs in BF16 where the processor has it.
CONFIGURATION: Final[dict[str, Any]] = {"INFERENCE_PRECISION_HINT": "f32"}

# A loaded model prepares its kernels anew whenever the batch size changes, which takes longer than a
# small network's inference. So the smallest sizes have a model each, a lane, and the others share one.
_MAX_LANES: Final = 8
_LANES_BYTES: Final = 256 << 20

# The instruction sets that decide which kernels a graph is lowered to.
_FEATURES: Final = frozenset(
    (
        *("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16"),
        *("amx_int8", "amx_bf16", "asimd", "asimddp", "asimdhp", "i8mm", "sve", "sve2", "bf16"),
    )
)


def this_machine() -> Compatibility:
    """What a blob built here is bound to."""
    name, features = _processor()
    return Compatibility(
        os=platform.system(), cpu_architecture=platform.machine(), cpu_name=name, cpu_features=features
    )


def _processor() -> tuple[str | None, list[str]]:
    """This processor's name and those of its instruction sets that matter, as far as Linux says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or None, []
    info = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = (info.get("flags") or info.get("Features") or "").split()
    return info.get("model name"), sorted(_FEATURES.intersection(flags))


def load(folder: Path, manifest: Manifest, options: Options) -> OpenVINOEngine:
    """Check that the package fits this machine, then import its blob.

    Raises:
        EngineError: built by another OpenVINO or for another processor, damaged, or refused by OpenVINO.
    """
    _check_machine(folder, manifest)
    blob = check_artefact(folder, manifest).read_bytes()
    slots = options.slots or 1
    configuration = CONFIGURATION | {"NUM_STREAMS": slots}
    if options.threads:
        # Fewer threads than cores are for sharing the machine, where each process would pin its first
        # thread to the same core.
        configuration |= {"INFERENCE_NUM_THREADS": options.threads, "ENABLE_CPU_PINNING": False}
    sizes = manifest.batch.max - manifest.batch.min + 1
    lanes = max(1, min(sizes, _MAX_LANES, _LANES_BYTES // len(blob)))
    core = openvino.Core()
    try:
        models = [core.import_model(io.BytesIO(blob), "CPU", configuration) for _ in range(lanes)]
    except RuntimeError as error:
        raise EngineError(
            f"OpenVINO {openvino.get_version()} cannot load {folder}: {error}; "
            f"rebuild it: {manifest.build_command}"
        ) from error
    return OpenVINOEngine(manifest, models, slots)


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
    else:
        return
    raise EngineError(f"{folder} was built {difference}. Rebuild it here: {manifest.build_command}")


class OpenVINOEngine:
    """The blob, loaded once for each of the smallest batch sizes; each slot has its own requests."""

    def __init__(self, manifest: Manifest, models: list[openvino.CompiledModel], slots: int) -> None:
        self._manifest = manifest
        self._models = models
        self._slots = slots

    @property
    def manifest(self) -> Manifest:
        """What the package says of itself."""
        return self._manifest

    @property
    def slots(self) -> int:
        """One for each of OpenVINO's streams."""
        return self._slots

    def open_slot(self) -> OpenVINOSlot:
        """A slot for the calling thread."""
        return OpenVINOSlot(self._manifest, [model.create_infer_request() for model in self._models])

    def close(self) -> None:
        """Nothing to do: the models are freed with the last reference to them."""


class OpenVINOSlot:
    """Inference requests over memory that OpenVINO reads and writes in place."""

    def __init__(self, manifest: Manifest, requests: list[openvino.InferRequest]) -> None:
        self._batch = manifest.batch
        self._requests = requests
        self._pixels = np.zeros((manifest.batch.max, *manifest.input.shape[1:]), np.uint8)
        classes = len(manifest.labels)
        self._logits = np.zeros((manifest.batch.max, classes), np.float32)
        self._probabilities = np.zeros_like(self._logits)
        self._bound = [0] * len(requests)

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """`uint8` NHWC of shape `(batch.max, height, width, 3)`, to be filled before `infer`."""
        return self._pixels

    def infer(self, count: int) -> Outputs:
        """Run the first `count` images of `pixels`.

        Raises:
            ValueError: `count` is outside the engine's batch sizes.
            EngineError: OpenVINO failed.
        """
        if not self._batch.min <= count <= self._batch.max:
            raise ValueError(f"batch of {count} is outside {self._batch.min}..{self._batch.max}")
        logits, probabilities = self._logits[:count], self._probabilities[:count]
        lane = min(count - self._batch.min, len(self._requests) - 1)
        request = self._requests[lane]
        try:
            if count != self._bound[lane]:
                request.set_input_tensor(0, openvino.Tensor(self._pixels[:count], shared_memory=True))
                request.set_output_tensor(0, openvino.Tensor(logits, shared_memory=True))
                request.set_output_tensor(1, openvino.Tensor(probabilities, shared_memory=True))
                self._bound[lane] = count
            request.infer()
        except RuntimeError as error:
            raise EngineError(f"OpenVINO failed on a batch of {count}: {error}") from error
        return Outputs(logits, probabilities)

    def close(self) -> None:
        """Nothing to do: the request is freed with the slot."""
