"""The commands that the pages show: each exists, and so do its options."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from trimrt.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))),
]
SHELL = re.compile(r"(?:^|[$;&|] +|^ {4})(?:[A-Z_0-9]+=\S+ +)*(?:\S*/)?trimrt ([a-z].*)$")


def shown(page: str) -> Iterator[list[str]]:
    """The words after `trimrt` of every command line in a page's code."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```(?:console|bash|sh)?\n(.*?)^```", text, re.M | re.S)
    blocks += re.findall(r"^ {4}(trimrt .*)$", text, re.M)
    for line in "\n".join(blocks).splitlines():
        if found := SHELL.search(line):
            yield shlex.split(found[1].rstrip(" &"), comments=True)
    for inline in re.findall(r"`trimrt ([a-z-]+(?: [^`]*)?)`", text):
        yield shlex.split(inline)


def find_command(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the words begin with, and what follows.

    Raises:
        KeyError: there is none.
    """
    command: click.Command = main
    context = click.Context(main)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        inner = command.get_command(context, words[0])
        if inner is None:
            raise KeyError(words[0])
        command, words = inner, words[1:]
    return command, words


def options_of(command: click.Command) -> set[str]:
    parameters = command.get_params(click.Context(command))
    return {option for each in parameters for option in (*each.opts, *each.secondary_opts)}


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_option_that_a_page_shows_exists(page: str) -> None:
    unknown = []
    for words in shown(page):
        try:
            command, rest = find_command(words)
        except KeyError:
            unknown.append(shlex.join(words))
            continue
        flags = {word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)}
        unknown += [f"{shlex.join(words)}: {flag}" for flag in flags - options_of(command)]
    assert unknown == []


def test_the_pages_show_many_commands() -> None:
    assert sum(1 for page in PAGES for _ in shown(page)) > 50
    assert {"build", "compress", "predict", "serve"} <= {words[0] for words in shown("README.md")}
    assert len(list(shown("docs/your-model.md"))) >= 3


def test_your_model_names_only_options_that_its_commands_have() -> None:
    text = (ROOT / "docs/your-model.md").read_text(encoding="utf-8")
    text = re.sub(r"`python -m [^`]*`", "", text)  # an experiment's options are its own
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z](?![\w-])", text))
    known = set[str]().union(*(options_of(find_command([name])[0]) for name in ("build", "compress")))
    assert len(named) > 10
    assert named - known == set()
    # What a network from elsewhere may need is on the page.
    asked = {
        "--data",
        "--preprocess",
        "--labels",
        "--activation",
        "--image-size",
        "--output-name",
        "--resize",
    }
    assert asked | {"--interpolation", "--unlabelled", "--name", "--replace", "--allow-low-accuracy"} <= named
