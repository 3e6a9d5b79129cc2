"""What a network was pruned to cost: asked, predicted and measured. This module imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

Kind = Literal["latency_ms", "size_mb", "macs"]

UNITS: Final[dict[Kind, str]] = {"latency_ms": "ms", "size_mb": "MB", "macs": "multiply-accumulates"}
_NAMES: Final[dict[Kind, str]] = {"latency_ms": "latency", "size_mb": "size", "macs": "work"}
_SHORT: Final[dict[Kind, tuple[float, str]]] = {
    "latency_ms": (1, "ms"),
    "size_mb": (1, "mb"),
    "macs": (1e6, "mmacs"),
}
_TOLERANCE: Final = 1.05  # timings of one engine differ by as much


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Cost(_Strict):
    """One thing that a network costs, in the unit of its kind."""

    asked: float = Field(gt=0, description="that it cost at most")
    predicted: float = Field(description="from the widths alone")
    measured: float | None = Field(
        default=None, description="of a network of these widths; None: not where it was pruned"
    )


class Device(_Strict):
    """Where, and as what, a network is to run: what its latency table is of."""

    machine: str = Field(description="processor, GPU or board, as its system names it")
    cores: int
    power: str | None = None
    backend: str
    precision: str
    batch: int

    def __str__(self) -> str:
        cores = f"{self.cores} core{'s' if self.cores > 1 else ''}"
        images = "1 image" if self.batch == 1 else f"{self.batch} images"
        return f"{images} on {self.machine}, {cores}, {self.backend}, {self.precision}"


class Promise(_Strict):
    """What a network was pruned to cost."""

    costs: dict[Kind, Cost] = Field(min_length=1)
    device: Device | None = Field(default=None, description="of the latency; None: none was asked for")

    @property
    def suffix(self) -> str:
        """What was asked, as part of a name, such as `2ms`."""
        return "-".join(
            f"{self.costs[kind].asked / scale:.4g}{unit}"
            for kind, (scale, unit) in _SHORT.items()
            if kind in self.costs
        )

    def lines(self) -> Iterator[str]:
        """Each cost in words."""
        for kind, cost in self.costs.items():
            where = f" ({self.device})" if kind == "latency_ms" and self.device else ""
            measured = "not measured" if cost.measured is None else f"{cost.measured:.4g} measured"
            yield (
                f"{_NAMES[kind]}: {cost.asked:.4g} {UNITS[kind]} asked, {cost.predicted:.4g} predicted, "
                f"{measured}{where}"
            )

    def missed(self, found: dict[Kind, float]) -> Iterator[str]:
        """In words, what costs more than was asked, and by how much."""
        for kind, value in found.items():
            asked = self.costs[kind].asked if kind in self.costs else value
            if value > _TOLERANCE * asked:
                over = f"{value / asked - 1:.0%} over the {asked:.4g} asked"
                yield f"{_NAMES[kind]}: {value:.4g} {UNITS[kind]}, {over}"
