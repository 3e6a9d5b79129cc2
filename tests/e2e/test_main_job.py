"""The main job, as a user does it: the shipped student is built, served, and asked about every test image."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from processes import TRIMRT, Started, start_process
from running import running
from wrapped_engine import load_wrapped

from builder.compile.verification import engine_logits
from models.card import Card, read_card
from models.datasets import DataSplit, ImageSet, open_dataset
from models.preprocessing import Preprocessing
from models.pretrained import DIGITS_STUDENT
from runtime.loading import load_engine
from runtime.manifest import read_manifest
from server.settings import Settings


@pytest.fixture(scope="module")
def card() -> Card:
    return read_card(DIGITS_STUDENT)


@pytest.fixture(scope="module")
def test_images(card: Card, data: DataSplit) -> ImageSet:
    return open_dataset(card.dataset.source, fold=card.dataset.fold or 0).test


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, data: DataSplit) -> tuple[Path, str]:
    """The engine directory that the demonstration fills, and what it prints."""
    folder = tmp_path_factory.mktemp("demo")
    done = run_demo(folder)
    assert done.returncode == 0, done.stderr
    return folder / "engines", done.stdout


def run_demo(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [TRIMRT, "demo", "--engine-dir", str(folder / "engines")],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.fixture(scope="module")
def int8(demo: tuple[Path, str]) -> Path:
    return demo[0] / "digits-resnet18-int8-openvino"


@pytest.fixture(scope="module")
def served(int8: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    log = tmp_path_factory.mktemp("serve") / "log"
    options = ["--engine", str(int8), "--engine-dir", str(log.parent), "--log-format", "json"]
    with start_process(options, log) as started:
        yield started


def test_the_demo_shows_prediction_latency_and_comparison(demo: tuple[Path, str], card: Card) -> None:
    _, printed = demo
    assert re.search(r"prediction +0 \(\d+\.\d%\), .*; the image shows a 0", printed)
    assert re.search(r"latency +decode \d.*queue \d.*inference \d.*total \d.* ms", printed)
    for row in ("teacher resnet50", "student resnet18", "pruned resnet18", "fp32 engine", "fp16 engine"):
        assert row in printed
    assert re.search(rf"int8 engine +{card.metrics.parameters / 1e6:.2f} M ", printed)
    assert re.search(r"trimrt serve --engine \S+-int8-openvino starts the server", printed)


@pytest.mark.slow
def test_a_second_demo_builds_nothing_anew(demo: tuple[Path, str]) -> None:
    directory, _ = demo
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()}
    done = run_demo(directory.parent)
    assert done.returncode == 0, done.stderr
    assert "built already: fp32, fp16, int8" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file()} == before


def test_weights_shrink_as_promised(demo: tuple[Path, str]) -> None:
    sizes = {}
    for precision in ("fp32", "fp16", "int8"):
        evidence = read_manifest(demo[0] / f"digits-resnet18-{precision}-openvino").evidence
        assert evidence is not None
        sizes[precision] = evidence.weights_bytes
    assert sizes["fp32"] >= 1.95 * sizes["fp16"]
    assert sizes["fp32"] >= 3.9 * sizes["int8"]


def test_int8_is_as_accurate_as_promised(int8: Path, test_images: ImageSet, card: Card) -> None:
    with closing(load_engine(int8)) as engine:
        labels = engine_logits(engine, test_images.load_pixels(engine.manifest.preprocessing)).argmax(axis=1)
    accuracy = np.mean(labels == test_images.targets)
    assert len(labels) == 360
    assert accuracy >= 0.989
    assert accuracy >= card.metrics.accuracy - 0.003


def test_the_server_says_what_the_evaluation_says_for_every_test_image(
    served: Started, int8: Path, test_images: ImageSet
) -> None:
    with closing(load_engine(int8)) as engine:
        logits = engine_logits(engine, test_images.load_pixels(engine.manifest.preprocessing))
        expected = [engine.manifest.labels[index] for index in logits.argmax(axis=1)]
    answers = []
    with httpx.Client(base_url=served.url, timeout=30) as client:
        for start in range(0, len(test_images), 60):
            paths = test_images.paths[start : start + 60]
            files = [("file", (path.name, path.read_bytes())) for path in paths]
            results = client.post("/predict", files=files).raise_for_status().json()["results"]
            answers += [result["predictions"][0]["label"] for result in results]
    assert answers == expected


def test_the_engine_is_described_as_it_is_served(served: Started, int8: Path) -> None:
    shown = subprocess.run([TRIMRT, "inspect", str(int8), "--json"], capture_output=True, check=True).stdout
    engines = httpx.get(f"{served.url}/engines").json()
    (entry,) = engines["engines"]
    manifest = json.loads(shown)
    assert {key: entry[key] for key in ("name", "version", "backend", "precision")} == {
        key: manifest[key] for key in ("name", "version", "backend", "precision")
    }


def write_pictures(folder: Path) -> list[Path]:
    """One upright scene, in every accepted format and every EXIF orientation."""
    folder.mkdir()
    scene = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    image = Image.fromarray(scene).resize((90, 70), Image.Resampling.BICUBIC)
    for form in ("PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG"):
        image.save(folder / f"{form.lower()}.{form.lower()}", form)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(folder / f"exif{orientation}.jpeg", "JPEG", exif=exif)
        image.save(folder / f"exif{orientation}.png", "PNG", exif=exif)
    image.convert("CMYK").save(folder / "cmyk.jpeg", "JPEG")
    image.convert("L").save(folder / "grey.jpeg", "JPEG")
    image.convert("RGBA").save(folder / "alpha.png", "PNG")
    image.convert("P").save(folder / "palette.png", "PNG")
    Image.fromarray(scene[:, :, 0].astype(np.uint16) * 257).save(folder / "sixteen.png", "PNG")
    return sorted(folder.iterdir())


def test_the_servers_tensor_is_the_evaluations_byte_for_byte(int8: Path, tmp_path: Path) -> None:
    paths = write_pictures(tmp_path / "scene")
    spec: Preprocessing = read_manifest(int8).preprocessing
    evaluated = ImageSet(
        name="pictures",
        root=tmp_path,
        paths=tuple(paths),
        digests=("",) * len(paths),
        targets=np.zeros(len(paths), np.int64),
        labels=("scene",),
        cache_dir=tmp_path,
    ).load_pixels(spec)
    seen: list[bytes] = []

    def record(pixels: np.ndarray, _alone: bool) -> None:
        seen.extend(row.tobytes() for row in pixels)

    with running(Settings(engine=str(int8), port=0), load_wrapped(record, on_cpu=True)) as server:
        for path in paths:
            server.predict(path.read_bytes(), f"image/{path.suffix[1:]}").raise_for_status()
    assert seen == [row.tobytes() for row in evaluated]


def test_python_dash_m_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "trimrt", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("trimrt, version ")
