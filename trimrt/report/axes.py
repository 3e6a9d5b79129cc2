"""Axes of the report's trade-off plots: accuracy by its errors, and sizes or latencies by their logarithm."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from trimrt.report.results import Model

Cost = Literal["size", "latency"]

_Transform = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def error_scale(images: int) -> tuple[_Transform, _Transform]:
    """Accuracy so that halving the errors is a step of one size anywhere, and none at all is not infinite.

    Linear axes cannot show 90 % beside differences at 99.7 %.
    """

    def forward(accuracy: NDArray[np.float64]) -> NDArray[np.float64]:
        wrong: NDArray[np.float64] = np.maximum((1 - np.asarray(accuracy, float)) * images, -0.99)
        return -np.log2(wrong + 1)

    def inverse(steps: NDArray[np.float64]) -> NDArray[np.float64]:
        # The axis ends a little above 100 %, where the way back goes on smoothly.
        return 1 - (2.0 ** -np.asarray(steps, float) - 1) / images

    return forward, inverse


def accuracy_axis(axes: Axes, low: float, high: float, images: int) -> None:
    """Ticks at round accuracies on the left, and at numbers of wrong images on the right."""
    forward, inverse = error_scale(images)
    if (1 - high) * images < 1:
        high = 1.0
    bottom, top = float(forward(np.array(low))), float(forward(np.array(high)))
    margin = 0.06 * (top - bottom)
    bottom, top = bottom - margin, top + margin / 2
    ends = inverse(np.array([bottom, top]))
    axes.set_ylim(float(ends[0]), float(ends[1]))
    ticks = spread_ticks(
        [(1 - error, float(forward(np.array(1 - error)))) for error in _round_errors(0.5 / images)],
        bottom,
        top,
        6,
    )
    digits = max((_decimals(100 * tick) for tick in ticks), default=0)
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.{digits}f}\u00a0%"))
    axes.set_ylabel("test accuracy")
    wrong = axes.twinx()  # not a secondary axis, which would not take the scale
    wrong.set_yscale("function", functions=(forward, inverse))
    wrong.set_ylim(axes.get_ylim())
    counts = [
        *(factor * 10**power for factor in (1, 2, 5, 3) for power in range(9)),
        *(
            factor * 10**power
            for factor in (12, 14, 16, 18, 25, 35, 40, 45, 60, 70, 80)
            for power in range(8)
        ),
    ]
    positions = [
        (1 - count / images, float(forward(np.array(1 - count / images))))
        for count in [0, *counts]
        if count <= images
    ]
    wrong.yaxis.set_major_locator(FixedLocator(spread_ticks(positions, bottom, top, 7)))
    wrong.yaxis.set_minor_locator(NullLocator())
    wrong.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{round((1 - value) * images):,}"))
    wrong.set_ylabel(f"wrong of {images:,}")
    wrong.tick_params(length=0)
    wrong.grid(False)


def _round_errors(smallest: float) -> list[float]:
    """Shares of errors of which none or at least the smallest are made, the roundest accuracies first."""
    small = [factor * 10.0**power for factor in (1, 5, 2, 3, 7, 4, 6, 8, 1.5, 2.5) for power in range(-6, -1)]
    errors = [*(tenths / 10 for tenths in range(1, 11)), *small, 0.15, 0.25, 0.35, 0.45]
    whole = (percent / 100 for percent in range(1, 100))
    return [0.0, *(error for error in [*errors, *whole] if error >= smallest)]


def spread_ticks(
    candidates: Sequence[tuple[float, float]], bottom: float, top: float, most: int
) -> list[float]:
    """Values of those (value, position) candidates that are in view and far enough from each other."""
    chosen: list[tuple[float, float]] = []
    distance = (top - bottom) / most
    for value, position in candidates:
        if bottom <= position <= top and all(abs(position - other) >= distance for _, other in chosen):
            chosen.append((value, position))
    return sorted(value for value, _ in chosen)


def _decimals(percentage: float) -> int:
    return next((digits for digits in range(6) if abs(percentage - round(percentage, digits)) < 1e-7), 6)


def cost_axis(axes: Axes, costs: Sequence[float], models: Sequence[Model], cost: Cost) -> None:
    """A logarithmic axis of sizes or latencies, wide enough for the latencies' spread."""
    low, high = min(costs), max(costs)
    if cost == "latency":
        latencies = [model.latency for model in models if model.latency is not None]
        low = min(low, *(latency.p10_ms for latency in latencies))
        high = max(high, *(latency.p90_ms for latency in latencies))
    # At least a factor of two in view, or a set of equals would look scattered.
    margin = max((high / low) ** 0.06, math.sqrt(2 * low / high), 1.05)
    axes.set_xlim(low / margin, high * margin)
    log_ticks(axes, low / margin, high * margin)
    axes.set_xlabel("size on disk, MB" if cost == "size" else "median latency of one image, ms")


def log_ticks(axes: Axes, low: float, high: float) -> None:
    """Plain numbers, as many as there is room for."""
    decades = math.log10(high / low)
    factors = [1.0, 2.0, 5.0] if decades < 2.7 else [1.0]
    if decades < 0.8:
        factors = [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0]
    axes.xaxis.set_major_locator(LogLocator(subs=factors, numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
