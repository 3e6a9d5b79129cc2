"""The report as one HTML file that needs nothing else: plots are SVG, drawn here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Final

from trimrt.loadtest.results import Report

_WIDTH: Final = 560
_HEIGHT: Final = 260
_LEFT: Final = 58
_BOTTOM: Final = 34
_STAGES: Final = ("decode", "queue", "inference")
_COLOURS: Final = {
    "p50": "#0d8f84",
    "p95": "#c98a0b",
    "p99": "#c2410c",
    "p99_9": "#8b1e3f",
    "answered": "#2f6fde",
    "decode": "#2f6fde",
    "queue": "#c98a0b",
    "inference": "#0d8f84",
}

_STYLE: Final = Path(__file__).with_name("report.css")


def render(report: Report) -> str:
    """The whole page."""
    verdict = (
        "".join(f'<p class="bad">Missed: {escape(failure)}</p>' for failure in report.failures)
        or '<p class="good">No threshold was missed.</p>'
    )
    percentiles = ("p50", "p95", "p99", "p99_9")
    latency = _lines(
        report,
        {name: [getattr(point.latency_ms, name) for point in report.points] for name in percentiles},
        "ms",
    )
    throughput = _lines(report, {"answered": [point.requests_per_s for point in report.points]}, "/s")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>TrimRT load test: {escape(report.scenario)}</title><style>{_STYLE.read_text()}</style>
</head><body><main>
<header><h1>Load test: {escape(report.scenario)}</h1>
<p>{escape(report.engine)} at {escape(report.url)}, {escape(report.started_at)};
{report.images} different images, {report.images_per_request} to a request</p>{verdict}</header>
<section><h2>Latency against load</h2>{latency}{_legend(percentiles)}</section>
<section><h2>Throughput against load</h2>{throughput}{_legend(["answered"])}</section>
<section><h2>Where an image's time went, by the server</h2>{_bars(report)}{_legend(_STAGES)}</section>
<section><h2>Errors by reason</h2>{_errors(report)}</section>
<section class="wide"><h2>Numbers</h2>{_table(report)}</section>
</main></body></html>
"""


def _legend(names: Sequence[str]) -> str:
    items = (
        f'<span><i style="background:{_COLOURS[name]}"></i>{name.replace("p99_9", "p99.9")}</span>'
        for name in names
    )
    return f'<p class="legend">{"".join(items)}</p>'


def _nice_ceiling(value: float) -> float:
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)


def _axes(report: Report, ceiling: float, unit: str) -> list[str]:
    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = _y(share, 1)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{share * ceiling:g} {unit}</text>'
        )
    for number, point in enumerate(report.points):
        x = _x(number, len(report.points))
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 18}" text-anchor="middle">{point.load:g}</text>')
    parts.append(f'<text x="{_WIDTH}" y="{_HEIGHT - 3}" text-anchor="end">{report.unit}</text>')
    return parts


def _x(number: int, count: int) -> float:
    return _LEFT + (_WIDTH - _LEFT) * (number + 0.5) / count


def _y(value: float, ceiling: float) -> float:
    return 8 + (_HEIGHT - _BOTTOM - 8) * (1 - value / ceiling)


def _svg(parts: Sequence[str], label: str) -> str:
    box = f"0 0 {_WIDTH} {_HEIGHT}"
    return f'<svg viewBox="{box}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _lines(report: Report, series: Mapping[str, Sequence[float | None]], unit: str) -> str:
    ceiling = _nice_ceiling(max((value or 0.0 for values in series.values() for value in values), default=0))
    parts = _axes(report, ceiling, unit)
    for name, values in series.items():
        spots = [
            (_x(number, len(values)), _y(value, ceiling))
            for number, value in enumerate(values)
            if value is not None
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{_COLOURS[name]}" stroke-width="2"/>')
        parts.extend(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{_COLOURS[name]}"/>' for x, y in spots)
    return _svg(parts, f"{', '.join(series)} against {report.unit}")


def _bars(report: Report) -> str:
    totals = [sum(point.stages_ms.get(stage, 0.0) for stage in _STAGES) for point in report.points]
    ceiling = _nice_ceiling(max(totals, default=0.0))
    parts = _axes(report, ceiling, "ms")
    width = min(48.0, 0.6 * (_WIDTH - _LEFT) / max(1, len(report.points)))
    for number, point in enumerate(report.points):
        left, below = _x(number, len(report.points)) - width / 2, 0.0
        for stage in _STAGES:
            value = point.stages_ms.get(stage, 0.0)
            top, bottom = _y(below + value, ceiling), _y(below, ceiling)
            parts.append(
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{bottom - top:.1f}" '
                f'fill="{_COLOURS[stage]}"><title>{stage} {value:.2f} ms</title></rect>'
            )
            below += value
    return _svg(parts, "mean time of an image by stage")


def _errors(report: Report) -> str:
    rows = [
        f"<tr><td>{point.load:g}</td><td>{escape(reason)}</td><td>{count}</td></tr>"
        for point in report.points
        for reason, count in sorted(point.errors.items())
    ]
    if not rows:
        return "<p>None.</p>"
    return f"<table><tr><th>{report.unit}</th><th>reason</th><th>requests</th></tr>{''.join(rows)}</table>"


def _table(report: Report) -> str:
    names = ("mean", "p50", "p90", "p95", "p99", "p99_9", "max")
    head = "".join(f"<th>{name.replace('p99_9', 'p99.9')} ms</th>" for name in names)
    rows = []
    for point in report.points:
        latency = (getattr(point.latency_ms, name) for name in names)
        cells = "".join(f"<td>{'–' if value is None else f'{value:.2f}'}</td>" for value in latency)
        lag = "" if point.send_lag_ms is None else f"{point.send_lag_ms:.2f}"
        rows.append(
            f"<tr><td>{point.load:g}</td><td>{point.requests}</td><td>{point.answered}</td>"
            f"<td>{point.requests_per_s:.1f}</td><td>{point.images_per_s:.1f}</td>{cells}<td>{lag}</td></tr>"
        )
    return (
        f"<table><tr><th>{report.unit}</th><th>requests</th><th>answered</th><th>requests/s</th><th>images/s</th>"
        f"{head}<th>send lag p99 ms</th></tr>{''.join(rows)}</table>"
    )
