"""What the GPU tests run on: this machine's TensorRT or TensorRT-RTX, and engines built with it.

`TRIMRT_GPU_KIT` names a build kit to use (on a device without torch); by default a small student is
trained and prepared here. `TRIMRT_GPU_BACKEND` names the library to test, without which nothing is skipped.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
from click.testing import CliRunner

from builder.kit import Kit, open_kit
from runtime.cuda import open_cuda
from runtime.manifest import EngineError
from runtime.tensorrt.library import TensorRTBackend, find_tensorrt, load_tensorrt
from trimrt.cli import main

PRECISIONS = ("fp32", "fp16", "int8")
Trimrt = Callable[..., None]


@pytest.fixture(scope="session")
def backend() -> TensorRTBackend:
    """Where there is no TensorRT or no GPU, skips every test that uses it, unless one was asked for."""
    wanted = os.environ.get("TRIMRT_GPU_BACKEND")
    try:
        library = find_tensorrt() if wanted is None else load_tensorrt(cast(TensorRTBackend, wanted))
        open_cuda()
    except EngineError as error:
        if wanted is not None:
            pytest.fail(f"{wanted} was to be tested: {error}")
        pytest.skip(f"needs an NVIDIA GPU and TensorRT: {error}")
    return library.backend


@pytest.fixture(scope="session")
def trimrt() -> Trimrt:
    def run(*arguments: object) -> None:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="trimrt")
        assert result.exit_code == 0, result.output

    return run


@pytest.fixture(scope="session")
def kit(backend: TensorRTBackend, trimrt: Trimrt, tmp_path_factory: pytest.TempPathFactory) -> Kit:
    if given := os.environ.get("TRIMRT_GPU_KIT"):
        return open_kit(Path(given))
    pytest.importorskip(
        "modelopt", reason="without `pip install trimrt[compress]`, set TRIMRT_GPU_KIT to a build kit"
    )
    from small_student import write_checkpoint

    from models.datasets import open_dataset

    checkpoint = write_checkpoint(tmp_path_factory.mktemp("runs") / "tiny-digits", open_dataset("digits"))
    folder = tmp_path_factory.mktemp("kits") / "tiny-digits"
    trimrt("prepare", checkpoint, "-p", ",".join(PRECISIONS), "-o", folder)
    return open_kit(folder)


@pytest.fixture(scope="session")
def engines(
    backend: TensorRTBackend, kit: Kit, trimrt: Trimrt, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """An engine package for each precision, and OpenVINO's FP32 one as `reference`."""
    output = tmp_path_factory.mktemp("engines")
    trimrt("build", kit.path, "--target", backend, "-p", ",".join(PRECISIONS), "-o", output)
    trimrt("build", kit.path, "--target", "openvino", "-p", "fp32", "-o", output)
    name = kit.student.name
    packages = {precision: output / f"{name}-{precision}-{backend}" for precision in PRECISIONS}
    return packages | {"reference": output / f"{name}-fp32-openvino"}
