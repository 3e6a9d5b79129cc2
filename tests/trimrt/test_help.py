"""Help and refusals of the command line: examples that run, defaults, and what may have been meant."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from tiny_engine import write_package

from builder.finding import MissingSourceError, find_source
from models.card import CARD_NAME, read_card
from models.pretrained import DIGITS_STUDENT
from runtime.keys import new_key
from runtime.manifest import MANIFEST_NAME, read_manifest
from server.settings import Settings
from trimrt.cli import COMMANDS, main
from trimrt.options import Command
from trimrt.report.discovery import locate


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command as it is typed, those of groups too."""
    context = click.Context(main)
    for name in COMMANDS:
        command = main.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from ((f"{name} {inner}", each) for inner, each in command.commands.items())
        else:
            yield name, command


ALL = dict(commands())


def help_of(name: str) -> str:
    """As on a terminal of 80 columns."""
    result = CliRunner().invoke(main, [*name.split(), "--help"], terminal_width=80)
    assert result.exit_code == 0
    return result.output


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what the examples name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "model.onnx").write_bytes(b"")
    for key in ("builder.key", "other.key"):
        new_key(tmp_path / key)
    for name in ("photos/one.png", "7.png"):
        Image.new("RGB", (48, 48)).save(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("name", ALL)
def test_help_ends_with_examples_that_the_command_takes(name: str, place: Path) -> None:
    command = ALL[name]
    assert isinstance(command, Command)
    shown = help_of(name).rstrip().rpartition("\nExamples:\n")[2].splitlines()
    assert [line.strip() for line in shown] == list(command.examples)
    assert 1 <= len(shown) <= 3
    for example in command.examples:
        words = shlex.split(example)
        assert words[: 1 + len(name.split())] == ["trimrt", *name.split()]
        command.make_context(name, words[1 + len(name.split()) :])


@pytest.mark.parametrize("name", ["", *ALL])
def test_help_fits_80_columns(name: str) -> None:
    assert [line for line in help_of(name).splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("name", ALL)
def test_every_option_has_a_text(name: str) -> None:
    options = [each for each in ALL[name].params if isinstance(each, click.Option)]
    assert [option.opts for option in options if not option.help] == []


def test_defaults_of_nought_and_no_are_shown_too() -> None:
    words = " ".join(help_of("serve").split())
    for variable, default in (
        ("MAX_BATCH_DELAY_MS", "0.0"),
        ("WATCH", "off"),
        ("CUDA_GRAPHS", "on"),
        ("QUEUE_LIMIT", "128"),
    ):
        assert f"[TRIMRT_{variable}; default: {default}]" in words
    words = " ".join(help_of("build").split())
    assert re.search(r"--seed INTEGER Selects the images\. \[default: 0\]", words)
    assert re.search(r"--sparsity / --no-sparsity [^\[]* \[default: off\]", words)


def test_what_a_setting_is_one_of_is_shown() -> None:
    words = " ".join(help_of("serve").split())
    assert "--log-format [auto|json|text]" in words
    assert "--cuda [cuda-bindings|pycuda]" in words
    assert set(Settings.model_fields) == {option.name for option in ALL["serve"].params}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("biuld x", "no such command: biuld (did you mean build?)"),
        ("cluster confg", "Did you mean 'config'?"),
        ("build x --precison int8", "'--precision'?"),
        ("build x --precision itn8", "'itn8' (did you mean int8?): choose from fp32"),
        ("build x --target opnvino", "(did you mean openvino?)"),
        ("serve --log-format jsn", "(did you mean json?)"),
        ("compress digits --preset quik", "(did you mean quick?)"),
        ("compress digitz", "no data set 'digitz' (did you mean digits?); give digits"),
        ("compress fotos", "no such file or folder: fotos (did you mean photos?); give digits"),
        ("compress photos/one.png", "photos/one.png is a file; give digits"),
        ("build modle.onnx --data photos", "no such file or folder: modle.onnx (did you mean model.onnx?)"),
        ("build nowhere/model.onnx", "nowhere/model.onnx; there is no folder nowhere"),
        ("build digits-resnet81", "no checkpoint 'digits-resnet81' in runs (did you mean digits-resnet18?)"),
        ("build engines/tiny-v1", "engines/tiny-v1 is an engine package; name what it was built from"),
        ("build timm:resnet81 --weights pretrained --data photos", "(did you mean resnet18?)"),
        ("build torchvision:resnet81 --weights pretrained --data photos", "(did you mean resnet18?)"),
        ("compress digits --teacher-architecture ResNet05", "'ResNet05' (did you mean resnet50?)"),
        ("inspect tinny", "no engine 'tinny' in engines (did you mean tiny?)"),
        ("inspect engines/tiny-v2", "no such file or folder: engines/tiny-v2 (did you mean tiny-v1?)"),
        ("serve --engine tinny", "(did you mean tiny?)"),
        ("bench tinny", "(did you mean tiny?)"),
        ("export-triton tinny repository", "(did you mean tiny?)"),
        ("predict photos --engine tinny --out a.csv", "(did you mean tiny?)"),
        ("predict fotos --engine tiny --out a.csv", "no such file or folder: fotos (did you mean photos?)"),
        ("report tinny", "(did you mean tiny?)"),
        ("loadtest --images fotos", "(did you mean photos?)"),
    ],
    ids=lambda value: value if value.startswith(tuple(COMMANDS)) or "biuld" in value else "",
)
def test_what_may_have_been_meant_is_said(
    arguments: str, says: str, place: Path, trimrt: Callable[..., Result], data: object
) -> None:
    write_package(place / "engines")

    result = trimrt(*arguments.split())

    assert result.exit_code in (1, 2)
    assert says in " ".join(result.output.split())


def test_of_many_only_the_first_are_listed(place: Path, trimrt: Callable[..., Result]) -> None:
    manifest = read_manifest(write_package(place / "engines", "engine-00"))
    for number in range(1, 12):
        folder = place / "engines" / f"{number}"
        folder.mkdir()
        other = manifest.model_copy(update={"name": f"engine-{number:02d}"})
        (folder / MANIFEST_NAME).write_text(other.model_dump_json())

    said = " ".join(trimrt("inspect", "other").output.split())

    assert "(it holds engine-00, engine-01" in said
    assert "engine-09, 2 more)" in said


def test_an_engine_is_named_by_its_name_or_its_folder(place: Path, trimrt: Callable[..., Result]) -> None:
    folder = write_package(place / "packages")

    by_folder = trimrt("inspect", folder, "--json")
    by_name = trimrt("inspect", "tiny", "--engine-dir", "packages", "--json")

    assert by_folder.exit_code == by_name.exit_code == 0
    assert by_folder.output == by_name.output
    for command in (
        ["bench", "tiny", "--seconds", 0.01, "--warm-up", 0, "--batch", 1],
        ["export-triton", "tiny", "repository"],
        ["predict", "7.png", "--engine", "tiny", "--out", "seven.csv"],
    ):
        result = trimrt(*command, "--engine-dir", "packages")
        assert result.exit_code == 0, result.output
        assert "tiny" in result.output
    assert locate("tiny", place / "packages") == Path(folder)


def test_a_checkpoint_is_named_by_its_folder_its_run_or_its_name(place: Path) -> None:
    assert find_source("digits-resnet18") == str(DIGITS_STUDENT)
    assert find_source("torchvision:resnet18") == "torchvision:resnet18"
    card = read_card(DIGITS_STUDENT)
    for run, stage, name in (
        ("photos-fold0", "teacher", "photos-resnet50"),
        ("photos-fold0", "pruned", "photos-resnet18"),
        ("photos-fold1", "teacher", "photos-resnet50"),
    ):
        folder = place / "runs" / run / stage
        folder.mkdir(parents=True)
        (folder / CARD_NAME).write_text(card.model_copy(update={"name": name}).model_dump_json())

    for name in ("photos-resnet18", "photos-fold0", "runs/photos-fold0", "runs/photos-fold0/pruned"):
        assert find_source(name) == "runs/photos-fold0/pruned"
        assert locate(name, Path("engines")) in (Path("runs/photos-fold0/pruned"), Path(name))
    assert find_source("photos-fold1") == "runs/photos-fold1/teacher"
    with pytest.raises(
        MissingSourceError, match="several checkpoints are called photos-resnet50; choose: runs/"
    ):
        find_source("photos-resnet50")
