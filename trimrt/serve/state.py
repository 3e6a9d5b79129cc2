"""Which engines all workers serve, so that a new one serves the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from runtime.manifest import EngineError
from server.registry import Change, Load, MakeDefault


class State:
    """The engines of the fleet.

    Args:
        packages: folders of the engine packages to begin with, the default engine's first.
    """

    def __init__(self, packages: Sequence[Path]) -> None:
        self._first = packages
        self._served: dict[str, tuple[Path, str]] | None = None  # see `Registry.served`
        self._default: str | None = None

    @property
    def packages(self) -> Sequence[Path]:
        """The folders of the packages that a new worker loads, the default engine's first."""
        if self._served is None:
            return self._first
        names = sorted(self._served, key=lambda name: name != self._default)
        return [self._served[name][0] for name in names]

    def check(self, served: Mapping[str, tuple[Path, str]]) -> None:
        """Compare what a worker has loaded with what the others serve; the first one's is what counts.

        Raises:
            EngineError: it differs, because a package has changed since.
        """
        if self._served is None:
            self._served = dict(served)
            self._default = next(iter(served), None)
        for name, loaded in self._served.items():
            if served.get(name) != loaded:
                raise EngineError(f"{loaded[0]} has changed since the other workers loaded it; load it again")

    def apply(self, change: Change, name: str, manifest: str) -> None:
        """Note a change of the engine `name`, whose manifest is given in JSON."""
        assert self._served is not None
        if isinstance(change, Load):
            self._served[name] = change.folder, manifest
            self._default = self._default or name
        elif isinstance(change, MakeDefault):
            self._default = name
        else:
            del self._served[name]
