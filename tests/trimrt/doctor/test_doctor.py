"""`trimrt doctor`: what is here and what would stop the server; the exit code says whether something does."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from jetson_files import ORIN_NANO, write_files
from processes import TRIMRT
from signing import Signer
from tiny_engine import write_package

from trimrt.doctor.findings import Finding
from trimrt.doctor.machine import look_at_devices, look_at_machine, look_at_packages

Run = Callable[..., Result]
SCREEN = 24  # lines


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two packages, not to be changed."""
    directory = tmp_path_factory.mktemp("engines")
    write_package(directory, "tiny")
    write_package(directory, "other", seed=1)
    return directory


@pytest.fixture
def engines(packages: Path, tmp_path: Path) -> Path:
    """An engine directory of the test's own."""
    return Path(shutil.copytree(packages, tmp_path / "engines"))


def examine(trimrt: Run, *options: object) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit code, and the findings by subject."""
    result = trimrt("doctor", "--json", "--port", "0", *options)
    assert "Traceback" not in result.output
    findings = json.loads(result.stdout)["findings"]
    return result.exit_code, {finding["subject"]: finding for finding in findings}


def states(findings: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Of the engines."""
    return {name: finding["state"] for name, finding in findings.items() if name.startswith("engine")}


def by_subject(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


def test_a_machine_that_can_serve_is_shown_on_one_screen(engines: Path) -> None:
    command = [TRIMRT, "doctor", "--engine-dir", str(engines), "--engine", "tiny", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= SCREEN
    assert lines[-1] == "`trimrt serve` would serve"
    for subject in ("processor", "instructions", "memory", "cgroup", "GPU", "openvino", "packages", "port"):
        assert any(f" {subject}: " in line for line in lines), subject


def test_every_engine_is_loaded_as_the_server_would(trimrt: Run, engines: Path) -> None:
    code, findings = examine(trimrt, "--engine-dir", engines, "--engine", "tiny")
    assert code == 0
    assert states(findings) == {"engines": "ok", "engine tiny-v1": "ok", "engine other-v1": "ok"}
    assert findings["engine tiny-v1"]["found"] == "loads: tiny version 1, fp32, openvino"


@pytest.mark.parametrize(("damaged", "state", "code"), [("tiny", "stop", 1), ("other", "note", 0)])
def test_an_engine_that_does_not_load_stops_the_server_if_it_is_to_be_served(
    damaged: str, state: str, code: int, trimrt: Run, engines: Path
) -> None:
    (engines / f"{damaged}-v1" / "engine.blob").write_bytes(b"")
    found_code, findings = examine(trimrt, "--engine-dir", engines, "--engine", "tiny")
    assert (found_code, findings[f"engine {damaged}-v1"]["state"]) == (code, state)
    assert "damaged or changed" in findings[f"engine {damaged}-v1"]["found"]


def test_engines_among_which_nobody_chose_stop_it(trimrt: Run, engines: Path) -> None:
    code, findings = examine(trimrt, "--engine-dir", engines)
    assert (code, findings["engines"]["state"]) == (1, "stop")
    assert "choose with --engine" in findings["engines"]["found"]


@pytest.mark.parametrize(("options", "code", "state"), [((), 1, "stop"), (("--watch",), 0, "note")])
def test_no_engine_stops_it_unless_one_is_waited_for(
    options: tuple[str, ...], code: int, state: str, trimrt: Run, tmp_path: Path
) -> None:
    found, findings = examine(trimrt, "--engine-dir", tmp_path, *options)
    assert (found, findings["engines"]["state"]) == (code, state)


def test_an_engine_that_is_not_signed_stops_a_server_that_trusts_a_key(
    trimrt: Run, engines: Path, tmp_path: Path
) -> None:
    signer = Signer.new(tmp_path / "keys")
    signer.sign(engines / "other-v1")
    options = ("--engine-dir", engines, "--trusted-key", signer.public)
    code, findings = examine(trimrt, *options)
    assert code == 0
    assert states(findings) == {"engines": "ok", "engine other-v1": "ok", "engine tiny-v1": "note"}
    code, findings = examine(trimrt, *options, "--engine", engines / "tiny-v1")
    assert (code, findings["engines"]["state"]) == (1, "stop")
    assert "is not signed" in findings["engines"]["found"]


def test_a_taken_port_stops_it(trimrt: Run, engines: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, findings = examine(trimrt, "--engine-dir", engines, "--engine", "tiny", "--port", port)
    assert (code, findings["port"]["state"]) == (1, "stop")
    assert f"cannot listen on 127.0.0.1 port {port}" in findings["port"]["found"]


def test_what_is_in_the_way_of_the_unix_socket_stops_it(trimrt: Run, engines: Path, tmp_path: Path) -> None:
    options = ("--engine-dir", engines, "--engine", "tiny", "--uds", tmp_path / "socket")
    code, findings = examine(trimrt, *options)
    assert (code, findings["Unix socket"]["state"]) == (0, "ok")
    (tmp_path / "socket").write_text("mine")
    code, findings = examine(trimrt, *options)
    assert (code, findings["Unix socket"]["state"]) == (1, "stop")


def test_wrong_settings_are_refused_as_by_the_server(trimrt: Run) -> None:
    result = trimrt("doctor", "--workers", "none")
    assert result.exit_code == 2
    assert "--workers: Input should be a valid integer" in result.output


# --- the machine ------------------------------------------------------------------------------------------


def test_a_jetson_is_described(tmp_path: Path) -> None:
    write_files(tmp_path, ORIN_NANO)
    findings = by_subject(list(look_at_machine(tmp_path)))
    assert "Orin Nano" in findings["board"].found
    assert findings["memory"].found == "3.9 GiB available"


def test_a_quota_below_the_cores_is_worth_knowing(tmp_path: Path) -> None:
    write_files(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"})
    found = by_subject(list(look_at_machine(tmp_path)))["cgroup"]
    assert found.state == "note"
    assert found.found.startswith("0.5 cores' time, but threads for")
    assert "--inference-threads" in found.found


def test_what_restricts_openvino_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    found = by_subject(list(look_at_machine()))["instructions"]
    assert found.state == "note"
    assert "ONEDNN_MAX_CPU_ISA=AVX2 lets OpenVINO use no others" in found.found
    assert "avx512f" not in found.found


def test_a_gpu_that_cuda_does_not_open_is_worth_knowing(tmp_path: Path) -> None:
    write_files(tmp_path, {"dev/nvidiactl": "", "dev/nvidia0": ""})
    findings = by_subject(list(look_at_devices(tmp_path)))
    assert findings["GPU"].state == "note"
    assert findings["tensorrt"].state == "note"


def test_versions_that_do_not_fit_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a TrimRT with other needs, whose description comes first."""
    described = tmp_path / "trimrt-9.dist-info/METADATA"
    described.parent.mkdir()
    needs = [
        "click>=1000",
        "numpy>=1",
        "nowhere-to-be-found",
        "absent-elsewhere; sys_platform == 'plan9'",
        "absent-extra; extra == 'more'",
        "rich<1; extra == 'more'",
    ]
    lines = [f"Requires-Dist: {need}" for need in needs]
    described.write_text("\n".join(["Metadata-Version: 2.1", "Name: trimrt", "Version: 9", *lines, ""]))
    monkeypatch.syspath_prepend(str(tmp_path))
    found = [finding.found.partition(";")[0] for finding in look_at_packages()]
    assert [words.partition(" is ")[0] for words in found] == ["click", "nowhere-to-be-found", "rich"]
