"""The Dockerfiles: parsed by Docker's own parser, linted, and held against what else names their images.

That they build, and that the images work, takes minutes: `make images-check`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from running import Running

from server.settings import Settings
from tests.images.__main__ import IMAGES, MOST_BEYOND_BASE, RESULTS, table
from tests.images.checks import TORCH

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
FILES = ("Dockerfile.x86", "Dockerfile.jetson")
SERVERS = {
    ("Dockerfile.x86", "cpu"): "trimrt:cpu",
    ("Dockerfile.x86", "gpu"): "trimrt:gpu",
    ("Dockerfile.x86", "ray"): "trimrt:ray",
    ("Dockerfile.jetson", "server"): "trimrt:jetson",
}
TOOLS = (("Dockerfile.x86", "prepare"), ("Dockerfile.jetson", "builder"))
USER = "10001"
COPIED = {"models", "runtime", "builder", "server", "trimrt", "pyproject.toml", "README.md"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


@dataclass
class Stage:
    """One `FROM`, with what follows it."""

    base: str
    commands: list[Any] = field(default_factory=list)

    def last(self, instruction: str) -> Any:
        """The value of the last such instruction, or None."""
        values = [command.value for command in self.commands if command.cmd == instruction]
        return values[-1] if values else None


class Command(NamedTuple):
    cmd: str
    value: tuple[str, ...]
    flags: tuple[str, ...]
    exec_form: bool


# The parser is Go: its runtime takes over a process's signals, and brought down one that had torch,
# OpenVINO and Ray in it.
_PARSE = """
import dockerfile, json, sys
commands = dockerfile.parse_file(sys.argv[1])
print(json.dumps([[each.cmd, each.value, each.flags, each.json] for each in commands]))
"""


@cache
def _parsed(file: str) -> list[Command]:
    parsed = subprocess.run(
        [sys.executable, "-c", _PARSE, str(ROOT / file)], capture_output=True, text=True, check=True
    )
    return [
        Command(cmd, tuple(value), tuple(flags), exec_form)
        for cmd, value, flags, exec_form in json.loads(parsed.stdout)
    ]


def _stages(file: str) -> dict[str, Stage]:
    stages: dict[str, Stage] = {}
    for command in _parsed(file):
        if command.cmd == "FROM":
            base, _, name = command.value
            stage = stages[name] = Stage(base)
        elif stages:
            stage.commands.append(command)
    return stages


def _defaults(file: str) -> dict[str, str]:
    """Build arguments before the first stage: the base images."""
    arguments = {}
    for command in _parsed(file):
        if command.cmd == "FROM":
            break
        name, _, value = command.value[0].partition("=")
        arguments[name] = value
    return arguments


STAGES = {(file, name): stage for file in FILES for name, stage in _stages(file).items()}


def lineage(file: str, name: str) -> Iterator[Stage]:
    """A stage, and those that it is built on."""
    while (file, name) in STAGES:
        yield STAGES[file, name]
        name = STAGES[file, name].base


def value(file: str, name: str, instruction: str) -> Any:
    """What an image has, wherever in its lineage it was said."""
    return next((found for stage in lineage(file, name) if (found := stage.last(instruction))), None)


def environment(file: str, name: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for stage in reversed(list(lineage(file, name))):
        for command in stage.commands:
            if command.cmd == "ENV":
                pairs |= dict(zip(command.value[::2], command.value[1::2], strict=True))
    return pairs


def copies(file: str, name: str) -> Iterator[tuple[str | None, list[str]]]:
    """Stage (or None: the repository) and sources of every `COPY`."""
    for command in STAGES[file, name].commands:
        if command.cmd == "COPY":
            flags = [flag.removeprefix("--from=") for flag in command.flags if flag.startswith("--from=")]
            yield flags[0] if flags else None, list(command.value[:-1])


def installs(file: str, name: str) -> str:
    """Every shell command of an image, those of the stages that it copies from among them."""
    texts = []
    for stage_name in [found for found in STAGES if found[0] == file]:
        if STAGES[stage_name] in list(lineage(file, name)):
            texts += [
                " ".join(command.value) for command in STAGES[stage_name].commands if command.cmd == "RUN"
            ]
            for source, _ in copies(*stage_name):
                if source is not None:
                    texts.append(installs(file, source))
    return "\n".join(texts)


any_server = pytest.mark.parametrize(("file", "name"), SERVERS, ids=SERVERS.values())
any_image = pytest.mark.parametrize(("file", "name"), [*SERVERS, *TOOLS])
any_file = pytest.mark.parametrize("file", FILES)


# What they say ------------------------------------------------------------------------------------------


@any_file
def test_the_linter_has_nothing_to_say(file: str) -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, ROOT / file], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_linter_is_real(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian\nRUN cd / && apt-get install curl\n")
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, bad], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "DL3006" in done.stdout


@any_file
def test_base_images_are_arguments_with_a_version(file: str) -> None:
    defaults = _defaults(file)
    for argument, image in defaults.items():
        assert re.search(r":[\w.-]*\d[\w.-]*$|:bookworm-slim$", image), f"{argument}={image}"
    bases = {stage.base for (of, _), stage in STAGES.items() if of == file}
    own = {name for of, name in STAGES if of == file}
    assert bases - own == {f"${{{argument}}}" for argument in defaults}


@any_image
def test_images_run_trimrt_itself_as_an_unprivileged_user(file: str, name: str) -> None:
    assert STAGES[file, name].last("USER") == (USER,), "Kubernetes checks numbers, not names"
    created = installs(file, name)
    assert f"useradd --uid {USER} --gid {USER}" in created
    entrypoints = [
        c for stage in lineage(file, name) for c in stage.commands if c.cmd in ("ENTRYPOINT", "CMD")
    ]
    assert all(command.exec_form for command in entrypoints), (
        "a shell as first process would not pass SIGTERM on"
    )
    assert value(file, name, "ENTRYPOINT") == ("trimrt",)


@any_image
def test_any_user_can_write_caches(file: str, name: str) -> None:
    # `docker run --user` names users that have no home here.
    assert environment(file, name)["HOME"] == "/tmp"


@any_server
def test_servers_start_with_settings_that_the_server_takes(
    file: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert value(file, name, "CMD") == ("serve",)
    ours = {key: text for key, text in environment(file, name).items() if key.startswith("TRIMRT_")}
    assert set(ours) <= {f"TRIMRT_{field.upper()}" for field in Settings.model_fields}
    for key, text in ours.items():
        monkeypatch.setenv(key, text)
    settings = Settings()
    assert settings.host == "0.0.0.0"
    assert value(file, name, "EXPOSE") == (str(settings.port),)


@any_server
def test_the_health_check_asks_the_server_that_runs(file: str, name: str, server: Running) -> None:
    kind, *command = value(file, name, "HEALTHCHECK")
    assert (kind, command[0]) == ("CMD", "python3")
    port = server.url.rpartition(":")[2]
    for asked, healthy in ((port, True), ("1", False)):
        environ = {**os.environ, "TRIMRT_PORT": asked}
        done = subprocess.run(
            [sys.executable, *command[1:]], env=environ, capture_output=True, timeout=30, check=False
        )
        assert (done.returncode == 0) is healthy, done.stderr


@any_file
def test_no_build_step_imports_tensorrt(file: str) -> None:
    # It would fail where the container runtime has not mounted the driver, and at best by luck where it has.
    for (of, name), stage in STAGES.items():
        for command in stage.commands:
            if of == file and command.cmd == "RUN":
                assert not re.search(r"import [^&]*tensorrt", " ".join(command.value)), name


# What they copy -----------------------------------------------------------------------------------------


def test_everything_copied_is_there_and_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert "*" in ignored, "nothing goes in that is not named"
    named = {line[1:] for line in ignored if line.startswith("!")}
    assert all((ROOT / name).exists() for name in named)
    for file, name in STAGES:
        for source, paths in copies(file, name):
            if source is not None:
                assert (file, source) in STAGES, source
                continue
            for path in paths:
                expanded = [path.replace("${JETPACK}", number) for number in ("6", "7")]
                for each in set(expanded) - {"."}:
                    assert (ROOT / each).is_file(), each
                    assert any(Path(each).is_relative_to(allowed) for allowed in named), each
    assert named >= COPIED, "what is installed must be copied"


def test_the_ignored_are_what_weighs_and_what_is_secret() -> None:
    named = (ROOT / ".dockerignore").read_text("utf-8")
    for name in (".git", ".venv", "runs", "build", "engines", "tests"):
        assert f"!{name}" not in named.splitlines()


# What they install --------------------------------------------------------------------------------------


@any_server
def test_no_server_image_installs_torch(file: str, name: str) -> None:
    commands = installs(file, name)
    extras = {extra for found in re.findall(r'"\.\[([\w,]+)', commands) for extra in found.split(",")}
    assert (
        extras
        == {
            "trimrt:cpu": set(),
            "trimrt:gpu": {"cuda", "nvml"},
            "trimrt:ray": {"cluster"},
            "trimrt:jetson": set(),
        }[SERVERS[file, name]]
    )
    optional = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *(line for extra in extras for line in optional[extra])]
    assert not {Requirement(line).name for line in wanted} & TORCH
    assert not {pin.name for pin in (*pins("6"), *pins("7"))} & TORCH


@any_image
def test_every_installation_is_pinned(file: str, name: str) -> None:
    found = re.findall(r"pip install ([^&]*)", installs(file, name))
    assert found
    for arguments in found:
        pinned = "--constraint constraints.txt" in arguments or "--requirement pins.txt" in arguments
        alone = "--no-deps" in arguments
        assert pinned or alone, arguments


@any_server
def test_openvinos_telemetry_is_in_no_server(file: str, name: str) -> None:
    commands = installs(file, name)
    if "jetson" in file:
        assert not {pin.name for pin in (*pins("6"), *pins("7"))} & {"openvino", "openvino-telemetry"}
    else:
        assert re.search(r"pip uninstall --yes [^&]*openvino-telemetry", commands)


# JetPack's pins -----------------------------------------------------------------------------------------


def pins(jetpack: str) -> list[Requirement]:
    text = (ROOT / f"deploy/jetson/jetpack{jetpack}.txt").read_text("utf-8")
    return [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize(("jetpack", "python"), [("6", "3.10"), ("7", "3.12")])
def test_the_pins_are_what_the_server_asks_for_but_for_openvino(jetpack: str, python: str) -> None:
    pinned = {pin.name: next(iter(pin.specifier)).version for pin in pins(jetpack)}
    target = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": "aarch64"}
    lines = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["cuda"]]
    asked = [requirement for line in lines if (requirement := Requirement(line)).name != "openvino"]
    for requirement in asked:
        if requirement.marker is None or requirement.marker.evaluate({**target, "extra": ""}):
            assert Version(pinned[requirement.name]) in requirement.specifier, requirement
    assert Version(python) in SpecifierSet(PROJECT["requires-python"])


def test_jetpack_6_has_the_numpy_and_cuda_of_its_tensorrt_and_numpy_is_installed_last() -> None:
    pinned = {pin.name: Version(next(iter(pin.specifier)).version) for pin in pins("6")}
    for line in (ROOT / "deploy/jetson/jetpack6.in").read_text("utf-8").splitlines():
        if not line.startswith("#"):
            asked = Requirement(line.partition("#")[0].strip())
            assert pinned[asked.name] in asked.specifier
    steps = re.findall(r"pip install ([^&]*)", installs("Dockerfile.jetson", "server"))
    assert "grep '^numpy==' pins.txt" in steps[-1]


def test_jetpack_7_has_what_tells_the_load_of_thors_gpu() -> None:
    """Its sysfs does not (docs/jetson.md)."""
    asked = {Requirement(line).name for line in PROJECT["optional-dependencies"]["nvml"]}
    assert asked <= {pin.name for pin in pins("7")}


def test_jetpack_7_has_the_versions_of_all_other_machines() -> None:
    here = dict(
        line.lower().replace("_", "-").split("==")
        for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    )
    for pin in pins("7"):
        assert here[pin.name] == next(iter(pin.specifier)).version, pin


# Who names the images -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("compose", "image"), [("compose.yaml", "cpu"), ("compose.jetson.yaml", "jetson")])
def test_compose_builds_the_target_that_its_image_is_named_after(compose: str, image: str) -> None:
    content = yaml.safe_load((ROOT / compose).read_text("utf-8").replace(" !override", ""))
    service = content["services"]["server"]
    assert service["image"] == f"trimrt:{image}"
    named = service["build"]["dockerfile"], service["build"]["target"]
    assert SERVERS[named] == service["image"]


def test_every_image_of_the_manifests_is_a_target_with_their_user_port_and_folder() -> None:
    text = "".join(path.read_text("utf-8") for path in (ROOT / "deploy/kubernetes").rglob("*.yaml"))
    assert set(re.findall(r"image: (trimrt:\w+)", text)) <= set(SERVERS.values())
    assert set(re.findall(r"newTag: (\w+)", text)) == {"gpu", "jetson"}
    assert set(re.findall(r"runAsUser: (\d+)", text)) == {USER}
    for file, name in SERVERS:
        variables = environment(file, name)
        assert f"containerPort: {variables['TRIMRT_PORT']}" in text
        assert f"mountPath: {variables['TRIMRT_ENGINE_DIR']}" in text


def test_kuberay_finds_its_tools() -> None:
    commands = installs("Dockerfile.x86", "ray")
    assert re.search(r"apt-get install [^&]* bash wget", commands)
    # Its containers' commands run in login shells, where the image's PATH is forgotten.
    assert "/etc/profile.d/" in commands


# What was measured --------------------------------------------------------------------------------------


def test_the_documented_figures_are_those_of_the_last_check_and_hold_its_bars() -> None:
    results = json.loads(RESULTS.read_text("utf-8"))
    assert table(results) in (ROOT / "docs/containers.md").read_text("utf-8"), "run `make images-check`"
    assert set(results["checks"]) >= set(IMAGES)
    for name, most in MOST_BEYOND_BASE.items():
        assert results["checks"][name]["bytes_beyond_base"] <= most
    for name, image in IMAGES.items():
        if (image.file, image.target) in SERVERS:
            assert results["checks"][name]["training_libraries"] == []
