"""What runs an engine package: its manifest, the backends, and the threads they run on. Never needs torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.loading import load_engine

__all__ = ["load_engine"]


def __getattr__(name: str) -> Any:
    if name == "load_engine":  # imported only when it is asked for: `runtime.threads` alone needs no NumPy
        from runtime.loading import load_engine

        return load_engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
