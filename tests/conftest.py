"""What holds for every test; and one small student, trained once, its build kit, and an engine package of
each precision, for the tests of the builder and of the command line.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from trimrt.cli import main

if TYPE_CHECKING:  # imported where they are used: most tests need no torch
    from builder.kit import Kit
    from models.datasets import DataSplit
    from runtime.manifest import Precision

# A script's background jobs are born deaf to Ctrl-C, and so are their children: `make test &` would be too.
signal.signal(signal.SIGINT, signal.default_int_handler)

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8", "int8-dynamic")


@pytest.fixture(scope="session")
def trimrt() -> Callable[..., Result]:
    """The command line, in this process: `trimrt("build", folder, "--precision", "int8")`."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="trimrt")

    return run


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DataSplit]:
    """Handwritten digits, fold 0, unpacked where the command line finds them too."""
    from models.datasets import open_dataset

    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMRT_CACHE", str(cache))
        yield open_dataset("digits", fold=0)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, data: DataSplit) -> Path:
    from small_student import write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("runs") / "tiny-digits", data)


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, trimrt: Callable[..., Result]) -> Kit:
    """All precisions, for OpenVINO."""
    from builder.kit import open_kit

    folder = tmp_path_factory.mktemp("kits") / "tiny-digits"
    result = trimrt("prepare", checkpoint, "--target", "openvino", "--output", folder)
    assert result.exit_code == 0, result.output
    return open_kit(folder)


@pytest.fixture(scope="session")
def packages(
    tmp_path_factory: pytest.TempPathFactory, kit: Kit, trimrt: Callable[..., Result]
) -> dict[Precision, Path]:
    """An engine package's folder for each precision, not to be changed."""
    output = tmp_path_factory.mktemp("engines")
    result = trimrt("build", kit.path, "--precision", ",".join(PRECISIONS), "--output", output)
    assert result.exit_code == 0, result.output
    return {precision: output / f"tiny-digits-{precision}-openvino" for precision in PRECISIONS}
