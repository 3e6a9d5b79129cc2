"""Triton's `ModelConfig` for an engine (triton-inference-server/common, protobuf/model_config.proto)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from models.errors import TrimRTError
from runtime.manifest import Manifest, Tensor
from server.settings import Settings
from trimrt.export_triton.textproto import Enum, Message, Value, entries

Backend = Literal["tensorrt", "openvino", "onnxruntime"]

LABELS_NAME: Final = "labels.txt"
# As TrimRT's own server bounds its queue.
MAX_QUEUE: Final[int] = Settings.model_fields["queue_limit"].default
TIMEOUT_MS: Final[int] = Settings.model_fields["timeout_ms"].default

_TYPES: Final = {"uint8": Enum("TYPE_UINT8"), "float32": Enum("TYPE_FP32")}


class TritonError(TrimRTError):
    """A package that cannot become a Triton model, or a place it cannot go; the message says what to do."""


@dataclass(frozen=True)
class Options:
    """What Triton is to do with the model.

    Attributes:
        backend: Triton's backend for an OpenVINO package's graph, `openvino` unless named; TensorRT
            packages have but one.
        instances: batches that run at once on each device; None: two on GPUs, so that one copies while
            the other computes, else one.
        max_queue_delay_us: how long a request may wait for others to fill its batch, microseconds. 0 is
            work-conserving, as TrimRT's own server is.
    """

    backend: Literal["openvino", "onnxruntime"] | None = None
    instances: int | None = None
    max_queue_delay_us: int = 0


def choose_backend(manifest: Manifest, options: Options) -> Backend:
    """Triton's backend for the engine.

    Raises:
        TritonError: there is none, or the options ask for what it cannot do.
    """
    if manifest.backend == "tensorrt-rtx":
        raise TritonError(
            f"{manifest.name} is a TensorRT-RTX engine, and Triton has no backend for those: "
            "`trimrt build --target tensorrt` makes one that it can serve, `trimrt serve` serves this one"
        )
    if manifest.backend == "tensorrt":
        if options.backend is not None:
            raise TritonError(
                f"--backend {options.backend} is for OpenVINO packages; {manifest.name} is a TensorRT plan"
            )
        return "tensorrt"
    backend = options.backend or "openvino"
    if backend == "openvino" and options.max_queue_delay_us:
        raise TritonError(
            "Triton's OpenVINO backend forms no batches to wait for; "
            "leave --max-queue-delay-us out, or take --backend onnxruntime"
        )
    return backend


def forms_batches(manifest: Manifest, backend: Backend) -> bool:
    """Whether Triton may form batches of any size up to the largest.

    Its OpenVINO backend would run every batch at the largest size, padded, and refuse smaller ones
    otherwise (`ENABLE_BATCH_PADDING` in its README); without Triton's batching it runs what a client sends.
    """
    return backend != "openvino" and manifest.batch.min == 1 < manifest.batch.max


def model_file(backend: Backend) -> str:
    """Name of the model's file in its version's folder."""
    return "model.plan" if backend == "tensorrt" else "model.onnx"


def model_config(manifest: Manifest, options: Options) -> Message:
    """The configuration, for `textproto.dump`.

    Raises:
        TritonError: Triton has no backend for the engine, or the options ask for what it cannot do.
    """
    backend = choose_backend(manifest, options)
    batching = forms_batches(manifest, backend)
    instances = options.instances or (2 if backend == "tensorrt" else 1)
    config: dict[str, Value] = {
        "name": manifest.name,
        "backend": backend,
        "default_model_filename": model_file(backend),
        "max_batch_size": manifest.batch.max if batching else 0,
        "input": [_tensor(manifest, manifest.input, batching=batching)],
        "output": [
            {**_tensor(manifest, tensor, batching=batching), "label_filename": LABELS_NAME}
            for tensor in manifest.outputs
        ],
        "instance_group": [_instance_group(manifest, backend, instances)],
    }
    if batching:
        config["dynamic_batching"] = _dynamic_batching(manifest, options.max_queue_delay_us)
    if backend == "openvino":  # whose instances would take turns on a single stream otherwise
        config["parameters"] = entries({"NUM_STREAMS": {"string_value": str(instances)}})
    config["model_warmup"] = _warmup(manifest, batching=batching)
    return config


def _tensor(manifest: Manifest, tensor: Tensor, *, batching: bool) -> dict[str, Value]:
    batch = manifest.batch.max if manifest.batch.min == manifest.batch.max else -1
    dims = tensor.shape[1:] if batching else [batch, *tensor.shape[1:]]
    return {"name": tensor.name, "data_type": _TYPES[tensor.dtype], "dims": dims}


def _instance_group(manifest: Manifest, backend: Backend, instances: int) -> Message:
    kind = Enum("KIND_GPU" if backend == "tensorrt" else "KIND_CPU")
    group: dict[str, Value] = {"count": instances, "kind": kind}
    if len(manifest.profiles) > 1:  # Triton would use the first alone
        group["profile"] = [str(index) for index in range(len(manifest.profiles))]
    core = manifest.compatibility.dla_core
    if core is not None:
        group["secondary_devices"] = [{"kind": Enum("KIND_NVDLA"), "device_id": core}]
    return group


def _dynamic_batching(manifest: Manifest, max_queue_delay_us: int) -> Message:
    """Preferred sizes are worth stopping at only where batches are waited for, or profiles tuned for them.

    One is none of them: at it Triton would stop although more images wait.
    """
    batching: dict[str, Value] = {}
    if max_queue_delay_us or len(manifest.profiles) > 1:
        best = {sizes.opt for sizes in manifest.profiles or [manifest.batch]}
        batching["preferred_batch_size"] = sorted(best - {1} | {manifest.batch.max})
    batching["max_queue_delay_microseconds"] = max_queue_delay_us
    batching["default_queue_policy"] = {
        "timeout_action": Enum("REJECT"),
        "default_timeout_microseconds": round(TIMEOUT_MS * 1000),
        "allow_timeout_override": True,
        "max_queue_size": MAX_QUEUE,
    }
    return batching


def _warmup(manifest: Manifest, *, batching: bool) -> list[Message]:
    """Random pixels at the sizes that matter, so that no request finds a cold engine."""
    batch, shape = manifest.batch, manifest.input.shape[1:]

    def sample(size: int) -> Message:
        pixels: Message = {
            "data_type": _TYPES[manifest.input.dtype],
            "dims": shape if batching else [size, *shape],
            "random_data": True,
        }
        return {
            "name": f"batch of {size}",
            "batch_size": size if batching else 1,
            "inputs": entries({manifest.input.name: pixels}),
        }

    return [sample(size) for size in sorted({batch.min, batch.opt, batch.max})]
