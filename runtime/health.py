"""Does an engine still work? Its batches tell. A GPU that is gone for good needs a new process."""

from __future__ import annotations

import logging
from collections.abc import Callable

from runtime.cuda import DeviceLostError
from runtime.manifest import EngineError

log = logging.getLogger("trimrt.engines")


class EngineLostError(EngineError):
    """An engine that fails again and again; the message says why."""


class EngineAwayError(EngineError):
    """An engine whose process has ended, and which another process will run."""


class Health:
    """What an engine's batches say of it.

    Args:
        name: the engine's.
        patience: so many batches may fail in a row.
        on_lost: told once when it is lost.

    Attributes:
        away: why no process runs the engine for now; None if one does.
        is_lost_for_good: whether no later batch of this process can succeed.
    """

    def __init__(
        self, name: str, patience: int, on_lost: Callable[[EngineLostError], None] | None = None
    ) -> None:
        self.away: str | None = None
        self._name = name
        self._patience = patience
        self._on_lost = on_lost
        self._failures = 0
        self._reason: str | None = None
        self.is_lost_for_good = False

    @property
    def lost(self) -> str | None:
        """Why nothing can be expected of the engine; None while it works."""
        return self._reason or self.away

    def succeeded(self) -> None:
        """A batch was computed: an engine that only failed for a while is back."""
        self._failures = 0
        if self._reason is not None and not self.is_lost_for_good:
            log.warning("%s works again", self._name)
            self._reason = None

    def failed(self, error: EngineError) -> None:
        """A batch was not, for that reason."""
        self._failures += 1
        self.is_lost_for_good = self.is_lost_for_good or isinstance(error, DeviceLostError)
        if self._reason is not None or not (self.is_lost_for_good or self._failures >= self._patience):
            return
        if self.is_lost_for_good:
            self._reason = f"{self._name} lost its GPU, which only a restart of the server gets back: {error}"
        else:
            self._reason = f"{self._name} failed on {self._failures} batches in a row, at last: {error}"
        log.critical(self._reason)
        if self._on_lost is not None:
            on_lost, self._on_lost = self._on_lost, None
            on_lost(EngineLostError(self._reason))
