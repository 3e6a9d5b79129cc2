"""Drift: what the manifest records of the validation images, and what the server says of live ones."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError
from running import Running, running

from builder.compile.packages import build_package
from builder.compile.targets.openvino.target import OpenVINOTarget
from builder.compile.verification import Gate, predictions_of
from builder.kit import Kit, open_kit
from models.preprocessing import Pixels
from runtime.drift import CONFIDENCES, LEAST_IMAGES, classes_apart, grouped, stability_index
from runtime.manifest import BatchSizes, Manifest, Predictions, read_manifest
from server.predictions import OTHERS
from server.predictions import Predictions as Counted
from server.settings import Settings

ROOT = Path(__file__).parents[2]
RULES = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text("utf-8"))["groups"][0]["rules"]
(ALERT,) = (float(it["expr"].rpartition(">")[2]) for it in RULES if it["alert"] == "TrimRTDrift")


@pytest.fixture(scope="module")
def kit() -> Kit:
    """A network that reads digits, and 144 images of digits that it was not trained on."""
    return open_kit(ROOT / "trimrt/selftest/kit")


@pytest.fixture(scope="module")
def package(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_package(
        kit,
        OpenVINOTarget(),
        "fp16",
        tmp_path_factory.mktemp("engines"),
        batch=BatchSizes(min=1, opt=8, max=16),
        gate=Gate(),
        command="trimrt build",
        report=lambda _line: None,
    ).folder


@pytest.fixture
def server(package: Path) -> Iterator[Running]:
    with running(Settings(engine=str(package), engine_dir=package.parent, port=0)) as it:
        yield it


@pytest.fixture(scope="module")
def originals(kit: Kit) -> Pixels:
    return kit.verification.pixels[: kit.verification.originals]


def _png(pixels: Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _send(server: Running, images: Sequence[Pixels]) -> None:
    for start in range(0, len(images), 48):
        files = [("file", _png(pixels)) for pixels in images[start : start + 48]]
        assert server.client.post("/predict", files=files).status_code == 200


def _drift(server: Running) -> dict[str, float]:
    """The indices, of which `/stats` and `/metrics` tell the same."""
    told = server.client.get("/stats").json()["engines"][0]["predictions"]["drift"]
    exported = {
        sample.labels["of"]: sample.value
        for family in text_string_to_metric_families(server.client.get("/metrics").text)
        for sample in family.samples
        if sample.name == "trimrt_drift"
    }
    assert told == pytest.approx(exported, abs=1e-4)
    return exported


# --- the whole way --------------------------------------------------------------------------------------


def test_the_manifest_records_what_the_engine_said_of_the_validation_images(
    package: Path, kit: Kit, originals: Pixels
) -> None:
    evidence = read_manifest(package).evidence
    assert evidence is not None
    recorded = evidence.predictions
    assert recorded is not None
    assert sum(recorded.classes) == sum(recorded.confidence) == len(originals)
    reference = predictions_of(kit.verification.logits[: len(originals)], "softmax")
    difference = np.abs(np.subtract(recorded.classes, reference.classes)).sum()
    assert difference <= 2  # the engine may label an image otherwise than FP32


def test_the_same_images_do_not_raise_the_index(server: Running, originals: Pixels) -> None:
    _send(server, originals)
    drift = _drift(server)
    assert set(drift) == {"labels", "confidence"}
    assert max(drift.values()) < 0.01


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda pixels: cv2.GaussianBlur(pixels, None, 4), id="blurred"),
        pytest.param(lambda pixels: 255 - pixels, id="inverted"),
    ],
)
def test_images_of_another_kind_raise_the_index_past_the_alert(
    server: Running, originals: Pixels, change: Callable[[Pixels], Pixels]
) -> None:
    _send(server, [change(pixels) for pixels in originals])
    assert max(_drift(server).values()) > ALERT


def test_one_class_alone_raises_the_index_of_the_labels(server: Running, kit: Kit, originals: Pixels) -> None:
    zeros = originals[kit.verification.targets[: len(originals)] == 0]
    _send(server, [*zeros] * (LEAST_IMAGES // len(zeros) + 1))
    assert _drift(server)["labels"] > ALERT


def test_few_images_tell_nothing(server: Running, originals: Pixels) -> None:
    _send(server, originals[: LEAST_IMAGES - 1])
    assert _drift(server) == {}


def test_labels_and_confidence_are_counted(server: Running, kit: Kit, originals: Pixels) -> None:
    _send(server, originals)
    samples = {
        (sample.name, sample.labels.get("label") or sample.labels.get("le")): sample.value
        for family in text_string_to_metric_families(server.client.get("/metrics").text)
        for sample in family.samples
        if sample.name.startswith(("trimrt_predictions", "trimrt_confidence"))
    }
    recorded = read_manifest(Path(server.service.settings.engine)).evidence.predictions
    for label, count in zip(kit.student.labels, recorded.classes, strict=True):
        assert samples["trimrt_predictions_total", label] == count
    assert samples["trimrt_confidence_bucket", "+Inf"] == len(originals)
    assert samples["trimrt_confidence_count", None] == len(originals)
    assert 0.8 * len(originals) < samples["trimrt_confidence_sum", None] <= len(originals)
    stats = server.client.get("/stats").json()["engines"][0]["predictions"]
    assert stats["images"] == sum(stats["labels"].values()) == len(originals)


def test_an_old_manifest_is_read_on_and_has_no_drift(
    package: Path, tmp_path: Path, originals: Pixels
) -> None:
    folder = tmp_path / package.name
    folder.mkdir()
    for file in package.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    text = (folder / "manifest.json").read_text("utf-8")
    old, changes = re.subn(r'"predictions":\s*\{[^}]*\}', '"predictions":null', text)
    assert changes == 1
    (folder / "manifest.json").write_text(old.replace('"predictions":null', '"power":null', 1), "utf-8")
    with running(Settings(engine=str(folder), engine_dir=tmp_path, port=0)) as it:
        _send(it, originals)
        assert _drift(it) == {}


@pytest.mark.parametrize("count", [-1, 10**30])
def test_counts_that_cannot_be_are_refused_with_the_manifest(count: int) -> None:
    with pytest.raises(ValidationError):
        Predictions(classes=[count, 5], confidence=[0] * 9)


# --- counting -------------------------------------------------------------------------------------------


def _manifest(package: Path, classes: int, expected: Predictions | None) -> Manifest:
    manifest = read_manifest(package)
    assert manifest.evidence is not None
    evidence = manifest.evidence.model_copy(update={"predictions": expected})
    labels = [f"label {number}" for number in range(classes)]
    return manifest.model_copy(update={"labels": labels, "evidence": evidence})


def _certain(classes: Sequence[int], of: int) -> np.ndarray:
    """Probabilities by which each image is of its class for sure."""
    return np.eye(of, dtype=np.float32)[np.array(classes)]


def test_of_many_classes_the_most_frequent_are_told_apart(package: Path) -> None:
    expected = Predictions(classes=[1] * 90 + [100] * 10, confidence=[0] * 8 + [1090])
    counted = Counted(_manifest(package, 100, expected))
    counted.add(_certain([99, 99, 50, 3], 100))
    counted.settle()
    labels = counted.by_label()
    assert len(labels) == 20
    assert labels["label 99"] == 2
    assert labels["label 3"] == 1  # of those that are as rare, the first are told apart
    assert labels[OTHERS] == 1


def test_recent_images_alone_make_the_index(package: Path) -> None:
    expected = Predictions(classes=[500, 500], confidence=[0] * 8 + [1000])
    counted = Counted(_manifest(package, 2, expected))

    def index_after(images: Sequence[int]) -> float:
        counted.add(_certain(images, 2))
        counted.settle()
        return counted.drift()["labels"]

    assert index_after([0] * 1000) > ALERT
    assert index_after([0, 1] * 499) > 0.05
    assert index_after([0, 1]) < 0.01


def test_counts_of_several_processes_add_up(package: Path) -> None:
    expected = Predictions(classes=[500, 500], confidence=[0] * 8 + [1000])
    one, other = (Counted(_manifest(package, 2, expected)) for _ in range(2))
    one.add(_certain([0] * 60, 2))
    other.add(_certain([1] * 60, 2))
    assert one.drift() == {}
    one.merge(other)
    assert one.by_label() == {"label 0": 60, "label 1": 60}
    assert one.drift()["labels"] < 0.01
    assert other.images == 60


def test_what_was_added_is_counted_before_it_takes_much_memory(package: Path) -> None:
    counted = Counted(_manifest(package, 1000, None))
    for _ in range(300):
        counted.add(_certain([7], 1000))
    assert counted.images > 250


def test_a_bin_holds_its_upper_bound() -> None:
    counts = predictions_of(np.log(np.array([[0.8, 0.2], [0.81, 0.19]], np.float32)), "softmax").confidence
    assert counts[CONFIDENCES.index(0.8)] == 1
    assert sum(counts) == 2


def test_the_index_is_that_of_the_textbook() -> None:
    expected, observed = np.array([5000, 5000]), np.array([9000, 1000])
    textbook = 0.4 * np.log(0.9 / 0.5) + (0.1 - 0.5) * np.log(0.1 / 0.5)
    assert stability_index(expected, observed) == pytest.approx(textbook, rel=1e-3)
    assert stability_index(expected, expected) == 0
    assert stability_index(expected, np.array([99, 0])) is None


def test_groups_add_up() -> None:
    counts = np.arange(30)
    assert grouped(counts, classes_apart(None, 30)).sum() == counts.sum()
    assert grouped(counts, np.arange(30)).tolist() == counts.tolist()
