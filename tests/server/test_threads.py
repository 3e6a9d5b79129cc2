"""Threads that run engines."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from server.threads import give_way, start_in_engine_thread


@pytest.mark.skipif(sys.platform != "linux", reason="other systems give threads no priority of their own")
def test_a_thread_that_computes_gives_way_to_all_others() -> None:
    def priority() -> tuple[int, int]:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), os.sched_getscheduler(0)

    def compute() -> list[tuple[int, int]]:
        found = []
        for _ in range(2):  # a thread of an engine before
            give_way()
            found.append(priority())
        return found

    nice, policy = priority()
    once, twice = start_in_engine_thread(compute).result()
    assert once == twice == (min(19, nice + 10), os.SCHED_BATCH)
    assert priority() == (nice, policy)
