"""What a process that is about to serve does with its memory, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import threading
import numpy as np
import psutil
from server.lifecycle import settle_memory

settle_memory()
kept = []

def large_requests():
    for mebibytes in (31, 20, 4, 4, 4, 4):
        large = np.ones(mebibytes << 20, np.uint8)
        kept.append(bytearray(70_000))
        del large

before = psutil.Process().memory_info().rss
threads = [threading.Thread(target=large_requests) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(psutil.Process().memory_info().rss - before - sum(map(len, kept)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other allocators")
def test_what_large_requests_took_goes_back_to_the_system() -> None:
    result = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 20 << 20
