"""A load test from its plan to its report: every load in turn, with the server's own view of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Final

import httpx
from prometheus_client.parser import text_string_to_metric_families

from trimrt.loadtest.generators import Recorder, closed_loop, open_loop
from trimrt.loadtest.requests import Body, LoadTestError, find_images, make_bodies, reason_of
from trimrt.loadtest.results import Latencies, Point, Report, Scenario, Thresholds, unit_of

_MULTI_STREAM_IMAGES: Final = 8  # MLPerf Inference: samples in a query of the multi-stream scenario
_OFFLINE_IMAGES: Final = 16
_OFFLINE_CONNECTIONS: Final = 4

StartPoint = Callable[[float], Callable[[float, int], None]]


@dataclass(frozen=True)
class Plan:
    """What to send, and how.

    Attributes:
        loads: connections to keep busy, or for the `server` scenario requests a second; swept in order.
        images: a folder of images, or one.
        warmup, duration: of each load, seconds.
        seed: of the arrival times.
    """

    url: str
    scenario: Scenario
    loads: tuple[float, ...]
    images: Path
    warmup: float
    duration: float
    engine: str | None = None
    api_key: str | None = None
    seed: int = 0

    @property
    def images_per_request(self) -> int:
        """One, but for the scenarios that MLPerf defines otherwise."""
        return {"multi-stream": _MULTI_STREAM_IMAGES, "offline": _OFFLINE_IMAGES}.get(self.scenario, 1)


def default_loads(scenario: Scenario) -> tuple[float, ...]:
    """What a scenario sends unless told otherwise."""
    return {
        "single-stream": (1.0,),
        "multi-stream": (1.0,),
        "offline": (float(_OFFLINE_CONNECTIONS),),
        "server": (10.0, 20.0, 50.0, 100.0),
        "closed-loop": (1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
    }[scenario]


def run(plan: Plan, thresholds: Thresholds, start_point: StartPoint) -> Report:
    """Send every load of `plan`.

    Args:
        plan: what to send.
        thresholds: what every load must keep.
        start_point: called with every load before it is sent; returns the function that shows its progress.

    Raises:
        LoadTestError: the server does not answer, refuses the first image, or there are no images.
    """
    images = find_images(plan.images)
    bodies = make_bodies(images, plan.images_per_request)
    url = f"{plan.url.rstrip('/')}/predict" + (f"?engine={plan.engine}" if plan.engine else "")
    headers = {"X-API-Key": plan.api_key} if plan.api_key else {}
    engine = _try(url, next(bodies), headers)
    points = []
    for load in plan.loads:
        progress = start_point(load)
        before = _stage_sums(plan.url)
        if plan.scenario == "server":
            recorder = open_loop(
                url, headers, bodies, load, plan.warmup, plan.duration, progress, seed=plan.seed
            )
        else:
            recorder = closed_loop(url, headers, bodies, int(load), plan.warmup, plan.duration, progress)
        points.append(_point(load, plan.images_per_request, recorder, before, _stage_sums(plan.url)))
    return Report(
        scenario=plan.scenario,
        unit=unit_of(plan.scenario),
        url=plan.url,
        engine=engine,
        images=len(images),
        images_per_request=plan.images_per_request,
        started_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        points=points,
        failures=thresholds.missed(points),
    )


def _try(url: str, body: Body, headers: dict[str, str]) -> str:
    """Send one request, to fail at once if something is wrong; a description of the engine that answered."""
    try:
        response = httpx.post(url, content=body.data, headers={**headers, "Content-Type": body.content_type})
    except httpx.TransportError as error:
        raise LoadTestError(f"{url} does not answer ({error}); `trimrt serve` starts a server") from None
    if response.status_code != 200:
        raise LoadTestError(
            f"{url} refuses the first image: {reason_of(response.status_code, response.content)}"
        )
    engine = response.json()["engine"]
    return f"{engine['name']} {engine['version']} ({engine['precision']}, {engine['backend']})"


def _stage_sums(url: str) -> dict[str, tuple[float, float]]:
    """Seconds and images by stage, as the server counted them since its start."""
    sums: dict[str, tuple[float, float]] = {}
    text = httpx.get(f"{url.rstrip('/')}/metrics").text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("trimrt_stage_duration_seconds_"):
                seconds, images = sums.get(sample.labels["stage"], (0.0, 0.0))
                if sample.name.endswith("_sum"):
                    seconds += sample.value
                elif sample.name.endswith("_count"):
                    images += sample.value
                sums[sample.labels["stage"]] = seconds, images
    return sums


def _point(
    load: float,
    images_per_request: int,
    recorder: Recorder,
    before: dict[str, tuple[float, float]],
    after: dict[str, tuple[float, float]],
) -> Point:
    answered, errors = len(recorder.seconds), dict(recorder.errors)
    stages = {}
    for stage, (seconds, images) in after.items():
        earlier_seconds, earlier_images = before.get(stage, (0.0, 0.0))
        if images > earlier_images:
            stages[stage] = (seconds - earlier_seconds) / (images - earlier_images) * 1000
    return Point(
        load=load,
        duration_s=recorder.elapsed,
        requests=answered + sum(errors.values()),
        answered=answered,
        errors=errors,
        requests_per_s=answered / recorder.elapsed,
        images_per_s=answered * images_per_request / recorder.elapsed,
        latency_ms=Latencies.of(recorder.seconds),
        send_lag_ms=Latencies.of(recorder.lags).p99,
        stages_ms=stages,
    )
