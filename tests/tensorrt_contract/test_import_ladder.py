"""Finding TensorRT in the situations that users are in, each in a process of its own."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
from official_bindings import BindingsUnavailableError, official_bindings

from runtime.tensorrt.library import LogLine, TensorRTLog, errors_in

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install trimrt[rtx]")

SCRIPT = """
import sys
for name in sys.argv[1:]:
    sys.modules[name] = None  # not installed
from runtime.tensorrt.library import TensorRTUnavailableError, find_tensorrt
try:
    library = find_tensorrt()
    print(library.backend, library.version)
except TensorRTUnavailableError as error:
    print(error)
"""


def find(*missing: str, **environment: str) -> str:
    command = [sys.executable, "-c", SCRIPT, *missing]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=True, timeout=60
    ).stdout


@pytest.fixture(scope="module")
def bindings():
    try:
        return official_bindings("10.3.0")
    except BindingsUnavailableError as error:
        pytest.skip(str(error))


def test_tensorrt_comes_first(bindings):
    found = find(PYTHONPATH=str(bindings.folder), LD_LIBRARY_PATH=str(bindings.stubs))
    assert found == "tensorrt 10.3.0\n"


def test_tensorrt_rtx_is_next():
    assert find("tensorrt").startswith("tensorrt-rtx 1.")


def test_tensorrt_whose_libraries_are_missing_is_passed_over(bindings):
    assert find(PYTHONPATH=str(bindings.folder)).startswith("tensorrt-rtx 1.")


def test_a_folder_that_happens_to_be_called_tensorrt_is_passed_over(tmp_path):
    (tmp_path / "tensorrt").mkdir()
    assert find(PYTHONPATH=str(tmp_path)).startswith("tensorrt-rtx 1.")


def test_with_neither_both_remedies_are_told(bindings):
    said = find("tensorrt_rtx", PYTHONPATH=str(bindings.folder))
    assert "libnvinfer.so.10" in said
    assert "--system-site-packages" in said
    assert "pip install trimrt[rtx]" in said


# Its messages


def test_messages_go_to_every_open_capture_and_to_its_file(tmp_path, caplog):
    log = TensorRTLog()
    with log.capture(tmp_path / "build.log") as outer:
        log.write("INFO", "one")
        with log.capture() as inner:
            log.write("ERROR", "two")
    assert outer == [LogLine("INFO", "one"), LogLine("ERROR", "two")]
    assert inner == [LogLine("ERROR", "two")]
    assert (tmp_path / "build.log").read_text() == "INFO: one\nERROR: two\n"
    assert caplog.records == []


def test_uncaptured_warnings_and_errors_are_logged(caplog):
    log = TensorRTLog()
    for severity in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO"):
        log.write(severity, severity.lower())
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (logging.ERROR, "internal_error"),
        (logging.ERROR, "error"),
        (logging.WARNING, "warning"),
    ]


def test_the_errors_of_a_log_leave_out_what_only_says_that_there_is_no_gpu():
    no_gpu = LogLine("ERROR", "Cuda Runtime (cudaError 35: CUDA driver version is insufficient)")
    reason = LogLine("ERROR", "OutOfMemory")
    assert errors_in([no_gpu, reason, LogLine("WARNING", "slow"), reason]) == "OutOfMemory"
    assert "cudaError 35" in errors_in([no_gpu]), "unless nothing else was said"
