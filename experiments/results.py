"""What was measured: the JSON that the tables are made from."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, Field

from benchmarks.measurements import Machine, this_machine
from models.files import replace_file
from runtime.manifest import Precision

FOLDER: Final = Path(__file__).parent / "results"

_LIBRARIES: Final = (
    "torch",
    "torchvision",
    "torch-pruning",
    "nvidia-modelopt",
    "onnx",
    "onnxruntime",
    "openvino",
    "scikit-learn",
)


class Made(BaseModel):
    """By which command, where and with which versions something was measured."""

    command: str
    machine: Machine
    versions: dict[str, str]

    def write(self, path: Path) -> None:
        """Write the file in one step."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as new:
            new.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


def made_here(command: str) -> dict[str, Any]:
    """The fields of `Made`, on this machine."""
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    return {"command": command, "machine": this_machine(), "versions": versions}


class Network(BaseModel):
    """A checkpoint, in FP32, on the fold's test images."""

    name: str = Field(description="the variant's")
    wrong: int
    images: int
    loss: float = Field(description="mean cross-entropy, nats")
    validation_accuracy: float
    parameters: int
    macs: int
    live_parameters: float = Field(description="share that receives a gradient")
    bytes: int = Field(description="of its weights file")
    weights_sha256: str
    command: str
    seconds: float | None = Field(description="of its stage, on a machine that may have had other work")


class Engine(BaseModel):
    """A compiled network on the fold's test images, beside the same network in PyTorch."""

    network: str
    precision: Precision
    wrong: int
    images: int
    agreement: float = Field(description="share of the images that both label alike")
    max_logit_difference: float
    bytes: int = Field(description="of its ONNX graph with the weights")
    calibration: str | None = Field(description="method, for static INT8")


class Fold(BaseModel):
    """One held-out part, and all that was trained and built without it."""

    fold: int
    seed: int
    threads: int
    training_precision: str
    networks: list[Network]
    engines: list[Engine]
    refused: list[str] = Field(default=[], description="engines beyond the gate, with its words")
    seconds: float | None = Field(description="of all stages together")
    peak_rss_mb: float | None = Field(description="the most that any stage held; None: not known of all")

    def network(self, name: str) -> Network:
        """The network of that name."""
        return next(network for network in self.networks if network.name == name)

    def engine(self, network: str, precision: Precision) -> Engine | None:
        """The engine of that network and precision, if it passed the gate."""
        for engine in self.engines:
            if (engine.network, engine.precision) == (network, precision):
                return engine
        return None


class Results(Made):
    """A study's folds, in order."""

    study: str
    folds: list[Fold]
