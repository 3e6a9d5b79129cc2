"""`trimrt report` of real checkpoints and real engines."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from markup import Element, parse

from builder.compile.verification import engine_logits
from models.card import Ancestor
from models.checkpoint import load_checkpoint, save_checkpoint
from models.datasets import DataSplit
from models.evaluation import evaluate, predict_logits
from runtime.loading import load_engine
from runtime.manifest import MANIFEST_NAME, Precision
from runtime.tensorrt.layers import PlanLayer, PlanTensor, summarise, write_layers
from trimrt.report.results import Model, Report

ENGINES: tuple[Precision, ...] = ("fp32", "int8", "int8-dynamic")
LAYERS = [
    PlanLayer(
        name="conv1 + relu1",
        kind="CaskConvolution",
        kernel="sm80_xmma_fprop",
        inputs=[PlanTensor(dtype="Half", shape=[1, 3, 24, 24])],
        outputs=[PlanTensor(dtype="Half", shape=[1, 16, 12, 12])],
        graph_layers=["conv1", "relu1"],
    )
]


@dataclass
class Run:
    page: Element
    html: str
    report: Report
    output: str

    def model(self, name: str) -> Model:
        return next(model for model in self.report.models if Path(model.path).name == name)


@pytest.fixture(scope="module")
def run(
    checkpoint: Path,
    packages: dict[Precision, Path],
    data: DataSplit,
    tmp_path_factory: pytest.TempPathFactory,
    trimrt: Callable[..., Result],
) -> Run:
    """One report of all kinds: good ones, one made from another, and three that cannot be measured."""
    runs = tmp_path_factory.mktemp("report-runs")
    network, card = load_checkpoint(checkpoint)
    ancestor = Ancestor(
        name=card.name,
        role="student",
        architecture=card.architecture,
        weights_sha256=card.weights_sha256,
        metrics=card.metrics,
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * parameter.abs() * torch.randn_like(parameter)
    flattered = card.metrics.model_copy(update={"images": len(data.test), "wrong": 0})
    noisy = card.model_copy(update={"name": "noisy", "lineage": [ancestor], "metrics": flattered})
    save_checkpoint(runs / "noisy", network, noisy)
    with torch.no_grad():
        next(network.parameters()).mul_(0.9)
    elsewhere = card.dataset.model_copy(update={"source": "/nowhere/photos", "sha256": "0" * 64})
    save_checkpoint(
        runs / "elsewhere", network, card.model_copy(update={"name": "elsewhere", "dataset": elsewhere})
    )
    shutil.copytree(checkpoint, runs / "damaged")
    _edit(runs / "damaged/card.json", weights_sha256="1" * 64, name="damaged")
    shutil.copytree(packages["fp16"], runs / "jetson")
    _edit(runs / "jetson" / MANIFEST_NAME, backend="tensorrt", backend_version="10.3.0")
    write_layers(runs / "jetson", LAYERS)
    (runs / "torn").mkdir()
    (runs / "torn/card.json").write_text("{")
    out, figures = runs / "out/report.html", runs / "out/report.json"
    result = trimrt(
        *("report", runs, checkpoint, *(packages[precision] for precision in ENGINES)),
        *("--out", out, "--json", figures, "--seconds", "0.1"),
    )
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.parent.iterdir()) == ["report.html", "report.json"]
    html = out.read_text(encoding="utf-8")
    return Run(parse(html), html, Report.model_validate_json(figures.read_text()), result.output)


def _edit(path: Path, **changes: str) -> None:
    described = json.loads(path.read_text()) | changes
    if "backend" in changes:
        described["provenance"]["artefact_sha256"] = "2" * 64
    path.write_text(json.dumps(described))


def test_every_model_is_on_the_page_with_the_figures_of_the_json(run: Run) -> None:
    rows = {
        row.find("th")[0].words.split()[0]: row
        for table in run.page.find("table")
        if "summary" in (table.attributes.get("class") or "")
        for row in table.find("tbody")[0].find("tr")
    }
    assert list(rows) == [f"#{model.number}" for model in run.report.models]
    assert len(rows) == 4 + len(ENGINES) + 1
    for model in run.report.models:
        row = rows[f"#{model.number}"]
        assert model.label in row.words
        assert model.precision in row.words
        shown = [float(value.attributes["value"]) for value in row.find("data")]
        expected = [model.parameters, model.macs, model.size_bytes]
        if model.accuracy:
            expected += [model.accuracy.top1, model.accuracy.wrong]
        if model.agreement:
            expected.append(model.agreement.share)
        if model.latency:
            expected.append(model.latency.median_ms)
        assert shown == expected


def test_accuracy_is_that_of_the_test_images(
    run: Run, checkpoint: Path, packages: dict[Precision, Path], data: DataSplit
) -> None:
    network, card = load_checkpoint(checkpoint)
    pixels = data.test.load_pixels(card.preprocessing)
    expected = evaluate(network, pixels, data.test.targets, card.preprocessing)
    student = run.model(checkpoint.name)
    assert student.accuracy is not None
    assert (student.accuracy.wrong, student.accuracy.images) == (expected.wrong, 360)
    assert sum(mistake.images for mistake in student.accuracy.mistakes) == expected.wrong
    engine = run.model(packages["int8"].name)
    labels = engine_logits(load_engine(packages["int8"]), pixels).argmax(axis=1)
    reference = predict_logits(network, pixels, card.preprocessing).numpy().argmax(axis=1)
    assert engine.accuracy is not None
    assert engine.accuracy.wrong == int((labels != data.test.targets).sum())
    assert engine.agreement is not None
    assert engine.agreement.reference == student.number
    assert engine.agreement.share == np.mean(labels == reference)


def test_a_checkpoint_is_held_against_the_one_that_it_was_made_from(run: Run, checkpoint: Path) -> None:
    noisy, student = run.model("noisy"), run.model(checkpoint.name)
    assert noisy.agreement is not None
    assert noisy.agreement.reference == student.number
    assert 0.5 < noisy.agreement.share < 1
    assert student.missing["agreement"] == "it was not made from another checkpoint"
    assert "Points of accuracy gained" in run.page.words


def test_all_that_runs_is_timed_in_one_run(run: Run) -> None:
    timed = [model for model in run.report.models if model.latency is not None]
    assert len(timed) == 3 + len(ENGINES)
    assert len({model.latency.runs for model in timed if model.latency}) == 1
    for model in timed:
        assert model.latency is not None
        assert 0 < model.latency.best_ms <= model.latency.p10_ms <= model.latency.median_ms
        assert model.latency.median_ms <= model.latency.p90_ms


def test_what_cannot_run_is_listed_with_what_its_build_measured(run: Run) -> None:
    jetson = run.model("jetson")
    assert (jetson.accuracy, jetson.latency, jetson.profile) == (None, None, None)
    assert "tensorrt" in jetson.missing["accuracy"].lower()
    assert jetson.evidence is not None
    assert summarise(LAYERS) in {fact.text for fact in jetson.provenance if fact.term == "layers"}
    assert "tensorrt" in run.output.lower()
    assert jetson.missing["latency"] in run.page.words


def test_damage_is_told_and_disturbs_nothing_else(run: Run) -> None:
    assert "is damaged or belongs to another card" in run.model("damaged").missing["accuracy"]
    assert [Path(item.path).name for item in run.report.left_out] == ["torn"]
    assert "is not a valid model card" in run.page.words
    assert "left out" in run.output


def test_models_of_other_data_are_a_group_of_their_own(run: Run) -> None:
    elsewhere = run.model("elsewhere")
    assert "no such file or folder: /nowhere/photos" in elsewhere.missing["accuracy"]
    assert elsewhere.latency is not None, "its images are missing, not its weights"
    assert len(run.report.groups) == 2
    assert {model.group for model in run.report.models if model is not elsewhere} == {1 - elsewhere.group}


def test_layers_have_the_names_that_the_network_gives_them(run: Run, packages, checkpoint: Path) -> None:
    modules = {name for name, _ in load_checkpoint(checkpoint)[0].named_modules()}
    engine = run.model(packages["int8"].name)
    assert engine.profile
    assert {layer.title for layer in engine.profile if layer.kind == "Convolution"} <= modules
    assert engine.ranges
    assert engine.sensitivity
    assert {layer.layer for layer in engine.ranges} <= modules
    assert {layer.layer for layer in engine.sensitivity} == {layer.layer for layer in engine.ranges}
    errors = [layer.error for layer in engine.sensitivity]
    assert errors == sorted(errors, reverse=True)
    for layer in engine.ranges:
        assert 0 < layer.weights_low <= layer.weights_median <= layer.weights_high
    assert "for every image" in run.model(packages["int8-dynamic"].name).missing["ranges"]


def test_it_needs_nothing_else(run: Run) -> None:
    assert len(run.html) < 3_000_000
    for element in run.page.everything():
        assert element.tag not in ("script", "link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert element.attributes.get(name, "#").startswith("#")
    style = run.page.find("style")[0].text
    assert "@import" not in style
    assert "url(" not in style


def test_it_is_built_for_readers_who_cannot_see_it(run: Run) -> None:
    for figure in run.page.find("figure"):
        assert figure.find("figcaption")[0].words
        (plot,) = [svg for svg in figure.inside if svg.tag == "svg"]
        assert plot.attributes["role"] == "img"
        assert plot.attributes["aria-label"]
    for table in run.page.find("table"):
        assert table.find("caption")
        assert all(cell.attributes.get("scope") in ("col", "row") for cell in table.find("th"))
    levels = [
        int(element.tag[1]) for element in run.page.everything() if element.tag in ("h1", "h2", "h3", "h4")
    ]
    assert levels[0] == 1
    assert all(after <= before + 1 or after == 4 for before, after in itertools.pairwise(levels))
    ids = [element.attributes["id"] for element in run.page.everything() if "id" in element.attributes]
    assert len(ids) == len(set(ids))
    targets = {
        element.attributes["href"][1:] for element in run.page.find("a") if "href" in element.attributes
    }
    assert targets <= set(ids)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{empty}"], "no checkpoint (card.json) and no engine package (manifest.json)"),
        (["{empty}/missing"], "no such file or folder"),
        (["{student}", "--data", "{empty}"], "has 0 class folders"),
        (["{broken}"], "is not a valid model card"),
        (["{student}", "--out", "{broken}/card.json/report.html"], "cannot make"),
        (["{student}", "--out", "{empty}"], "is a directory"),
        ([], "Missing argument"),
    ],
)
def test_mistakes_are_explained(
    tmp_path: Path, checkpoint: Path, trimrt: Callable[..., Result], arguments: list[str], says: str
) -> None:
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    (broken / "card.json").write_text("{}")
    filled = [argument.format(empty=empty, broken=broken, student=checkpoint) for argument in arguments]
    result = trimrt("report", *filled)
    assert result.exit_code != 0
    assert says in " ".join(result.output.split())
    assert not list(empty.iterdir())
    assert "Traceback" not in result.output


@pytest.mark.slow
def test_engines_are_reported_on_without_torch(packages: dict[Precision, Path], tmp_path: Path) -> None:
    """As on a Jetson, where only engines can be measured and no training library is installed."""
    out = tmp_path / "report.html"
    figures = tmp_path / "report.json"
    arguments = [
        *("report", str(packages["fp32"]), str(packages["int8"]), "--data", "digits"),
        *("--seconds", "0.1", "--out", str(out), "--json", str(figures)),
    ]
    absent = ("torch", "torchvision", "modelopt", "onnx", "onnxruntime", "safetensors")
    code = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from trimrt.cli import main
main({arguments!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    fp32, int8 = Report.model_validate_json(figures.read_text()).models
    assert int8.accuracy is not None
    assert int8.agreement is not None
    assert int8.agreement.reference == fp32.number
    assert "pip install 'trimrt[compress]'" in int8.missing["ranges"]


def test_a_card_that_disagrees_with_what_is_measured_is_noted(run: Run) -> None:
    noisy = run.model("noisy")
    assert noisy.accuracy is not None
    assert noisy.notes == [f"its card says 0 wrong of 360; measured here: {noisy.accuracy.wrong}"]
    assert noisy.notes[0] in run.page.words
