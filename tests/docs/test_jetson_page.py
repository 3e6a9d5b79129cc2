"""docs/jetson.md: every command that it tells a newcomer to type exists, with every option."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from fastapi.routing import APIRoute
from jetson_files import ORIN_NANO, write_files
from starlette.routing import Mount

from runtime.jetson import power
from server.app import create_app
from server.settings import Settings
from trimrt.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/jetson.md").read_text(encoding="utf-8")
DOCKERFILE = (ROOT / "Dockerfile.jetson").read_text(encoding="utf-8")
SYSTEM = {"cat", "export", "jetson_clocks", "mkdir", "nvpmodel", "python3", "stat"}  # of Linux and JetPack
STANDING = {"run", "stand-in", "reported", "open", "estimate"}


def typed() -> list[list[str]]:
    """The commands, each as its words."""
    commands = []
    for block in re.findall(r"^```console\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE):
        joined = block.replace("\\\n", " ")
        commands += [shlex.split(line[2:]) for line in joined.splitlines() if line.startswith("$ ")]
    return [words[1:] if words[0] == "sudo" else words for words in commands]


def trimrt_commands() -> list[list[str]]:
    """What is given to `trimrt`, in an image or not."""
    found = []
    for words in typed():
        images = [place for place, word in enumerate(words) if re.fullmatch(r"trimrt:[\w-]+", word)]
        if words[:2] == ["docker", "run"]:
            found.append(words[images[0] + 1 :])
        elif Path(words[0]).name == "trimrt":
            found.append(words[1:])
    return found


def builds() -> list[list[str]]:
    return [words for words in typed() if words[:2] == ["docker", "build"]]


def measuring() -> list[list[str]]:
    """Containers whose figures depend on the power mode."""
    commands = [words for words in typed() if words[:2] == ["docker", "run"]]
    return [words for words in commands if {"selftest", "build"} & set(words)]


def test_the_page_has_the_whole_hour() -> None:
    assert {words[0] for words in trimrt_commands()} >= {"selftest", "prepare", "build", "inspect", "serve"}
    assert len(typed()) >= 20


@pytest.mark.parametrize("words", trimrt_commands(), ids=" ".join)
def test_every_command_of_trimrt_takes_its_options(words: list[str]) -> None:
    name, *arguments = words
    assert name in COMMANDS
    context = click.Context(main)
    command = main.get_command(context, name)
    assert command is not None
    known = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
    assert {word.partition("=")[0] for word in arguments if word.startswith("-")} <= known
    command.make_context(name, list(arguments), parent=context, resilient_parsing=True)


@pytest.mark.parametrize("words", builds(), ids=" ".join)
def test_every_image_is_built_from_a_stage_that_exists(words: list[str]) -> None:
    assert (ROOT / words[words.index("-f") + 1]).is_file()
    assert f" AS {words[words.index('--target') + 1]}\n" in DOCKERFILE


def test_every_image_that_runs_was_built_before() -> None:
    built = {words[words.index("-t") + 1] for words in builds()}
    ran = {word for words in typed() for word in words if re.fullmatch(r"trimrt:[\w-]+", word)}
    assert ran == built


@pytest.mark.parametrize("words", measuring(), ids=" ".join)
def test_a_container_that_measures_is_shown_the_power_mode(words: list[str], tmp_path: Path) -> None:
    mounted = [words[place + 1].split(":")[0] for place, word in enumerate(words) if word == "-v"]
    shown = {
        name: content
        for name, content in ORIN_NANO.items()
        if name.startswith(("sys/", "proc/meminfo")) or any(f"/{name}".startswith(path) for path in mounted)
    }
    write_files(tmp_path, shown)
    found = power(tmp_path)
    assert found is not None
    assert found.mode == "25W"


def test_every_program_is_one_that_a_jetson_has_or_that_the_page_installs() -> None:
    for words in typed():
        program = words[0]
        if program == "docker":
            files = [words[place + 1] for place, word in enumerate(words) if word == "-f"]
            assert all((ROOT / file).is_file() for file in files)
        elif Path(program).name == "pip":
            asked = [words[place + 1] for place, word in enumerate(words) if word == "-r"]
            assert all((ROOT / file).is_file() for file in asked)
        elif program == "curl":
            files = re.findall(r"file=@(\S+)", " ".join(words))
            assert all((ROOT / file).is_file() for file in files)
        else:
            assert Path(program).name in SYSTEM | {"trimrt"}, words


def test_every_address_is_a_route_of_the_server() -> None:
    app = create_app(Settings())
    routes = {route.path for route in app.routes if isinstance(route, APIRoute | Mount)}
    routes |= {f"{route.path}" for route in app.routes if hasattr(route, "path")}
    asked = {word.partition(":8000")[2] for words in typed() if words[0] == "curl" for word in words[1:]}
    schema = set(app.openapi()["paths"])
    assert {path for path in asked if path} <= schema | routes


def test_every_file_and_folder_of_the_project_that_is_named_exists() -> None:
    for words in typed():
        for word in words:
            if word.startswith(("models/", "deploy/", "docs/")):
                assert (ROOT / word).exists(), word


def test_every_step_says_what_stands_behind_it() -> None:
    for section in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        assert STANDING & set(re.findall(r"\*([\w-]+)\*", section)), section.splitlines()[0]


def test_the_power_mode_is_the_first_step() -> None:
    assert re.findall(r"^## (.*)$", PAGE, re.MULTILINE)[0] == "0. Power and clocks"
    assert typed()[0][0] == "nvpmodel"
