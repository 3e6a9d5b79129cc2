"""`trimrt build --target tensorrt-rtx`, on a machine that need not have a GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bare_process import WITHOUT, without_gpu
from click.testing import Result

from builder.compile.targets.choice import choose_backend
from builder.kit import Kit
from runtime.loading import load_engine
from runtime.manifest import BatchSizes, EngineError, read_artefact, read_manifest

Trimrt = Callable[..., Result]


@without_gpu
@pytest.mark.parametrize("target", ["tensorrt-rtx", "openvino"])
def test_a_kit_is_built_and_verified_without_torch_modelopt_or_onnx(rtx, kit: Kit, tmp_path, target):
    arguments = ["build", str(kit.path), "--target", target, "-p", "fp32,fp16", "-o", str(tmp_path)]
    child = subprocess.run(
        [sys.executable, "-c", WITHOUT, *arguments], capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 0, child.stderr
    for precision in ("fp32", "fp16"):
        package = tmp_path / f"tiny-digits-{precision}-{target}"
        read_artefact(package, read_manifest(package))
    if target == "tensorrt-rtx":
        assert "NOT verified: no usable NVIDIA GPU" in child.stderr
        assert "Its graph, run with OpenVINO, passes the gate" in child.stderr


@pytest.fixture(scope="module")
def package(rtx, kit: Kit, tmp_path_factory, trimrt: Trimrt) -> Path:
    output = tmp_path_factory.mktemp("engines")
    result = trimrt(
        *("build", kit.path, "--target", "tensorrt-rtx", "-p", "fp16", "-o", output),
        *("--profile", "1:1:1", "--profile", "2:4:16", "--compute-capability", "8.6"),
    )
    assert result.exit_code == 0, result.output
    return output / "tiny-digits-fp16-tensorrt-rtx"


def test_the_manifest_says_what_was_built(rtx, package):
    manifest = read_manifest(package)
    assert (manifest.backend, manifest.backend_version) == ("tensorrt-rtx", rtx.version)
    assert manifest.batch == BatchSizes(min=1, opt=1, max=16)
    assert manifest.profiles == [BatchSizes(min=1, opt=1, max=1), BatchSizes(min=2, opt=4, max=16)]
    assert manifest.compatibility.compute_capabilities == ["8.6"]
    assert manifest.provenance.artefact == "engine.plan"
    assert (package / "tensorrt.log").read_text(encoding="utf-8").startswith("INFO")


def test_the_rebuilding_command_has_the_target_and_every_option(package):
    command = read_manifest(package).build_command
    assert "--target tensorrt-rtx" in command
    assert command.endswith("--profile 1:1:1 --profile 2:4:16 --compute-capability 8.6")


@without_gpu
def test_without_a_gpu_there_is_no_evidence_and_the_engine_says_why_it_does_not_load(package):
    assert read_manifest(package).evidence is None
    with pytest.raises(EngineError, match="no usable NVIDIA GPU"):
        load_engine(package)


@without_gpu
def test_auto_takes_openvino_and_says_why(kit: Kit, tmp_path, trimrt: Trimrt):
    assert choose_backend()[0] == "openvino"
    result = trimrt("build", kit.path, "-p", "fp32", "-o", tmp_path)
    assert result.exit_code == 0, result.output
    assert "target: openvino (there is no NVIDIA GPU here)" in result.output
    assert "--target openvino" in read_manifest(tmp_path / "tiny-digits-fp32-openvino").build_command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "4:2:8"], "--profile 4:2:8: that is not MIN:OPT:MAX"),
        (["--profile", "1:1:1", "--profile", "4:8:16"], "no profile takes batches of 2..3"),
        (["--compute-capability", "8.7"], "cannot build for compute capability 8.7"),
        (["--version-compatible"], "cannot build version-compatible engines"),
        (["--dla-core", "0", "--profile", "8:8:8"], "has no DLA"),
        (["--workspace-mib", "1", "--profile", "1:512:4096"], "did not build the engine"),
    ],
)
def test_what_cannot_be_built_is_a_message_and_nothing_is_published(
    rtx, kit: Kit, tmp_path, trimrt: Trimrt, arguments, message
):
    result = trimrt("build", kit.path, "--target", "tensorrt-rtx", "-p", "fp32", "-o", tmp_path, *arguments)
    assert result.exit_code != 0
    assert message in result.output
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_failed_build_keeps_tensorrts_messages(rtx, kit: Kit, tmp_path, trimrt: Trimrt, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    options = ["--workspace-mib", "1", "--profile", "1:512:4096"]
    trimrt("build", kit.path, "--target", "tensorrt-rtx", "-p", "fp32", "-o", tmp_path / "out", *options)
    (log,) = tmp_path.glob("trimrt-tensorrt-*.log")
    assert "\nERROR: " in log.read_text(encoding="utf-8")


@without_gpu
def test_best_needs_a_device(rtx, kit: Kit, tmp_path, trimrt: Trimrt):
    result = trimrt("build", kit.path, "--target", "tensorrt-rtx", "-p", "best", "-o", tmp_path)
    assert result.exit_code != 0
    assert "has to run what it compares: no usable NVIDIA GPU" in result.output
