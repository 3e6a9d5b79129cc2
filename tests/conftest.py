"""What holds for every test; and one small student, trained once, its build kit, and an engine package of
each precision, for the tests of the builder and of the command line.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
from click.testing import CliRunner, Result
from shared import build_once

from trimrt.cli import main

if TYPE_CHECKING:  # imported where they are used: most tests need no torch
    from builder.kit import Kit
    from models.datasets import DataSplit
    from runtime.manifest import Precision

# A script's background jobs are born deaf to Ctrl-C, and so are their children: `make test &` would be too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine may take any time for an example, and fails no test by that.
hypothesis.settings.register_profile("patient", hypothesis.settings.default, deadline=None)
hypothesis.settings.load_profile("patient")

# Whoever takes the last file of all is soon done with it, so that pytest-xdist's workers end together.
LONGEST_FIRST = (
    "builder/compile/test_instruction_sets.py",
    "e2e/test_main_job.py",
    "models/test_compress.py",
    "builder/test_build_kit.py",
    "models/test_compress_to_budget.py",
    "builder/compile/tensorrt_target/test_compile.py",
    "builder/prepare/test_sensitivity.py",
    "server/test_scheduling.py",
    "trimrt/predict/test_predict_command.py",
    "trimrt/report/test_report_command.py",
    "experiments/test_calibration_methods.py",
    "builder/prepare/test_calibration.py",
    "models/test_training.py",
    "benchmarks/test_limit.py",
    "e2e/test_wheel.py",
)

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8", "int8-dynamic")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of the longest files first; all others keep their order."""
    folder = Path(__file__).parent
    places = {folder / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session", autouse=True)
def short_measurements() -> Iterator[None]:
    """Builds time their engines for real, but briefly: no test is about how fast they are."""
    from builder.compile import measurement

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurement, "MEASURE_SECONDS", 0.03)
        yield


@pytest.fixture(scope="session", autouse=True)
def brief_exports() -> Iterator[None]:
    """PyTorch's exporter collects its operators once, and coverage does not watch its millions of calls.

    Each takes a third of an export.
    """
    torch = sys.modules.get("torch")
    if torch is None:  # where no test that was collected needs it
        yield
        return
    import torch.onnx
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    export = torch.onnx.export

    def untraced(*arguments: object, **options: object) -> object:
        trace = sys.gettrace()
        sys.settrace(None)
        try:
            return export(*arguments, **options)
        finally:
            sys.settrace(trace)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", untraced)
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(scope="session")
def trimrt() -> Callable[..., Result]:
    """The command line, in this process: `trimrt("build", folder, "--precision", "int8")`."""

    def run(*arguments: object) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="trimrt")

    return run


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the handwritten digits are unpacked already."""
    from models.datasets import open_dataset

    return build_once(tmp_path_factory, "cache", lambda folder: open_dataset("digits", cache_dir=folder))


@pytest.fixture(scope="session")
def data(cache_dir: Path) -> Iterator[DataSplit]:
    """Handwritten digits, fold 0, where the command line finds them too."""
    from models.datasets import open_dataset

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMRT_CACHE", str(cache_dir))
        yield open_dataset("digits", fold=0)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, data: DataSplit) -> Path:
    from small_student import write_checkpoint

    runs = build_once(tmp_path_factory, "runs", lambda folder: write_checkpoint(folder / "tiny-digits", data))
    return runs / "tiny-digits"


@pytest.fixture(scope="session")
def depthwise(tmp_path_factory: pytest.TempPathFactory, data: DataSplit) -> Path:
    """The graph of a small trained network of depthwise convolutions; it takes the tiny student's pixels."""
    from small_student import SPEC, depthwise_network

    from builder.prepare.export import export_onnx

    def build(folder: Path) -> None:
        export_onnx(depthwise_network(data), SPEC, folder / "fp32.onnx")

    return build_once(tmp_path_factory, "depthwise", build) / "fp32.onnx"


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, trimrt: Callable[..., Result]) -> Kit:
    """All precisions, for OpenVINO."""
    from builder.kit import open_kit

    def build(folder: Path) -> None:
        result = trimrt("prepare", checkpoint, "--target", "openvino", "--output", folder / "tiny-digits")
        assert result.exit_code == 0, result.output

    return open_kit(build_once(tmp_path_factory, "kits", build) / "tiny-digits")


@pytest.fixture(scope="session")
def packages(
    tmp_path_factory: pytest.TempPathFactory, kit: Kit, trimrt: Callable[..., Result]
) -> dict[Precision, Path]:
    """An engine package's folder for each precision, not to be changed."""

    def build(folder: Path) -> None:
        result = trimrt("build", kit.path, "--precision", ",".join(PRECISIONS), "--output", folder)
        assert result.exit_code == 0, result.output

    output = build_once(tmp_path_factory, "engines", build)
    return {precision: output / f"tiny-digits-{precision}-openvino" for precision in PRECISIONS}
