"""Networks from elsewhere: what the document says of them, and the command that measures it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.onnx_forms.forms import FORMS, nhwc
from experiments.onnx_forms.results import Results as FormResults
from experiments.onnx_forms.small_networks import SIDE
from experiments.own_models.networks import NETWORKS, OwnNetwork
from experiments.own_models.pictures import find, make
from experiments.own_models.results import Results, table
from experiments.own_models.trial import Place, Trial, try_network
from experiments.results import FOLDER


@pytest.fixture(scope="module")
def trials() -> list[Trial]:
    return Results.model_validate_json((FOLDER / "own-models.json").read_text(encoding="utf-8")).trials


def test_every_form_is_in_the_table_and_as_near_as_it_is_tested_to_be() -> None:
    results = FormResults.model_validate_json((FOLDER / "onnx-forms.json").read_text(encoding="utf-8"))
    assert [row.form for row in results.forms] == list(FORMS)
    assert all(row.difference <= FORMS[row.form].tolerance for row in results.forms)


def test_an_fp32_engine_gives_the_labels_of_the_original_for_every_picture(trials: list[Trial]) -> None:
    assert {trial.name for trial in trials} <= {network.name for network in NETWORKS}
    assert len(trials) >= 8
    assert len({trial.exporter for trial in trials}) >= 5
    for trial in trials:
        right = {engine.precision: engine.right for engine in trial.engines if engine.precision[:2] == "fp"}
        assert right["fp32"] == trial.pictures
        assert right["fp16"] >= 0.97 * trial.pictures


def test_an_int8_engine_that_is_published_labels_as_the_original_does(trials: list[Trial]) -> None:
    published = [
        engine.right / trial.pictures
        for trial in trials
        for engine in trial.engines
        if engine.precision == "int8" and engine.refused is None
    ]
    assert published
    assert min(published) >= 0.95


def test_the_pictures_that_are_drawn_are_always_the_same(tmp_path: Path) -> None:
    for folder in (tmp_path / "one", tmp_path / "two"):
        make("lines", tmp_path, folder)
    one, two = (find(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) > 100
    assert all(first.read_bytes() == second.read_bytes() for first, second in zip(one, two, strict=True))


@pytest.mark.slow
def test_a_network_is_built_by_the_documented_command_and_compared(tmp_path: Path) -> None:
    place = Place(tmp_path)
    pictures = place.pictures / "noise"
    pictures.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(24):
        pixels = random.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((SIDE, SIDE)).save(pictures / f"{number}.png")
    network = OwnNetwork(
        name="small",
        packages=(),
        write=lambda _packages, path: nhwc(path),
        pictures="noise",
        original=lambda picture: np.asarray(picture, np.float32) / 255,
        preprocess={"mean": 0, "std": 1, "resize": SIDE},
    )
    trial = try_network(network, place, ["fp32", "fp16", "int8"])
    assert trial.exporter.startswith("pytorch")
    fp32, fp16, *int8 = trial.engines
    assert trial.pictures == fp32.right == fp16.right == 24
    assert trial.command == "trimrt build model.onnx --preprocess preprocess.json"
    assert [engine.instruction_set for engine in int8] == ["all", "AVX2"]
    assert all(engine.refused or engine.right > 12 for engine in int8)
    results = Results.model_validate_json((FOLDER / "own-models.json").read_text(encoding="utf-8"))
    assert "small" in table(results.model_copy(update={"trials": [trial]}))
