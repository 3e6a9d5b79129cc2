"""How the server ends: not ready first, then no new work, then nothing left to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Lifecycle:
    """Where the application stands between start and stop.

    Attributes:
        draining: a stop was asked for; readiness is off, and connections are not kept alive.
        refusing: new inference requests are turned away.
    """

    draining: bool = False
    refusing: bool = False
