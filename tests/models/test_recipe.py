"""Recipes: presets, then a TOML file, then options; and errors that name the setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.recipe import PRESETS, Recipe, RecipeError, make_recipe


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_valid_recipe(preset: str) -> None:
    assert (make_recipe(preset=preset) == Recipe()) == (preset == "aligned")


def test_options_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text("seed = 7\n[pruning]\nratio = 0.5\nepochs = 9\n[teacher]\narchitecture = 'resnet34'\n")
    recipe = make_recipe(preset="aggressive", file=file, overrides={"pruning": {"epochs": 5}})
    assert (recipe.seed, recipe.teacher.architecture) == (7, "resnet34")
    aggressive = make_recipe(preset="aggressive").pruning
    assert recipe.pruning == aggressive.model_copy(update={"ratio": 0.5, "epochs": 5})


def test_a_recipe_survives_json() -> None:
    recipe = make_recipe(preset="report", overrides={"teacher": {"weights": "weights.pth"}})
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[pruning]\nratio = 1.5", r"pruning\.ratio: input should be less than 1, not 1\.5"),
        ("[pruning]\nration = 0.5", r"pruning\.ration: there is no such setting"),
        ("[teacher]\nepochs = 'many'", r"teacher\.epochs: .*integer.*, not 'many'"),
        ("[image]\nstem = 'huge'", r"image\.stem: input should be 'auto', 'standard' or 'small'"),
        ("seed = ", r"cannot read .*recipe\.toml"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(content)
    with pytest.raises(RecipeError, match=message):
        make_recipe(file=file)


def test_unknown_preset_and_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there are aligned, report"):
        make_recipe(preset="fastest")
    with pytest.raises(RecipeError, match="cannot read"):
        make_recipe(file=tmp_path / "nothing.toml")
