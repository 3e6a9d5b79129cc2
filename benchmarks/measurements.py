"""What one run of the benchmark measured: the JSON that tables and plots are made from."""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Final, Literal

import psutil
from pydantic import BaseModel, Field

from benchmarks.limit import Limit
from benchmarks.load import Load

SMALL: Final = "640x427"
LARGE: Final = "12 MP"
LARGE_CONNECTIONS: Final = 8


class Measurement(BaseModel):
    """One load on one server."""

    photograph: str = Field(description="`640x427` or `12 MP`")
    connections: int
    load: Load
    cpu_ms: float = Field(description="processor time of the whole process tree for one image")


class Run(BaseModel):
    """One start of one server, and the loads on it."""

    name: str
    title: str
    form: Literal["usual", "trimrt"]
    start_seconds: float = Field(description="from the start of the process to the first right answer")
    idle_mb: float = Field(description="memory after that answer, in megabytes")
    loaded_mb: float = Field(description="memory after the last load")
    installed_mb: float
    measurements: list[Measurement]

    def at(self, photograph: str, connections: int) -> Measurement | None:
        """The measurement of that load, if it was made."""
        for measurement in self.measurements:
            if (measurement.photograph, measurement.connections) == (photograph, connections):
                return measurement
        return None


class Machine(BaseModel):
    """Where it was measured."""

    processor: str
    cores: int
    memory_gb: float
    system: str
    python: str


class Results(BaseModel):
    """One run of the benchmark, in the order in which it was measured."""

    started_at: datetime
    machine: Machine
    seconds: float = Field(description="of each load")
    runs: list[Run | Limit] = []
    failures: list[str] = Field(default=[], description="servers that could not be measured, and why")

    def neighbours(self, index: int) -> list[Run]:
        """TrimRT's runs just before and just after the one at `index`."""
        ours = [isinstance(run, Run) and run.name == "trimrt" for run in self.runs]
        before = max((place for place in range(index) if ours[place]), default=None)
        after = min((place for place in range(index + 1, len(ours)) if ours[place]), default=None)
        found = [self.runs[place] for place in (before, after) if place is not None]
        return [run for run in found if isinstance(run, Run)]


def this_machine() -> Machine:
    """The machine that this runs on."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return Machine(
        processor=names[0] if names else platform.machine(),
        cores=psutil.cpu_count() or 1,
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        system=platform.platform(),
        python=platform.python_version(),
    )


def now() -> datetime:
    """The time, with its zone."""
    return datetime.now(timezone.utc)
