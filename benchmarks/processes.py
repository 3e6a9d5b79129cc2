"""A server's processes: started together, measured together, and all ended for sure."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ClassVar, Final

import psutil

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_GRACE_SECONDS: Final = 5.0


class ProcessTree:
    """A process and all that it started, also what detached itself from it."""

    _roots: ClassVar[set[int]] = set()  # of all trees that have not been ended

    def __init__(self, root: subprocess.Popen[bytes], others: set[int]) -> None:
        self._root = root
        self._process = psutil.Process(root.pid)
        self._others = others
        self._roots.add(root.pid)

    def members(self) -> list[psutil.Process]:
        """Every live process of the tree."""
        found: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            found += [self._process, *self._process.children(recursive=True)]
        if self.ended():
            found += self._orphans()
        members = []
        for process in dict.fromkeys(found):
            with suppress(psutil.NoSuchProcess):
                if process.status() != psutil.STATUS_ZOMBIE:
                    members.append(process)
        return members

    def _orphans(self) -> list[psutil.Process]:
        """What the root left behind: it went to this process, which is the next subreaper."""
        strangers = self._others | self._roots
        found = []
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                if child.pid not in strangers:
                    found += [child, *child.children(recursive=True)]
        return found

    def pause(self) -> None:
        """Stop every member until `resume`."""
        stopped: set[int] = set()
        # One that is found running may have started another since.
        while fresh := [member for member in self.members() if member.pid not in stopped]:
            for member in fresh:
                stopped.add(member.pid)
                with suppress(psutil.NoSuchProcess):
                    member.suspend()

    def resume(self) -> None:
        """Resume every stopped member."""
        for member in self.members():
            with suppress(psutil.NoSuchProcess):
                member.resume()

    def ended(self) -> bool:
        """Whether the process that was started is gone."""
        return self._root.poll() is not None

    def cpu_seconds(self) -> float:
        """User and system time of all members so far."""
        total = 0.0
        for member in self.members():
            with suppress(psutil.NoSuchProcess):
                times = member.cpu_times()
                total += times.user + times.system
        return total

    def memory_bytes(self) -> int:
        """Resident memory of all members; pages that they share are counted once (PSS)."""
        total = 0
        for member in self.members():
            with suppress(psutil.NoSuchProcess):
                total += member.memory_full_info().pss
        return total

    def end(self) -> None:
        """End every member: the root by SIGTERM, and whatever is left after a while by SIGKILL."""
        self.resume()  # SIGTERM does not reach what is stopped
        if not self.ended():
            self._root.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._root.wait(_GRACE_SECONDS)
        deadline = time.monotonic() + _GRACE_SECONDS
        while (left := self.members()) and time.monotonic() < deadline:
            for member in left:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
            psutil.wait_procs(left, timeout=1)
        self._root.wait(_GRACE_SECONDS)
        self._roots.discard(self._root.pid)
        if left:
            raise RuntimeError(f"cannot end processes {[member.pid for member in left]}")


def exit_on_sigterm() -> None:
    """Let SIGTERM end this program as an exception does, so that `running` ends its processes."""
    signal.signal(signal.SIGTERM, lambda _signal, _frame: sys.exit(143))


@contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[ProcessTree]:
    """`command`, with its output in `log`, until the block ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        # What its children leave behind stays in its own tree: there may be several side by side.
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with log.open("wb") as output:
        root = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # an interrupt at the terminal is ours to pass on
            preexec_fn=prepare,
        )
    tree = ProcessTree(root, before)
    try:
        yield tree
    finally:
        tree.end()
