"""What a long computation has done so far, kept so that the same command goes on from there."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final

import torch

from models.files import replace_file

SAVE_INTERVAL_S: Final = 30.0
_FORMAT: Final = 2


class StateSaver:
    """Saves the state of a computation at least every half minute, and before Ctrl-C ends it.

    A state is whole between two steps only, so Ctrl-C waits for the end of the step that it comes in. A
    second one does not wait, and the state saved last counts.
    """

    def __init__(
        self,
        save: Callable[[], None],
        interval_s: float = SAVE_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Save by `save`, so often that no two savings are more than `interval_s` seconds apart."""
        self._save = save
        self._clock = clock
        self._interval_s = interval_s
        self._interrupted = False
        self._holds = False
        self._saved_at = self._stepped_at = clock()

    def __enter__(self) -> StateSaver:
        # A program with a handler of its own, or one in the background without any, keeps that.
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        ):
            signal.signal(signal.SIGINT, self._interrupt)
            self._holds = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._release()
        if self._interrupted and kind is None:
            raise KeyboardInterrupt

    def step_done(self) -> None:
        """Save now if it is time to, which it is if it would be before the end of another such step.

        Raises:
            KeyboardInterrupt: Ctrl-C came since the last step; the state is saved.
        """
        now = self._clock()
        length, self._stepped_at = now - self._stepped_at, now
        if self._interrupted or now + length - self._saved_at >= self._interval_s:
            self.save()
        if self._interrupted:
            raise KeyboardInterrupt

    def save(self) -> None:
        """Save now."""
        self._save()
        self._saved_at = self._stepped_at = self._clock()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._interrupted = True
        self._release()

    def _release(self) -> None:
        if self._holds:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._holds = False


def save_state(path: Path, fingerprint: str, state: dict[str, Any]) -> None:
    """Replace the state in `path` in one step; `fingerprint` is of all that decides what comes of it."""
    state = {"format": _FORMAT, "fingerprint": fingerprint, **state}
    with replace_file(path) as new, new.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # it hides why writing failed
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_state(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """The state that was saved with the same `fingerprint`; a damaged one counts as none."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises many types for damaged files; start again after any
        return None
    return state if (state.get("format"), state.get("fingerprint")) == (_FORMAT, fingerprint) else None
