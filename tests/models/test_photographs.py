"""A maker's photographs, in the ZIP file that a phone made of them, become an engine by one command."""

from __future__ import annotations

import os
import re
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image
from processes import TRIMRT

from runtime.manifest import read_manifest

COLOURS = {"Himmel": (90, 140, 220), "Wiese": (70, 160, 60), "Ziegel": (170, 80, 60)}
BRIEFLY = (
    *("--preset", "quick", "--image-size", "32", "--image-stem", "small", "--threads", "2"),
    *("--teacher-architecture", "resnet18", "--teacher-epochs", "2", "--student-epochs", "2"),
    *("--pruning-epochs", "1", "--distillation-views", "2"),
)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty photographs, every other one in HEIC, and what phones and Macs leave beside them."""
    folder = tmp_path_factory.mktemp("phone")
    random = np.random.default_rng(0)
    path = folder / "Urlaub.zip"
    with zipfile.ZipFile(path, "w") as opened:
        for label, colour in COLOURS.items():
            for number in range(20):
                grain = random.normal(0, 25, (120, 160, 3))
                image = Image.fromarray(np.clip(grain + colour, 0, 255).astype(np.uint8))
                picture = folder / f"IMG_{number:04}.{'HEIC' if number % 2 else 'jpg'}"
                if number % 2:
                    pillow_heif.from_pillow(image).save(picture, quality=50)
                else:
                    image.save(picture)
                opened.write(picture, f"Urlaub/{label}/{picture.name}")
            opened.writestr(f"__MACOSX/Urlaub/{label}/._IMG_0000.jpg", b"\0\5\x16\7")
        opened.writestr("Urlaub/.DS_Store", b"\0")
    return path


@pytest.fixture(scope="module")
def done(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where the command was called, and what it printed."""
    place = tmp_path_factory.mktemp("maker")
    ran = subprocess.run(
        [TRIMRT, "compress", str(archive), "--build", *BRIEFLY],
        cwd=place,
        env={**os.environ, "TRIMRT_CACHE": str(place / "cache"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return place, ran.stdout


@pytest.mark.slow
def test_the_engine_is_there_and_knows_the_classes(done: tuple[Path, str]) -> None:
    manifest = read_manifest(done[0] / "engines/urlaub-resnet18-int8-openvino")
    assert manifest.labels == list(COLOURS)


@pytest.mark.slow
def test_what_was_found_is_told_once(done: tuple[Path, str]) -> None:
    _, printed = done
    assert printed.count("Urlaub: 60 images, of 3 classes") == 1
    assert printed.count("files and folders of operating systems and programs") == 1


@pytest.mark.slow
def test_the_time_is_estimated_and_the_next_step_named(done: tuple[Path, str]) -> None:
    place, printed = done
    assert re.search(r"this will take about .*, pruned .*, engine \d+ ", printed)
    (took,) = re.finditer(r"this took .*; about .* were estimated", printed)
    assert took.start() > printed.index("Pruning took"), "the engine's time is part of it"
    command = re.search(r"Next:  trimrt serve --engine (\S+)", printed)
    assert command is not None
    assert (place / command[1] / "manifest.json").is_file()


def test_an_archive_alone_is_no_network_and_says_what_it_is_for(archive: Path, tmp_path: Path) -> None:
    words = [TRIMRT, "build", str(archive)]
    ran = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode != 0
    assert f"`trimrt compress {archive} --build` makes an engine" in " ".join(ran.stderr.split())
