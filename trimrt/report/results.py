"""What a report says, as data: `trimrt report --json` writes it, and the page is drawn from it."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from runtime.manifest import Backend, Evidence, Precision
from runtime.profiling import Layer

Kind = Literal["checkpoint", "engine"]
Measured = Literal["accuracy", "agreement", "latency", "profile", "ranges", "sensitivity"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Mistake(_Strict):
    """One cell of a confusion matrix off its diagonal; classes by index."""

    true: int
    predicted: int
    images: int = Field(ge=1)


class Accuracy(_Strict):
    """Measured here on the test images."""

    images: int
    wrong: int
    top1: float = Field(description="as a share")
    low: float = Field(description="Wilson 95 % interval")
    high: float
    mistakes: list[Mistake] = Field(description="by true class, then by predicted class")


class Claim(_Strict):
    """A top-1 accuracy that a card or manifest states."""

    top1: float
    images: int
    image_set: str


class Agreement(_Strict):
    """On how many test images a model gives the same label as its reference, rightly or not."""

    reference: int = Field(description="number of the model it is held against")
    share: float


class Latency(_Strict):
    """Of one smallest batch alone, all models in turns; milliseconds."""

    batch: int = Field(description="images in it: 1, unless the engine's smallest is larger")
    runs: int
    median_ms: float
    best_ms: float
    p10_ms: float
    p90_ms: float


class LayerTime(Layer):
    """A layer as the backend runs it, with the network's own name for it."""

    title: str


class LayerRange(_Strict):
    """What INT8 can represent in one layer, as magnitudes."""

    layer: str
    activation: float = Field(description="largest magnitude of the layer's input, from calibration")
    weights_low: float = Field(description="smallest of the channels' largest magnitudes")
    weights_median: float
    weights_high: float


class LayerError(_Strict):
    """What quantising one layer alone does to the logits."""

    layer: str
    error: float = Field(description="root mean square change, relative to the logits'")


class Fact(_Strict):
    """One line of a model's provenance."""

    term: str
    text: str


class Model(_Strict):
    """One checkpoint or engine package; what could not be measured is None, with its reason in `missing`."""

    number: int = Field(description="by which the page refers to it")
    label: str = Field(description="its name, with a part of its path where names repeat")
    name: str
    kind: Kind
    path: str
    role: str | None = Field(default=None, description="`teacher`, `student` or `pruned`, of checkpoints")
    architecture: str | None = None
    backend: Backend | None = None
    precision: Precision
    parameters: int | None = None
    macs: int | None = None
    front: str | None = Field(
        default=None, description="the same of all networks that one student was pruned to by budgets"
    )
    size_bytes: int = Field(description="the weights file, or the compiled artefact")
    group: int = Field(description="index of its data set in `groups`")
    accuracy: Accuracy | None = None
    claim: Claim | None = None
    agreement: Agreement | None = None
    latency: Latency | None = None
    profile: list[LayerTime] | None = None
    ranges: list[LayerRange] | None = None
    sensitivity: list[LayerError] | None = None
    evidence: Evidence | None = Field(default=None, description="what the build measured, of engines")
    missing: dict[Measured, str] = Field(default={}, description="why something was not measured")
    notes: list[str] = []
    provenance: list[Fact] = []


class Group(_Strict):
    """Models that are measured on the same test images, or would be."""

    name: str
    source: str | None = None
    split: str | None = None
    fold: int | None = None
    folds: int | None = None
    sha256: str | None = None
    test_images: int | None = None
    labels: list[str]
    class_images: list[int] | None = Field(default=None, description="test images of each class")


class LeftOut(_Strict):
    """Something that was found and is not a model of the report, and why."""

    path: str
    reason: str


class Report(_Strict):
    """All that one `trimrt report` found and measured."""

    format: Literal[1] = 1
    created_at: datetime
    command: str
    machine: dict[str, str] = Field(description="where it was measured")
    versions: dict[str, str]
    timing_seconds: float = Field(description="for which all models were timed in turns")
    groups: list[Group]
    models: list[Model]
    left_out: list[LeftOut] = []
    cautions: list[str] = Field(default=[], description="what makes these figures less certain")
