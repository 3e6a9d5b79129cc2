"""How slots share the cores with the event loop: their priority, and its end."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from running import running
from wrapped_engine import load_wrapped

from runtime import priority as module
from runtime.priority import giving_way
from server.settings import Settings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


def priority() -> tuple[int, int]:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id()), os.sched_getscheduler(0)


def timer_slack() -> int:
    get_timer_slack = 30  # prctl(2)
    return int(ctypes.CDLL(None).prctl(get_timer_slack, 0, 0, 0, 0))


def time_slice() -> float:
    attributes = ctypes.create_string_buffer(48)
    number = {"x86_64": 315, "aarch64": 275}[platform.machine()]  # sched_getattr
    assert ctypes.CDLL(None).syscall(number, 0, attributes, 48, 0) == 0
    return float(struct.unpack("=IIQiIQQQ", attributes.raw)[5] / 1e9)


def in_a_thread(function: Callable[[], Any]) -> Any:
    """In a new one, which has run no engine before."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function).result(timeout=20)


@pytest.fixture
def usual(monkeypatch: pytest.MonkeyPatch) -> Iterator[float]:
    """The switch interval before anything gives way; not the default, so that none can pass for the other.

    Slots of other tests' servers may be inside: their interval is put aside.
    """
    monkeypatch.setattr(module, "_short_switch_interval", module._ShortSwitchInterval())
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.004)
    yield sys.getswitchinterval()
    sys.setswitchinterval(before)


class TestGivingWay:
    def test_a_thread_that_computes_has_a_lower_priority_than_the_main_thread(self) -> None:
        def compute() -> list[tuple[int, int]]:
            found = []
            for _ in range(2):  # as a thread that ran an engine before
                with giving_way():
                    found.append(priority())
            return found

        nice, policy = priority()
        assert in_a_thread(compute) == 2 * [(min(19, nice + 10), os.SCHED_BATCH)]
        assert priority() == (nice, policy)

    def test_the_interpreters_lock_changes_hands_soon_while_any_thread_is_inside(self, usual: float) -> None:
        with giving_way_in_a_thread() as leave_first, giving_way_in_a_thread() as leave_second:
            assert sys.getswitchinterval() == pytest.approx(1e-3)
            leave_first()
            assert sys.getswitchinterval() == pytest.approx(1e-3)
            leave_second()
            assert sys.getswitchinterval() == usual

    def test_timed_waits_are_not_lengthened(self) -> None:
        def compute() -> tuple[int, int, int]:
            before = timer_slack()
            with giving_way():
                inside = timer_slack()
            return before, inside, timer_slack()

        before, inside, after = in_a_thread(compute)
        assert inside == 1
        assert before == after

    @pytest.mark.skipif(
        tuple(map(int, platform.release().split(".")[:2])) < (6, 12),
        reason="threads have no time slice of their own before Linux 6.12",
    )
    def test_no_other_thread_waits_for_the_end_of_its_time_slice(self) -> None:
        def compute() -> tuple[float, float, float]:
            before = time_slice()
            with giving_way():
                inside = time_slice()
            return before, inside, time_slice()

        before, inside, after = in_a_thread(compute)
        assert inside == 0.1
        assert before == after < 0.1

    def test_the_end_undoes_it_even_after_an_error(self, usual: float) -> None:
        def compute() -> tuple[tuple[int, int], tuple[int, int]]:
            before = priority()
            with pytest.raises(ValueError, match="no"), giving_way():
                raise ValueError("no")
            return before, priority()

        before, after = in_a_thread(compute)
        assert sys.getswitchinterval() == usual
        assert after[1] == before[1]
        if os.geteuid() == 0:  # only a privileged process may raise a priority
            assert after == before


class giving_way_in_a_thread:  # noqa: N801  # a context manager, named like the one it enters
    """Inside `giving_way` on a thread of its own, until told to leave."""

    def __enter__(self) -> Callable[[], None]:
        inside, self._leave = threading.Event(), threading.Event()

        def stay() -> None:
            with giving_way():
                inside.set()
                assert self._leave.wait(20)

        self._thread = threading.Thread(target=stay)
        self._thread.start()
        assert inside.wait(20)
        return self._end

    def _end(self) -> None:
        self._leave.set()
        self._thread.join(20)

    def __exit__(self, *_error: object) -> None:
        self._end()


class TestOfAServer:
    @staticmethod
    def observed(engine_dir: Path, image: bytes, *, on_cpu: bool = True, **options: Any) -> tuple[Any, float]:
        """Priority of the thread that ran a batch, and the switch interval meanwhile."""
        seen: list[tuple[Any, float]] = []

        def look(_pixels: np.ndarray, _alone: bool) -> None:
            seen.append((priority(), sys.getswitchinterval()))

        settings = Settings(engine="tiny", engine_dir=engine_dir, port=0, **options)
        with running(settings, load_wrapped(look, on_cpu=on_cpu)) as server:
            assert server.predict(image).status_code == 200
        (only,) = seen
        return only

    def test_slots_on_a_cpu_give_way_until_the_server_ends(
        self, engine_dir: Path, encode: Callable[..., bytes], usual: float
    ) -> None:
        nice, _ = priority()
        seen = self.observed(engine_dir, encode(0))
        assert seen == ((min(19, nice + 10), os.SCHED_BATCH), pytest.approx(1e-3))
        assert sys.getswitchinterval() == usual

    def test_one_setting_turns_it_off(
        self, engine_dir: Path, encode: Callable[..., bytes], usual: float
    ) -> None:
        (_, policy), interval = self.observed(engine_dir, encode(0), linux_scheduling=False)
        assert (policy, interval) == (priority()[1], usual)

    def test_slots_of_a_device_need_no_cores_and_give_no_way(
        self, engine_dir: Path, encode: Callable[..., bytes], usual: float
    ) -> None:
        (_, policy), interval = self.observed(engine_dir, encode(0), on_cpu=False)
        assert (policy, interval) == (priority()[1], usual)
