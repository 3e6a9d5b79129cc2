"""What one run of the benchmark measured: the JSON that tables and plots are made from."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final, Literal

import click
import psutil
from pydantic import BaseModel, Field

from benchmarks.limit import Settings
from benchmarks.load import Load, Round, cpu_milliseconds, merge
from runtime.processor import processor

SMALL: Final = "640x427"
LARGE: Final = "12 MP"
DIGIT: Final = "8x8 PNG"
LARGE_CONNECTIONS: Final = 8


class Measurement(BaseModel):
    """All rounds of one load."""

    photograph: str = Field(description="`640x427`, `12 MP` or `8x8 PNG`")
    connections: int
    load: Load = Field(description="of all rounds together")
    rounds: list[float] = Field(description="throughput of each round")
    cpu_ms: float = Field(description="processor time of the whole process tree for one image")

    @classmethod
    def of(cls, photograph: str, connections: int, rounds: Sequence[Round]) -> Measurement:
        """What the rounds measured."""
        return cls(
            photograph=photograph,
            connections=connections,
            load=merge(rounds),
            rounds=[one.throughput for one in rounds],
            cpu_ms=cpu_milliseconds(rounds),
        )


class _Measured(BaseModel):
    measurements: list[Measurement]

    def at(self, photograph: str, connections: int) -> Measurement | None:
        """The measurement of that load, if it was made."""
        for measurement in self.measurements:
            if (measurement.photograph, measurement.connections) == (photograph, connections):
                return measurement
        return None


class Run(_Measured):
    """One start of one server, and the loads on it."""

    name: str
    title: str = Field(description="what tells it from others, also of the same server in other ways")
    form: Literal["usual", "trimrt"]
    start_seconds: float = Field(description="from the start of the process to the first right answer")
    idle_mb: float = Field(description="memory after that answer, in megabytes")
    loaded_mb: float = Field(description="memory after the last load")
    installed_mb: float


class Limit(_Measured):
    """The loop without a server; `connections` are those of the server that it took turns with.

    Beside one connection it works on one image after the other with all threads, and beside several as is
    best for throughput; a latency is then that of a whole batch.
    """

    settings: dict[str, Settings] = Field(description="by photograph")


class Comparison(BaseModel):
    """TrimRT and another, loaded in turns."""

    other: Run | Limit
    trimrt: Run

    def ratio(self, photograph: str, connections: int, of: Callable[[Measurement], float]) -> float | None:
        """TrimRT's figure over the other's, if both were measured."""
        mine, theirs = self.trimrt.at(photograph, connections), self.other.at(photograph, connections)
        return of(mine) / of(theirs) if mine and theirs and of(theirs) else None

    def round_ratios(self, photograph: str, connections: int) -> list[float]:
        """TrimRT's throughput over the other's, round by round."""
        mine, theirs = self.trimrt.at(photograph, connections), self.other.at(photograph, connections)
        if mine is None or theirs is None:
            return []
        return [ours / other for ours, other in zip(mine.rounds, theirs.rounds, strict=True) if other]


class Machine(BaseModel):
    """Where it was measured."""

    processor: str
    instruction_sets: list[str] = Field(default=[], description="those that decide which kernels run")
    cores: int
    memory_gb: float
    system: str
    python: str

    def check_same(self, before: Machine, path: Path) -> None:
        """Refuse to add to the results at `path`, which were measured on another machine.

        Raises:
            click.ClickException: it is another one.
        """
        if (before.processor, before.cores) != (self.processor, self.cores):
            raise click.ClickException(f"{path} was measured on another machine: {before}")

    def __str__(self) -> str:
        """As reports begin."""
        kernels = f" ({', '.join(self.instruction_sets)})" if self.instruction_sets else ""
        return f"{self.processor}{kernels}, {self.cores} cores, {self.memory_gb:g} GB, Python {self.python}"


class Results(BaseModel):
    """One run of the benchmark, in the order in which it was measured."""

    started_at: datetime
    machine: Machine
    seconds: float = Field(description="of each load, in all its rounds")
    comparisons: list[Comparison] = []
    server_cpu_ms: float | None = Field(
        default=None, description="processor time of TrimRT for one request, less decoding and inference"
    )
    agreement: float | None = Field(
        default=None, description="share of labels that are the same after scaled and after full decoding"
    )
    failures: list[str] = Field(default=[], description="servers that could not be measured, and why")

    @property
    def ours(self) -> list[Run]:
        """All runs of TrimRT."""
        return [comparison.trimrt for comparison in self.comparisons]

    @property
    def others(self) -> list[Run]:
        """The runs of the servers that took turns with it, which may be TrimRT in other ways."""
        return [each.other for each in self.comparisons if isinstance(each.other, Run)]

    @property
    def photograph(self) -> str:
        """What was mostly posted."""
        return next((it.photograph for run in self.ours for it in run.measurements), SMALL)

    def beside(self, title: str) -> Comparison | None:
        """The comparison with the server of that title, if there is one."""
        runs = (it for it in self.comparisons if isinstance(it.other, Run) and it.other.title == title)
        return next(runs, None)

    @property
    def limit(self) -> Limit | None:
        """The loop without a server, if it was measured."""
        return next((each.other for each in self.comparisons if isinstance(each.other, Limit)), None)


def this_machine() -> Machine:
    """The machine that this runs on."""
    name, instruction_sets = processor()
    return Machine(
        processor=name or platform.machine(),
        instruction_sets=instruction_sets,
        cores=psutil.cpu_count() or 1,
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        system=platform.platform(),
        python=platform.python_version(),
    )
