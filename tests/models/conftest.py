"""Small real data for the tests of `models`: a part of the handwritten digits, as image files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
import torch
from click.testing import CliRunner
from shared import build_once
from short_run import SHORT

from models.card import Card, Metrics
from models.datasets import DataSplit, open_dataset
from models.inputs import choose_inputs
from models.preprocessing import Preprocessing
from models.recipe import Recipe
from models.training import Images
from trimrt.cli import main

# Networks and batches are tiny here: a second thread would only wait for the first.
torch.set_num_threads(1)
pillow_heif.register_heif_opener()  # to write them


@pytest.fixture(scope="session")
def few_digits(data: DataSplit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with 16 training and 4 test images of each of the digits 0, 1 and 2."""

    def build(folder: Path) -> None:
        for part, images, count in (("train", data.train, 16), ("test", data.test, 4)):
            for target in range(3):
                directory = folder / part / images.labels[target]
                directory.mkdir(parents=True)
                for index in np.flatnonzero(images.targets == target)[:count]:
                    shutil.copy(images.paths[index], directory)

    return build_once(tmp_path_factory, "few-digits", build)


@pytest.fixture(scope="session")
def finished(few_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder of a finished run, not to be changed, and what it printed."""

    def build(folder: Path) -> None:
        result = CliRunner().invoke(main, ["compress", str(few_digits), "--out", str(folder / "run"), *SHORT])
        assert result.exit_code == 0, result.output
        (folder / "printed.txt").write_text(result.output, encoding="utf-8")

    folder = build_once(tmp_path_factory, "finished", build)
    return folder / "run", (folder / "printed.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def split(few_digits: Path, cache_dir: Path) -> DataSplit:
    return open_dataset(str(few_digits), cache_dir=cache_dir)


@pytest.fixture(scope="session")
def spec(split: DataSplit) -> Preprocessing:
    return choose_inputs(split.train, Recipe())[0]


@pytest.fixture(scope="session")
def train_images(split: DataSplit, spec: Preprocessing) -> Images:
    return Images(split.train.load_pixels(spec), split.train.targets)


@pytest.fixture(scope="session")
def validation_images(split: DataSplit, spec: Preprocessing) -> Images:
    return Images(split.validation.load_pixels(spec), split.validation.targets)


@pytest.fixture
def card(split: DataSplit, spec: Preprocessing) -> Card:
    """A valid card for a ResNet18 with the small stem; its metrics are not of any real training."""
    return Card(
        name="few-digits-resnet18",
        role="pruned",
        architecture="resnet18",
        stem="small",
        labels=list(split.labels),
        preprocessing=spec,
        dataset=split.card(),
        metrics=Metrics(
            accuracy=1.0,
            validation_accuracy=1.0,
            loss=0.0,
            wrong=0,
            images=12,
            parameters=1,
            macs=1,
            live_parameters=1.0,
        ),
        seed=0,
        recipe={},
        command="trimrt compress few-digits",
        versions={},
    )
