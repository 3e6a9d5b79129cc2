"""Settings that nobody chose fit the machine: photographs on a CPU get networks that it can train."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.defaults import fit_recipe, pretrained_weights
from models.recipe import Recipe, Settings, make_recipe

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where torch would keep pretrained weights; it is empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path


def fitted(
    settings: Settings | None = None, *, side: int = 300, images: int = 480, device: torch.device = CPU
) -> Recipe:
    return fit_recipe(make_recipe(overrides=settings), side=side, images=images, device=device)


def test_photographs_on_a_cpu_get_a_small_teacher_small_inputs_and_small_batches() -> None:
    recipe = fitted()
    assert (recipe.image.size, recipe.teacher.architecture) == (128, "resnet34")
    sections = (recipe.teacher, recipe.student, recipe.pruning)
    assert {section.batch_size for section in sections} == {16}


@pytest.mark.parametrize("side", [8, 24, 28, 32])
@pytest.mark.parametrize("device", [CPU, GPU])
def test_small_images_keep_the_recipes_own_defaults(side: int, device: torch.device) -> None:
    """The recorded results are of handwritten digits and of pieces of clothing, 8 and 28 pixels wide."""
    assert fitted(side=side, device=device) == Recipe()


def test_a_gpu_keeps_them_for_photographs_too() -> None:
    assert fitted(device=GPU) == Recipe()


def test_what_the_user_chose_stays() -> None:
    chosen: Settings = {
        "image": {"size": 224},
        "teacher": {"architecture": "resnet50", "epochs": 40, "batch_size": 64, "learning_rate": 1.5e-3},
        "distillation": {"views": 24},
    }
    recipe = fitted(chosen)
    assert recipe.image.size == 224
    assert recipe.teacher == Recipe().teacher  # its defaults, but asked for
    assert recipe.distillation.views == 24
    assert recipe.student.batch_size == 8  # such large images


def test_presets_choose_too() -> None:
    recipe = fit_recipe(make_recipe(preset="quick"), side=300, images=480, device=CPU)
    assert (recipe.teacher.epochs, recipe.student.epochs, recipe.distillation.views) == (8, 8, 8)
    assert recipe.teacher.architecture == "resnet34"


def test_small_photographs_keep_their_size_up_to_what_is_as_much_work() -> None:
    assert fitted(side=48).image.size == 48
    assert fitted(side=90).image.size == 64


def test_a_network_of_fixed_input_size_keeps_it() -> None:
    recipe = fitted({"teacher": {"architecture": "vit_b_16"}, "image": {"stem": "standard"}})
    assert recipe.image.size is None


def test_more_images_are_looked_at_less_often() -> None:
    epochs = [fitted(images=images).teacher.epochs for images in (100, 1000, 2000, 100_000)]
    assert epochs[0] == epochs[1] > epochs[2] > epochs[3] >= 4


def test_weights_that_something_downloaded_are_where_the_teacher_begins(hub: Path) -> None:
    file = pretrained_weights("resnet34")
    assert file is not None
    assert file.is_relative_to(hub)
    file.parent.mkdir(parents=True)
    file.touch()
    scratch, recipe = Recipe().teacher, fitted()
    assert recipe.teacher.weights == file
    assert recipe.teacher.epochs < scratch.epochs
    assert recipe.teacher.learning_rate < scratch.learning_rate
    assert fitted({"teacher": {"epochs": 99}}).teacher.epochs == 99
    assert fitted({"teacher": {"weights": "mine.pth"}}).teacher.weights == Path("mine.pth")
    assert fitted(side=24).teacher.weights is None


def test_a_teacher_that_begins_with_weights_keeps_the_architecture_that_they_are_of() -> None:
    recipe = fitted({"teacher": {"weights": "resnet50.pth"}})
    assert recipe.teacher.architecture == Recipe().teacher.architecture
