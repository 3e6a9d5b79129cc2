"""What a user can put right is a message, not a traceback, and the message names options that exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from click.testing import Result

import builder
import models
import runtime
import server
import trimrt as command_line
from models.preprocessing import DamagedImageError, ImageTooLargeError, UnsupportedImageError
from server.problems import image_problem
from trimrt.cli import COMMANDS, main

PACKAGES = (models, runtime, builder, server, command_line)

ROOT = Path(command_line.__path__[0]).parent

FOREIGN = {
    "--backend-config": "tritonserver",
    "--gpus": "docker run",
    "--group-add": "docker run",
    "--head": "ray start",
    "--model": "optimum-cli",
    "--model-repository": "tritonserver",
    "--rm": "docker run",
    "--runtime": "docker run",
    "--saved-model": "python -m tf2onnx.convert",
    "--system-site-packages": "python -m venv",
    "--tflite": "python -m tf2onnx.convert",
}
"""Options of other programs that our texts name."""

COMMANDS_OF = {
    "models": {"compress", "prepare", "build", "report"},
    "builder": {"prepare", "build", "compress"},  # `compress --teacher`
    "server": {"serve"},
}
"""The commands that show a package's messages; those of the others may be shown by all."""


def syntax_trees() -> Iterator[tuple[Path, ast.Module]]:
    for package in PACKAGES:
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def error_classes() -> list[tuple[str, list[str]]]:
    """Our public exceptions and the classes that each is derived from, by name."""
    return [
        (node.name, [ast.unparse(base) for base in node.bases])
        for _, tree in syntax_trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        and not node.name.startswith("_")
        and any(re.search(r"(Error|Exception)$", ast.unparse(base)) for base in node.bases)
    ]


def test_every_error_has_the_one_base_and_a_name_of_its_own() -> None:
    classes = error_classes()
    names = [name for name, _ in classes]
    ours = {*names, "TrimRTError"}

    assert len(names) > 20
    assert len(set(names)) == len(names)
    assert {name for name, bases in classes if not ours.issuperset(bases)} == {
        "TrimRTError",
        "Problem",  # the server's answer itself, which is no user's error where it says internal-error
    }


def test_the_server_knows_the_problems_that_images_are() -> None:
    errors = (DamagedImageError, ImageTooLargeError, UnsupportedImageError)

    assert [image_problem(error("why"), 3).name for error in errors] == [
        "image-damaged",
        "image-too-large",
        "unsupported-media-type",
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["compress", "no-such-data"], "no-such-data"),
        (["prepare", "no-such-student", "-o", "kit"], "no such file or folder: no-such-student"),
        (["build", "no-such-student", "--target", "openvino"], "no such file or folder: no-such-student"),
        (["inspect", "no-such-engine"], "no engine 'no-such-engine' in engines (it holds none)"),
        (["bench", "no-such-engine"], "no engine 'no-such-engine'"),
        (["bench", "--tune", "no-such-engine"], "no engine 'no-such-engine'"),
        (["export-triton", "no-such-engine", "repository"], "no engine 'no-such-engine'"),
        (["predict", ".", "--engine", "no-such-engine", "--out", "a.parquet"], "no engine 'no-such-engine'"),
        (["report", "no-such-folder"], "no such file or folder: no-such-folder"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_every_command_says_what_is_wrong_without_a_traceback(
    arguments: list[str],
    says: str,
    trimrt: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)

    result = trimrt(*arguments)

    assert result.exit_code == 1
    assert result.output.lstrip().startswith("Error: ")
    assert says in " ".join(result.output.split())


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    code = (
        "import trimrt.inspect as command; command.resolve_package = lambda *names: 1 / 0;"
        "from trimrt.cli import COMMANDS, main; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "inspect", str(tmp_path)], capture_output=True, text=True, check=False
    )

    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "ZeroDivisionError" in result.stderr


def options_of(command: click.Command) -> set[str]:
    context = click.Context(command)
    options = {
        option
        for parameter in command.get_params(context)
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    if isinstance(command, click.Group):
        subcommands = [command.get_command(context, name) for name in command.list_commands(context)]
        options.update(*(options_of(subcommand) for subcommand in subcommands if subcommand))
    return options


def commands_that_show(path: Path) -> set[str]:
    """The commands whose user may read the texts in a module."""
    package, *inner = path.relative_to(ROOT).with_suffix("").parts
    own = {
        name
        for name, (target, _) in COMMANDS.items()
        if re.split(r"[.:]", target)[:2] == [package, *inner[:1]]
    }
    return own or COMMANDS_OF.get(package, set(COMMANDS))


def named_options() -> Iterator[tuple[str, set[str], str]]:
    """Each option that a string constant of the packages names, f-strings and docstrings included.

    A string that is nothing but the option is code, such as the option's own declaration.

    Yields:
        The option; the commands that it may belong to: in "`trimrt build --qat`" just `build`; the place.
    """
    for path, tree in syntax_trees():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                continue
            for match in re.finditer(r"(?<![\w-])--[a-z][\w-]*\w(?![\w-])", node.value):
                if match[0] == node.value:
                    continue
                typed = re.search(r"trimrt ([a-z-]+)[^`\n]*$", node.value[: match.start()])
                commands = {typed[1]} if typed else commands_that_show(path)
                yield match[0], commands, f"{path}:{node.lineno}"


def test_texts_name_only_options_that_their_reader_has() -> None:
    context = click.Context(main)
    options = {name: options_of(main.get_command(context, name) or main) for name in COMMANDS}
    named = list(named_options())
    unknown = [
        (option, place)
        for option, commands, place in named
        if not any(option in options[command] for command in commands)
    ]

    assert len(named) > 50
    assert [(option, place) for option, place in unknown if option not in FOREIGN] == []
    assert set(FOREIGN) == {option for option, _ in unknown}
