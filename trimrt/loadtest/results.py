"""What a load test measured, and whether it is good enough."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, Field

Scenario = Literal["single-stream", "multi-stream", "server", "offline", "closed-loop"]
Unit = Literal["requests/s", "connections"]

PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p99_9": 99.9}


def unit_of(scenario: Scenario) -> Unit:
    """What a scenario's loads are counted in."""
    return "requests/s" if scenario == "server" else "connections"


class Latencies(BaseModel):
    """Milliseconds over the answered requests; None when there were none."""

    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    p99_9: float | None = None
    max: float | None = None

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latencies:
        """Exact percentiles (nearest rank)."""
        if not seconds:
            return cls()
        milliseconds = 1000 * np.array(seconds)
        found = np.percentile(milliseconds, list(PERCENTILES.values()), method="inverted_cdf").tolist()
        return cls(
            mean=float(milliseconds.mean()),
            max=float(milliseconds.max()),
            **dict(zip(PERCENTILES, found, strict=True)),
        )


class Point(BaseModel):
    """One load."""

    load: float = Field(description="requests a second that were sent, or connections that were kept busy")
    duration_s: float
    requests: int
    answered: int
    errors: dict[str, int] = Field(description="by problem type, HTTP status or exception")
    requests_per_s: float = Field(description="answered with success")
    images_per_s: float
    latency_ms: Latencies
    send_lag_ms: float | None = Field(
        default=None, description="open loop: 99th percentile of how late the generator itself sent"
    )
    stages_ms: dict[str, float] = Field(
        default={}, description="mean time of an image in each stage, by the server's own metrics"
    )


class Report(BaseModel):
    """One load test."""

    scenario: Scenario
    unit: Unit
    url: str
    engine: str
    images: int = Field(description="different images sent in turn")
    images_per_request: int
    started_at: str
    points: list[Point]
    failures: list[str] = Field(default=[], description="thresholds that were missed")


class Thresholds(BaseModel):
    """What every point must keep; None does not matter."""

    p99_ms: float | None = None
    min_rps: float | None = None
    max_errors: float | None = None

    def missed(self, points: Sequence[Point]) -> list[str]:
        """What `points` miss, for people."""
        failures = []
        for point in points:
            p99 = point.latency_ms.p99
            if self.p99_ms is not None and (p99 is None or p99 > self.p99_ms):
                measured = "nothing was answered" if p99 is None else f"p99 is {p99:.1f} ms"
                failures.append(f"at load {point.load:g}: {measured}, the limit is {self.p99_ms:g} ms")
            if self.min_rps is not None and point.requests_per_s < self.min_rps:
                failures.append(
                    f"at load {point.load:g}: {point.requests_per_s:.1f} requests/s, "
                    f"the least is {self.min_rps:g}"
                )
            share = sum(point.errors.values()) / max(1, point.requests)
            if self.max_errors is not None and share > self.max_errors:
                failures.append(
                    f"at load {point.load:g}: {share:.2%} errors, the limit is {self.max_errors:.2%}"
                )
        return failures
