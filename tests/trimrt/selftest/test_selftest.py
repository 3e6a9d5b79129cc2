"""`trimrt selftest`, on this machine's CPU; what it says where TensorRT or a GPU is missing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bare_process import WITHOUT, without_gpu
from click.testing import Result

from builder.kit import KIT_NAME, VERIFICATION_NAME, open_kit, write_verification
from runtime.manifest import sha256_of
from trimrt.selftest import checks
from trimrt.selftest.run import choose

Trimrt = Callable[..., Result]

ROOT = Path(__file__).parents[3]
SCREEN = 24  # lines


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def tested(engines: Path) -> dict:
    """What the test of this machine's CPU finds, where neither torch nor pytest can be imported."""
    arguments = ("selftest", "--backend", "openvino", "--soak-seconds", "0", "--json")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *arguments, "--engines", str(engines)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_cpu_passes_with_every_check(tested: dict) -> None:
    precisions, kinds = ("fp16", "int8"), ("build", "labels", "batches", "slots", "speed", "soak")
    names = ["library", *(f"{precision}: {kind}" for precision in precisions for kind in kinds)]
    assert [result["check"] for result in tested["results"]] == names
    assert all(result["passed"] for result in tested["results"])
    assert tested["engines"] == 2


def test_every_precision_is_timed_at_every_size(tested: dict) -> None:
    rows = {(row["precision"], row["batch"]) for row in tested["latencies"]}
    assert rows == {(precision, batch) for precision in ("fp16", "int8") for batch in (1, 8, 32)}
    assert all(row["median_ms"] > 0 and row["cuda_graphs"] is None for row in tested["latencies"])


def test_the_figures_come_with_the_machine(tested: dict) -> None:
    assert tested["machine"]["TrimRT"].startswith("0.")
    assert re.search(r"\d+ cores", tested["machine"]["processor"])
    assert tested["machine"]["memory"].endswith("GiB available")


@pytest.mark.slow
def test_what_was_built_before_is_tested_as_it_is(tested: dict, trimrt: Trimrt, engines: Path) -> None:
    before = sha256_of(engines / "selftest-int8-openvino" / "manifest.json")
    result = trimrt("selftest", "--backend", "openvino", "--engines", engines, "--soak-seconds", 0)
    assert result.exit_code == 0, result.output
    assert result.output.count("was built by") == 2
    assert sha256_of(engines / "selftest-int8-openvino" / "manifest.json") == before
    assert "passed" in result.output.splitlines()[-1]


# It fails where it must


@without_gpu
def test_tensorrt_without_a_gpu_is_a_failure_on_one_screen(trimrt: Trimrt) -> None:
    result = trimrt("selftest", "--backend", "tensorrt")
    assert result.exit_code == 1
    assert len(result.output.splitlines()) <= SCREEN
    assert "FAILED library: tensorrt cannot be imported" in result.output
    assert "FAILED GPU: no usable NVIDIA GPU" in result.output
    assert result.output.splitlines()[-1] == "FAILED: 2 of 2 checks; no engine ran"


@without_gpu
def test_tensorrt_rtx_is_no_substitute_for_tensorrt(trimrt: Trimrt) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install trimrt[rtx]")
    result = trimrt("selftest", "--backend", "tensorrt", "--json")
    found = json.loads(result.stdout)
    assert found["backend"] == "tensorrt"
    assert not any(check["passed"] for check in found["results"])


@without_gpu
def test_a_library_without_a_gpu_is_a_failure_too(trimrt: Trimrt) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install trimrt[rtx]")
    result = trimrt("selftest", "--backend", "tensorrt-rtx")
    assert result.exit_code == 1
    assert "ok     library: tensorrt-rtx 1." in result.output
    assert "no engine ran" in result.output.splitlines()[-1]


@without_gpu
def test_where_there_is_an_nvidia_gpu_openvino_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose()[0] == "openvino"
    monkeypatch.setattr("trimrt.selftest.run.device_nodes", lambda: [Path("/dev/nvmap")])
    assert choose() == ("tensorrt", "/dev/nvmap is here, so there is an NVIDIA GPU")


@pytest.mark.slow
def test_labels_that_are_not_the_recorded_ones_are_a_failure(
    tested: dict, trimrt: Trimrt, engines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kit = tmp_path / "kit"
    shutil.copytree(checks.KIT, kit)
    images = open_kit(checks.KIT).verification
    write_verification(
        kit / VERIFICATION_NAME,
        type(images)(
            images.name, images.pixels, images.targets, np.roll(images.logits, 1, axis=1), images.originals
        ),
    )
    manifest = json.loads((kit / KIT_NAME).read_text())
    manifest["verification_sha256"] = sha256_of(kit / VERIFICATION_NAME)
    (kit / KIT_NAME).write_text(json.dumps(manifest))
    monkeypatch.setattr(checks, "KIT", kit)

    result = trimrt("selftest", "--backend", "openvino", "--engines", engines, "--soak-seconds", 0)

    assert result.exit_code == 1
    failed = re.findall(r"^FAILED (fp16: \w+)", result.output, re.MULTILINE)
    assert failed == ["fp16: labels", "fp16: batches", "fp16: slots", "fp16: soak"]


# The kit


def test_the_kit_is_small_and_has_the_graphs_of_every_backend() -> None:
    assert sum(file.stat().st_size for file in checks.KIT.iterdir()) < 1_000_000
    kit = open_kit(checks.KIT)
    for precision, rest in (("fp16", "fp16"), ("fp16", "fp32"), ("int8", "fp16"), ("int8", "fp32")):
        assert [graph.precision for graph, _ in kit.graphs(precision, rest)] == [precision]  # type: ignore[arg-type]


def test_the_reference_of_the_kit_is_right_about_its_images() -> None:
    images = open_kit(checks.KIT).verification
    assert np.mean(images.logits.argmax(axis=1) == images.targets) >= 0.98


def test_the_command_that_made_the_kit_is_there() -> None:
    command = open_kit(checks.KIT).manifest.command
    assert command == "python -m experiments.selftest_kit"
    assert (ROOT / "experiments/selftest_kit.py").is_file()
