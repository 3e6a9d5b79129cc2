"""Threads that run engines."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
import threading

import pytest

from runtime.threads import give_way, start_in_engine_thread


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


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not round the time of a wait up")
def test_a_thread_that_computes_waits_for_the_interpreters_lock_no_longer_than_it_says() -> None:
    def compute() -> int:
        give_way()
        get_timer_slack = 30  # prctl(2)
        return int(ctypes.CDLL(None).prctl(get_timer_slack, 0, 0, 0, 0))

    assert start_in_engine_thread(compute).result() == 1
    assert sys.getswitchinterval() == pytest.approx(20e-6)


@pytest.mark.skipif(
    sys.platform != "linux" or tuple(map(int, platform.release().split(".")[:2])) < (6, 12),
    reason="threads have no time slice of their own before Linux 6.12",
)
def test_no_other_thread_waits_for_the_end_of_its_time_slice() -> None:
    def compute() -> float:
        give_way()
        attributes = ctypes.create_string_buffer(48)
        number = {"x86_64": 315, "aarch64": 275}[platform.machine()]  # sched_getattr
        assert ctypes.CDLL(None).syscall(number, 0, attributes, 48, 0) == 0
        runtime_ns = struct.unpack("=IIQiIQQQ", attributes.raw)[5]
        return float(runtime_ns / 1e9)

    assert start_in_engine_thread(compute).result() == 0.1
