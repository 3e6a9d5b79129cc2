"""The wheel, beside a project that has packages of the same names as TrimRT's own."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIST_FILES = """
from pathlib import Path
import trimrt
from models.card import read_card
from models.pretrained import DIGITS_STUDENT
read_card(DIGITS_STUDENT)
root = Path(trimrt.__file__).parents[1]
print(root, *(path.relative_to(root) for path in root.rglob("*") if path.is_file()), sep="\\n")
"""
OWN = ("models", "runtime", "builder", "server")


@dataclass
class Installed:
    """A wheel installed into a virtual environment, and a project beside it.

    Attributes:
        environment: the virtual environment; the dependencies are those of the tests.
        project: a folder with packages `models`, `runtime`, `builder` and `server`.
    """

    environment: Path
    project: Path

    def run(self, *command: str, path: str = "") -> subprocess.CompletedProcess[str]:
        """Run a program of the virtual environment in the project, with PYTHONPATH `path`."""
        return subprocess.run(
            [str(self.environment / "bin" / command[0]), *command[1:]],
            cwd=self.project,
            env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    source.mkdir()  # setuptools leaves its work beside the sources
    for name in ("pyproject.toml", "README.md", *OWN, "trimrt"):
        (source / name).symlink_to(ROOT / name)
    subprocess.run(
        [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", folder, source], check=True
    )
    (wheel,) = folder.glob("*.whl")
    environment = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", *offline, wheel], check=True)
    # Python does not read the .pth files of a folder that a .pth file names: an editable TrimRT stays out.
    packages = sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)})
    Path(packages, "dependencies.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    project = folder / "project"
    for name in OWN:
        (project / name).mkdir(parents=True)
        (project / name / "__init__.py").write_text("raise SystemExit('the project was imported')\n")
    return Installed(environment, project)


@pytest.mark.parametrize("command", ["serve", "compress"])
def test_the_command_works_in_a_folder_with_packages_of_the_same_names(
    installed: Installed, command: str
) -> None:
    done = installed.run("trimrt", command, "--help")
    assert done.returncode == 0, done.stderr
    assert f"Usage: trimrt {command} [OPTIONS]" in done.stdout


@pytest.mark.parametrize("command", ["serve", "compress"])
def test_what_hides_its_own_packages_is_named_at_once(installed: Installed, command: str) -> None:
    for done in (
        installed.run("trimrt", command, "--help", path=str(installed.project)),
        installed.run("python", "-m", "trimrt", command, "--help"),
    ):
        assert done.returncode == 1
        assert f"Error: {installed.project / 'models'} hides TrimRT's package `models`" in done.stderr
        assert f"take {installed.project} out of PYTHONPATH" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_folder_without_python_hides_nothing(installed: Installed, tmp_path: Path) -> None:
    for name in OWN:
        (tmp_path / name).mkdir()
    done = installed.run("trimrt", "serve", "--help", path=str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_files_that_are_no_modules_are_in_the_wheel(installed: Installed) -> None:
    done = installed.run("python", "-I", "-c", LIST_FILES)
    assert done.returncode == 0, done.stderr
    root, *files = done.stdout.splitlines()
    assert Path(root).is_relative_to(installed.environment)
    suffixes = (".html", ".css", ".js", ".svg", ".safetensors", ".typed", ".onnx", ".npz", ".json", ".csv")
    expected = {
        str(path.relative_to(ROOT))
        for name in (*OWN, "trimrt")
        for path in (ROOT / name).rglob("*")
        if path.suffix in suffixes
    }
    assert expected <= set(files)
