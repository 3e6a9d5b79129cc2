"""To import TrimRT changes nothing that belongs to the whole process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import importlib, json, os, signal, sys, warnings
import cv2, numpy, PIL.Image, pydantic

def state():
    return {
        "Pillow's limit": PIL.Image.MAX_IMAGE_PIXELS,
        "OpenCV's threads": cv2.getNumThreads(),
        "switch interval": sys.getswitchinterval(),
        "signal handlers": {number: str(signal.getsignal(number)) for number in signal.valid_signals()},
        "warnings filters": [str(entry) for entry in warnings.filters],
        "environment": dict(os.environ),
        "working directory": os.getcwd(),
        "recursion limit": sys.getrecursionlimit(),
    }

before = state()
importlib.import_module(sys.argv[1])
print(json.dumps([before, state()]))
"""


@pytest.mark.parametrize(
    "module",
    [
        "models.preprocessing",
        "server",
        "server.app",
        "trimrt.serve.listening",
        "runtime.loading",
        "builder.compile.packages",
        "trimrt.cli",
    ],
)
def test_an_import_leaves_the_process_as_it_was(module: str) -> None:
    # The machine may have one core: OpenCV has two threads whatever it has.
    environment = {**os.environ, "OPENCV_FOR_THREADS_NUM": "2"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, module], env=environment, capture_output=True, text=True, check=True
    )
    before, after = json.loads(done.stdout)
    assert before["OpenCV's threads"] == 2
    assert before["Pillow's limit"] is not None
    assert after == before


@pytest.mark.parametrize(("chosen", "threads"), [(None, 1), ("2", 2)])
def test_the_commands_own_process_has_one_thread_of_opencv_unless_told_otherwise(
    chosen: str | None, threads: int
) -> None:
    script = (
        "import sys; from trimrt.__main__ import run; sys.argv = ['trimrt', '--version']\n"
        "try: run()\n"
        "except SystemExit: pass\n"
        "import cv2; print(cv2.getNumThreads())\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OPENCV_FOR_THREADS_NUM"}
    if chosen:
        environment["OPENCV_FOR_THREADS_NUM"] = chosen
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert int(done.stdout.split()[-1]) == threads
