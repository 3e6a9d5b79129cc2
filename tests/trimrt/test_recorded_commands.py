"""The commands that manifests and cards record do again what was done, whatever the options were."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

import trimrt.compress
from builder import BuildOptions, Gate, PrepareOptions, TensorRTOptions
from builder.rebuilding import build_command, prepare_command
from models.recipe import PRESETS, Recipe, as_options, make_recipe
from runtime.manifest import BatchSizes

EVERY_PREPARE_OPTION = PrepareOptions(
    data="my photos",
    calibration="max",
    calibration_images=7,
    verification_images=8,
    seed=3,
    correction=False,
    rounding=False,
    sensitivity=False,
    qat=True,
    qat_epochs=2,
    qat_learning_rate=1e-4,
    name="mine",
    unlabelled=True,
    on_damaged="skip",
    preprocess="imagenet",
    resize="squash",
    interpolation="bicubic",
    image_size="48x192",
    output_name="scores",
    activation="sigmoid",
    allow_low_accuracy=True,
    labels=Path("labels.txt"),
    weights="pretrained",
)
EVERY_TENSORRT_OPTION = TensorRTOptions(
    profiles=[BatchSizes(min=1, opt=1, max=1), BatchSizes(min=2, opt=4, max=16)],
    workspace_mib=512,
    optimization_level=5,
    aux_streams=0,
    profiling="detailed",
    tf32=False,
    sparsity=True,
    version_compatible=True,
    hardware_compatibility="ampere+",
    compute_capabilities=["8.6", "8.9"],
    dla_core=1,
)


@pytest.mark.parametrize(
    "options",
    [
        BuildOptions(),
        BuildOptions(batch=BatchSizes(min=2, opt=4, max=64), gate=Gate(max_drop=0.007, min_agreement=0.9)),
        BuildOptions(replace=True),
        BuildOptions(tensorrt=EVERY_TENSORRT_OPTION),
        BuildOptions(prepare=EVERY_PREPARE_OPTION),
    ],
    ids=["defaults", "batch and gate", "replacing", "TensorRT", "preparation"],
)
def test_a_package_is_built_again_with_the_same_options(
    options: BuildOptions, trimrt: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Path, BuildOptions]] = []
    monkeypatch.setattr("trimrt.build.build_packages", lambda *arguments: calls.append(arguments[:3]))
    command = build_command("my student", Path("my engines"), options, "best", "tensorrt-rtx")

    result = trimrt(*shlex.split(command)[1:])

    assert result.exit_code == 0, result.output
    ((source, output, parsed),) = calls
    assert (source, output) == ("my student", Path("my engines"))
    assert (parsed.precisions, parsed.target) == (("best",), "tensorrt-rtx")
    assert (parsed.batch, parsed.tensorrt, parsed.prepare) == (
        options.batch,
        options.tensorrt,
        options.prepare,
    )
    assert parsed.gate.max_drop == pytest.approx(options.gate.max_drop)
    assert parsed.gate.min_agreement == pytest.approx(options.gate.min_agreement)


def test_a_kit_is_made_again_with_the_same_options(
    trimrt: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    class MadeError(Exception):
        """Ends the command where the kit would be made."""

    def make_kit(*arguments: object, **options: object) -> None:
        raise MadeError(*arguments, options["precisions"], list(options["targets"]))

    monkeypatch.setattr("trimrt.prepare.make_kit", make_kit)
    command = prepare_command("student", Path("kit"), ["fp16"], ["tensorrt"], EVERY_PREPARE_OPTION)

    made = trimrt(*shlex.split(command)[1:]).exception

    assert made.args == ("student", Path("kit"), EVERY_PREPARE_OPTION, ("fp16",), ["tensorrt"])


@pytest.mark.parametrize("preset", PRESETS)
def test_a_recipe_is_the_options_that_make_it(preset: str) -> None:
    changes = {"teacher": {"weights": "weights.pth"}, "augmentation": {"flip": False}, "seed": 5}
    recipe = make_recipe(preset=preset, overrides=changes)
    words = ["digits", *as_options(recipe, Recipe())]
    values = trimrt.compress.compress.make_context("compress", words).params
    given = {name: value for name, value in values.items() if "__" in name or name in ("seed", "threads")}
    assert make_recipe(overrides=trimrt.compress._overrides(given)) == recipe
