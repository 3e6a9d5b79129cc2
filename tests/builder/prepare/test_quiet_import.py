"""ONNX Runtime warns of GPUs that are not there; nobody who builds for a CPU needs to read that."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Names a graphics device of which nothing is known, as virtual machines do.
A_DEVICE = "mount -t tmpfs none /sys/class && mkdir -p /sys/class/drm/card0/device"
A_DEVICE += " && echo 0x1234 > /sys/class/drm/card0/device/vendor"
QUIET = "from builder.prepare.quiet_import import import_onnxruntime; import_onnxruntime()"


def beside_a_device(code: str) -> subprocess.CompletedProcess[str]:
    script = f'{A_DEVICE} && exec "$0" -c "$1"'
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, sys.executable, code]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_importing_it_warns_of_no_device() -> None:
    loud = beside_a_device("import onnxruntime")
    if "Failed to detect devices" not in loud.stderr:
        pytest.skip(f"no namespace here, or ONNX Runtime warns no more: {loud.stderr[:200]}")

    quiet = beside_a_device(QUIET)

    assert (quiet.returncode, quiet.stderr) == (0, "")


def test_standard_error_is_back_afterwards() -> None:
    code = f"{QUIET}; import os; os.write(2, b'heard')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "heard")


def test_a_closed_standard_error_is_no_obstacle() -> None:
    done = subprocess.run([sys.executable, "-c", f"import os; os.close(2); {QUIET}"], check=False)
    assert done.returncode == 0
