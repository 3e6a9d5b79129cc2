"""The engine package's manifest: what was built, from what, for which machine, and how good it is.

An engine package is a folder with `manifest.json` (this) and the artefact: `engine.plan` for
TensorRT, `engine.blob` plus `model.onnx` for OpenVINO. The builder writes it, the server reads it;
the schema lives here because the server must not import the builder.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.errors import TrimRTError
from models.files import restore
from models.preprocessing import Preprocessing
from models.promise import Promise
from runtime.jetson import Power
from runtime.reading import TEXT_BYTES, read_file
from runtime.signatures import ANYONE, SignatureError, Trust

MANIFEST_NAME: Final = "manifest.json"
_SHOWN_MISTAKES: Final = 3
_NAMED_MISTAKES: Final = 1000

Backend = Literal["tensorrt", "tensorrt-rtx", "openvino"]
Precision = Literal["fp32", "fp16", "int8", "int8-dynamic"]
Activation = Literal["softmax", "sigmoid"]
CalibrationMethod = Literal["entropy", "max", "mse", "qat"]
WeightChange = Literal["equalised", "bias", "rounded"]
LeftOut = Literal["residual sums", "first layer"]


class EngineError(TrimRTError):
    """An engine package that cannot be used; the message names the reason and the remedy."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tensor(_Strict):
    """One input or output of the engine; dimension -1 is the batch."""

    name: str
    dtype: Literal["uint8", "float32"]
    shape: list[int] = Field(min_length=1)
    layout: str | None = Field(default=None, description="e.g. NHWC")


class BatchSizes(_Strict):
    """The optimisation profile's batch sizes."""

    min: int = Field(ge=1)
    opt: int = Field(ge=1)
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> BatchSizes:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"batch sizes must be ordered, not min={self.min} opt={self.opt} max={self.max}")
        return self


class Compatibility(_Strict):
    """The machine the engine was built on; what does not apply is None."""

    os: str
    cpu_architecture: str
    cpu_name: str | None = None
    cpu_features: list[str] = Field(
        default=[], description="instruction sets that a CPU engine may have been compiled to use"
    )
    gpu_name: str | None = None
    compute_capability: str | None = None
    compute_capabilities: list[str] = Field(
        default=[], description="GPUs that TensorRT-RTX compiled for; empty means Ampere and later"
    )
    dla_core: int | None = None
    cuda: str | None = None
    driver: str | None = None
    l4t: str | None = Field(default=None, description="release of Jetson Linux, where it was seen")
    board: str | None = Field(default=None, description="name of a Jetson; None elsewhere, or not recorded")
    multiprocessors: int | None = Field(default=None, description="of the GPU; None: not recorded")
    memory_mib: int | None = Field(default=None, description="of the GPU, or of a Jetson; None: not recorded")
    hardware_compatible: bool = False
    version_compatible: bool = False

    @property
    def machine(self) -> str:
        """What the engine runs on, by one name: the board, GPU or processor."""
        return self.board or self.gpu_name or self.cpu_name or self.cpu_architecture


class FineTuning(_Strict):
    """How quantisation-aware training changed the weights."""

    epochs: int
    images: int = Field(description="all training images")
    images_sha256: str
    learning_rate: float


class Rung(_Strict):
    """A way to a static INT8 engine that was tried."""

    name: str
    seconds: float | None = Field(default=None, description="that making its graph took")
    exact_agreement: float | None = Field(
        default=None,
        description="share of the validation images that its graph labels as FP32 where sums are exact",
    )
    int8_share: float | None = Field(
        default=None, description="share of the multiply-accumulates that run in INT8"
    )
    refused: str | None = Field(description="by the accuracy gate, and why; None: it was published")


class Calibration(_Strict):
    """How an INT8 graph was made. Only training images are ever used."""

    method: CalibrationMethod = Field(
        description="mse: the least square error; qat: the largest magnitude, to which the weights were then "
        "fine-tuned"
    )
    changes: list[WeightChange] = Field(
        default=[],
        description="equalised: channels were scaled to one range; bias: biases make up for the mean error "
        "of rounding; rounded: weights were rounded for the least error of each layer's output",
    )
    images: int
    images_sha256: str
    seed: int
    fine_tuning: FineTuning | None = Field(default=None, description="of `qat` alone")
    tried: list[str] = Field(default=[], description="methods that failed the accuracy gate before this one")
    higher_precision_layers: list[str] = Field(default=[], description="kept out of INT8 to pass the gate")
    left_out: LeftOut | None = Field(default=None, description="left out of INT8, as it may be faster so")
    ladder: list[Rung] = Field(default=[], description="all that was tried, in order; the last was published")

    @property
    def name(self) -> str:
        """How it differs from other calibrations, in words."""
        words: list[str] = [self.method, *self.changes]
        if self.higher_precision_layers:
            words.append(f"{len(self.higher_precision_layers)} layers in higher precision")
        if self.left_out:
            words.append(f"{self.left_out} left out")
        return ", ".join(words)


class Provenance(_Strict):
    """Hashes of what the engine was made from, and of the artefact itself."""

    checkpoint_sha256: str | None = Field(
        default=None, description="of the weights; None for an ONNX from elsewhere"
    )
    onnx_sha256: str
    artefact: str = Field(pattern=r"^[A-Za-z0-9._-]+$", description="file name inside the package")
    artefact_sha256: str
    artefact_bytes: int | None = Field(default=None, ge=1, description="its size; None: not recorded")
    calibration: Calibration | None = None
    int8_share: float | None = Field(
        default=None, description="share of the multiply-accumulates that run in INT8"
    )
    source: str | None = Field(default=None, description="what the network was read from")
    parameters: int | None = None
    macs: int | None = None


_Count = Annotated[int, Field(ge=0, le=1 << 40)]  # of which many add up in 64 bits


class Predictions(_Strict):
    """What the engine said of the validation images that are as they are; live traffic is held against it."""

    classes: list[_Count] = Field(description="images whose likeliest class it is, for each class")
    confidence: list[_Count] = Field(description="images by its probability, in the bins of `runtime.drift`")


class Evidence(_Strict):
    """What the accuracy gate and the timing after the build measured, on this machine."""

    image_set: str = Field(description="which images, never the test images")
    images: int
    originals: int | None = Field(
        default=None,
        description="images that are as they are, of which top-1 is said; the others are copies of them, "
        "shifted by a pixel; None: not recorded, and top-1 is of all",
    )
    reference_top1: float | None = Field(
        description="of the FP32 reference, as a share; None: nobody knows the true labels"
    )
    engine_top1: float | None
    drop: float | None = Field(default=None, description="loss of top-1 over all images, as a share")
    label_agreement: float = Field(description="share of images on which engine and reference agree")
    max_logit_difference: float
    latency_ms: float = Field(description="median of one image alone, milliseconds")
    throughput: float = Field(description="images per second at the largest batch")
    least_ms: float | None = Field(
        default=None,
        description="least time of one image alone, which latency tables have; None: not recorded",
    )
    weights_bytes: int = Field(description="weights as stored in the ONNX graph")
    power: Power | None = Field(default=None, description="the Jetson's power mode and clocks meanwhile")
    predictions: Predictions | None = Field(default=None, description="None: not recorded")


class Candidate(_Strict):
    """An engine that `--precision best` tried; what was not measured is None."""

    precision: Precision
    left_out: LeftOut | None = Field(default=None, description="of INT8")
    latency_ms: float | None = None
    throughput: float | None = None
    engine_top1: float | None = None
    refused: str | None = Field(
        default=None, description="what the accuracy gate said of it, or why there is no such engine"
    )

    @property
    def name(self) -> str:
        """What it is, in words."""
        return f"{self.precision}, {self.left_out} left out" if self.left_out else self.precision


class Manifest(_Strict):
    """One engine package's description; `manifest.json`."""

    format: Literal[1] = 1
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)
    version: str = Field(default="1", pattern=r"^[0-9]+$", max_length=18)
    created_at: datetime
    builder_version: str
    backend: Backend
    backend_version: str
    precision: Precision
    arithmetic: Literal["fp32"] | None = Field(
        default=None,
        description="what is computed in where not in INT8, if that is not what the graph says: "
        "CPUs compute FP16 graphs in FP32",
    )
    saturation_safe: bool | None = Field(
        default=None,
        description="of an INT8 engine: whether its weights are rounded so that no sum of two products "
        "saturates on processors without VNNI, which add them in 16 bits",
    )
    input: Tensor
    outputs: list[Tensor] = Field(min_length=1)
    batch: BatchSizes
    profiles: list[BatchSizes] = Field(
        default=[], description="TensorRT's optimisation profiles, in their order; `batch` spans them"
    )
    labels: list[str] = Field(min_length=2)
    activation: Activation = Field(
        default="softmax",
        description="what makes probabilities of logits: softmax where one label is true of an image, "
        "sigmoid where any number may be, each with a probability of its own",
    )
    preprocessing: Preprocessing
    compatibility: Compatibility
    provenance: Provenance
    evidence: Evidence | None = Field(
        default=None, description="None when the engine could not be run where it was built"
    )
    promise: Promise | None = Field(
        default=None, description="what the network was pruned to cost; None: it was given no budget"
    )
    candidates: list[Candidate] = Field(default=[], description="what `--precision best` chose from")
    build_command: str = Field(description="the command that rebuilds it")


def read_manifest(folder: Path, trust: Trust = ANYONE) -> Manifest:
    """The manifest of the engine package in `folder`; the artefact is not looked at.

    Args:
        folder: the package's.
        trust: whose packages are used; of another's the manifest is not even parsed.

    Raises:
        EngineError: no package there, not a valid one, or one that no trusted key has signed.
    """
    restore(folder)
    path = folder / MANIFEST_NAME
    try:
        return Manifest.model_validate_json(trust.read(path, TEXT_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        raise EngineError(
            f"{folder} is not an engine package: it has no {MANIFEST_NAME} (`trimrt build` makes one)"
        ) from None
    except OSError as error:
        raise EngineError(f"{path} cannot be read: {error.strerror}") from error
    except SignatureError as error:
        raise EngineError(str(error)) from error
    except ValidationError as error:
        raise EngineError(f"{path} is not a valid engine manifest: {_reasons(error)}") from error


def _reasons(error: ValidationError) -> str:
    """The first few mistakes: there may be one for every label, and naming them all takes a while."""
    if error.error_count() > _NAMED_MISTAKES:
        return f"it has {error.error_count()} mistakes"
    mistakes = [
        f"{'.'.join(map(str, mistake['loc']))}: {mistake['msg']}".removeprefix(": ")
        for mistake in error.errors(include_url=False, include_context=False, include_input=False)
    ]
    more = f"and {len(mistakes) - _SHOWN_MISTAKES} more"
    return "; ".join(mistakes[:_SHOWN_MISTAKES] + [more] * (len(mistakes) > _SHOWN_MISTAKES))


def read_artefact(folder: Path, manifest: Manifest) -> bytes:
    """The artefact's content, whose hash is what the manifest says.

    Raises:
        EngineError: the file is missing, cannot be read or was changed after the build.
    """
    path = folder / manifest.provenance.artefact
    try:
        content = read_file(path, manifest.provenance.artefact_bytes)
    except FileNotFoundError:
        raise EngineError(f"{folder} has no {path.name}; rebuild it: {manifest.build_command}") from None
    except OSError as error:
        raise EngineError(
            f"{path} cannot be read: {error.strerror}; rebuild it: {manifest.build_command}"
        ) from error
    if not content or hashlib.sha256(content).hexdigest() != manifest.provenance.artefact_sha256:
        raise EngineError(
            f"{path} was damaged or changed since it was built; rebuild it: {manifest.build_command}"
        )
    return content


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
