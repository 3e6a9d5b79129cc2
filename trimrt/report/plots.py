"""The report's plots: SVG for the page, drawn by matplotlib.

They are drawn at the width of a telephone, so that the text on them never becomes too small, and
colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/), which colour-blind readers can tell
apart; each kind of model has a marker of its own too, for paper without colour.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.colors import LinearSegmentedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from trimrt.report.axes import Cost, accuracy_axis, cost_axis, error_scale, log_ticks
from trimrt.report.results import Accuracy, LayerError, LayerRange, Model
from trimrt.report.statistics import pareto_front

INK: Final = "#1c2530"
MUTED: Final = "#5b6673"
GRID: Final = "#dde2e8"
BLUE: Final = "#0072b2"
ORANGE: Final = "#d55e00"

# kind of model: colour, marker
STYLES: Final = {
    "network": ("#4d4d4d", "o"),
    "fp32": ("#0072b2", "s"),
    "fp16": ("#009e73", "^"),
    "int8": ("#d55e00", "D"),
    "int8-dynamic": ("#b0578d", "p"),
}
KIND_COLOURS: Final = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
OTHER_COLOUR: Final = "#b8bfc7"

_WIDTH: Final = 370  # points; a telephone's page is about as wide in CSS pixels
_MATRIX_WIDTH: Final = 240
_ERRORS: Final = LinearSegmentedColormap.from_list("errors", ["#fbd9bf", ORANGE])
_DROPS: Final = LinearSegmentedColormap.from_list("drops", [ORANGE, "#ffffff", BLUE])
_STYLE: Final[dict[Any, Any]] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's font
    "text.parse_math": False,  # a class may be called "$5"
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
}


def style_of(model: Model) -> tuple[str, str]:
    """Colour and marker of a model."""
    return STYLES["network" if model.kind == "checkpoint" else model.precision]


@contextmanager
def _drawing(key: str) -> Iterator[None]:
    with mpl.rc_context({**_STYLE, "svg.hashsalt": key}), warnings.catch_warnings():
        # The font that measures the text may lack a glyph that the reader's font has.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    layout = ConstrainedLayoutEngine(w_pad=2 / 72, h_pad=2 / 72)
    figure = Figure(figsize=(width / 72, height / 72), layout=layout)
    return figure, figure.add_subplot()


def _svg(figure: Figure, key: str, alternative: str) -> str:
    """The figure as an element for the page; `key` tells its identifiers from other figures'."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    referenced = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(
        r' id="([^"]+)"', lambda found: f' id="{key}-{found[1]}"' if found[1] in referenced else "", text
    )
    text = re.sub(r'(href="|url\()#', rf"\1#{key}-", text)
    view = re.search(r'viewBox="[^"]+"', text)
    assert view is not None  # matplotlib always writes one
    label = alternative.translate({ord("&"): "&amp;", ord("<"): "&lt;", ord('"'): "&quot;"})
    head = f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {view[0]} role="img" aria-label="{label}">'
    return head + text[text.index(">") + 1 :].strip()


def trade_off(models: Sequence[Model], cost: Cost, key: str) -> tuple[str, list[Model]]:
    """Accuracy against size or latency, with the Pareto front.

    Args:
        models: of one data set, each with an accuracy and, for `latency`, a latency.
        cost: what the horizontal axis is.
        key: unique among the page's figures.

    Returns:
        The SVG, and the models on the front by rising cost.
    """
    accuracies = [_accuracy(model) for model in models]
    images = max(accuracy.images for accuracy in accuracies)
    costs = [cost_of(model, cost) for model in models]
    front = pareto_front(costs, [accuracy.top1 for accuracy in accuracies])
    with _drawing(key):
        figure, axes = _figure(_WIDTH, 280)
        axes.set_xscale("log")
        axes.set_yscale("function", functions=error_scale(images))
        _draw_front(axes, [costs[index] for index in front], [accuracies[index].top1 for index in front])
        for fitted in budget_fronts(models):
            fitted.sort(key=lambda model: cost_of(model, cost))
            axes.plot(
                [cost_of(model, cost) for model in fitted],
                [_accuracy(model).top1 for model in fitted],
                color=style_of(fitted[0])[0],
                linewidth=1.3,
                zorder=2,
            )
        for index, (model, accuracy) in enumerate(zip(models, accuracies, strict=True)):
            colour, marker = style_of(model)
            x = costs[index]
            axes.plot([x, x], [accuracy.low, accuracy.high], color=colour, linewidth=1, alpha=0.35)
            if cost == "latency" and model.latency is not None:
                ends = [model.latency.p10_ms, model.latency.p90_ms]
                axes.plot(ends, [accuracy.top1] * 2, color=colour, linewidth=1, alpha=0.35)
            axes.plot(
                [x],
                [accuracy.top1],
                marker=marker,
                markersize=7,
                color=colour,
                markerfacecolor=colour if index in front else "white",
                markeredgewidth=1.4,
                zorder=3,
            )
        low, high = min(a.low for a in accuracies), max(a.high for a in accuracies)
        accuracy_axis(axes, low, high, images)
        cost_axis(axes, costs, models, cost)
        _number(figure, axes, models, costs, accuracies)
        alternative = f"Accuracy of {len(models)} models against {cost}, with the Pareto front."
        return _svg(figure, key, alternative), [models[index] for index in front]


def budget_fronts(models: Sequence[Model]) -> list[list[Model]]:
    """Networks that one student was pruned to by budgets, of one kind and precision; two or more."""
    fronts = defaultdict[Any, list[Model]](list)
    for model in models:
        if model.front is not None:
            fronts[model.front, model.kind, model.backend, model.precision].append(model)
    return [front for front in fronts.values() if len(front) > 1]


def _accuracy(model: Model) -> Accuracy:
    assert model.accuracy is not None
    return model.accuracy


def cost_of(model: Model, cost: Cost) -> float:
    """Megabytes or milliseconds."""
    if cost == "size":
        return model.size_bytes / 1e6
    assert model.latency is not None
    return model.latency.median_ms


def _draw_front(axes: Axes, costs: list[float], gains: list[float]) -> None:
    """Steps from each point on the front to the next: nothing lies above and left of them."""
    axes.step(
        [costs[0], *costs, 1e12],
        [1e-9, *gains, gains[-1]],
        where="post",
        color=INK,
        linewidth=1,
        linestyle=(0, (4, 3)),
        alpha=0.6,
        zorder=1,
    )


def _number(
    figure: Figure,
    axes: Axes,
    models: Sequence[Model],
    costs: Sequence[float],
    accuracies: Sequence[Accuracy],
) -> None:
    """Write each model's number above its point, stacked where points are close."""
    figure.draw_without_rendering()  # settles where the points are
    scale = 72 / figure.dpi
    points = scale * axes.transData.transform(
        [(x, accuracy.top1) for x, accuracy in zip(costs, accuracies, strict=True)]
    )
    ceiling = scale * axes.bbox.y1 - 4
    placed: list[tuple[float, float]] = []
    for index in sorted(range(len(models)), key=lambda index: (points[index][0], index)):
        x, y = points[index]
        direction = 1 if y + 12 <= ceiling else -1
        height = y + 13 * direction
        while any(abs(x - left) < 13 and abs(height - other) < 11 for left, other in placed):
            height += 11 * direction
        placed.append((x, height))
        colour, _ = style_of(models[index])
        axes.annotate(
            str(models[index].number),
            (costs[index], accuracies[index].top1),
            xytext=(0, height - y),
            textcoords="offset points",
            ha="center",
            va="center",
            color=colour,
            fontweight="bold",
            fontsize=9.5,
            zorder=4,
            bbox={"boxstyle": "round,pad=0.12", "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
        ).set_in_layout(False)


def confusion_matrix(counts: NDArray[np.int64], labels: Sequence[str], key: str, alternative: str) -> str:
    """Which classes a model takes for which; only mistakes have a colour.

    Args:
        counts: images by true and predicted class, shape (classes, columns); a column beyond the
            classes is for all others.
        labels: of the columns; the first are the rows' too.
        key: unique among the page's figures.
        alternative: for who cannot see it.
    """
    rows, columns = counts.shape
    with _drawing(key):
        figure, axes = _figure(_MATRIX_WIDTH, _MATRIX_WIDTH)
        axes.set_xlim(0, columns)
        axes.set_ylim(rows, 0)
        axes.set_aspect("equal")
        lines = [((0, row), (columns, row)) for row in range(rows + 1)]
        lines += [((column, 0), (column, rows)) for column in range(columns + 1)]
        axes.add_collection(LineCollection(lines, colors=GRID, linewidths=0.5))
        size = max(4.0, min(8.0, 110 / columns))
        cells, colours = [], []
        for row, column in zip(*np.nonzero(counts), strict=True):
            count, text = int(counts[row, column]), INK
            share = min(1.0, 4 * count / int(counts[row].sum()))  # a quarter is alarming enough
            mistake = row != column and column < rows
            if mistake and share > 0.6:
                text = "white"
            elif not mistake:
                text = MUTED
            cells.append(Rectangle((column, row), 1, 1))
            colours.append(_ERRORS(share) if mistake else to_rgba("#eef1f4"))
            axes.text(
                *(column + 0.5, row + 0.5, str(count)),
                ha="center", va="center", fontsize=size + mistake, color=text,
                fontweight="bold" if mistake else "normal",
            )  # fmt: skip
        axes.add_collection(PatchCollection(cells, facecolor=colours, edgecolor="white", linewidth=0.5))
        axes.set_xticks(np.arange(columns) + 0.5, labels, fontsize=size + 0.5)
        axes.set_yticks(np.arange(rows) + 0.5, labels[:rows], fontsize=size + 0.5)
        if max(len(label) for label in labels) > 2:
            axes.tick_params(axis="x", labelrotation=90)
        axes.tick_params(length=0)
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlabel("labelled as", fontsize=8.5)
        axes.set_ylabel("shows", fontsize=8.5)
        return _svg(figure, key, alternative)


def class_drops(
    drops: NDArray[np.float64], rows: Sequence[str], labels: Sequence[str], key: str, alternative: str
) -> str:
    """How each class's accuracy differs from the reference's.

    Args:
        drops: points gained (positive) or lost, shape (models, classes).
        rows: names of the models.
        labels: of the classes.
        key: unique among the page's figures.
        alternative: for who cannot see it.
    """
    with _drawing(key):
        figure, axes = _figure(_WIDTH, 58 + 19 * len(rows) + (0 if max(map(len, labels)) <= 3 else 40))
        reach = max(1.0, float(np.abs(drops).max()))
        axes.pcolormesh(
            drops, cmap=_DROPS, vmin=-1.25 * reach, vmax=1.25 * reach, edgecolors="white", linewidth=1.5
        )
        axes.invert_yaxis()
        for (row, column), drop in np.ndenumerate(drops):
            if drop:
                axes.text(
                    *(column + 0.5, row + 0.5, f"{drop:+.1f}".replace("-", "−")),
                    ha="center", va="center", fontsize=7.5,
                )  # fmt: skip
        axes.set_xticks(np.arange(len(labels)) + 0.5, labels)
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        if max(map(len, labels)) > 3:
            axes.tick_params(axis="x", labelrotation=90)
        axes.tick_params(length=0)
        axes.grid(False)
        for spine in axes.spines.values():
            spine.set_edgecolor(GRID)
            spine.set_visible(True)
        axes.set_xlabel("class")
        return _svg(figure, key, alternative)


def _by_layer(count: int, extra: float) -> tuple[Figure, Axes, list[int]]:
    """A figure with a line for each layer, and the indices of those whose names there is room for."""
    step = max(4.0, min(13.0, 640 / count))
    figure, axes = _figure(_WIDTH, extra + step * count)
    axes.set_ylim(count - 0.4, -0.6)
    return figure, axes, list(range(0, count, math.ceil(10 / step)))


def calibration_ranges(ranges: Sequence[LayerRange], key: str, alternative: str) -> str:
    """The largest magnitudes of each layer's input and weights, on a logarithmic axis."""
    with _drawing(key):
        figure, axes, named = _by_layer(len(ranges), 66)
        rows = np.arange(len(ranges))
        low = np.array([max(layer.weights_low, 1e-9) for layer in ranges])
        high = np.array([max(layer.weights_high, 1e-9) for layer in ranges])
        axes.hlines(rows, low, high, color=ORANGE, linewidth=3.2, alpha=0.45, label="weights, all channels")
        medians = [max(layer.weights_median, 1e-9) for layer in ranges]
        axes.plot(medians, rows, "|", color=ORANGE, markersize=8, markeredgewidth=1.6, label="median channel")
        activations = [max(layer.activation, 1e-9) for layer in ranges]
        axes.plot(activations, rows, "o", color=BLUE, markersize=5, label="input")
        axes.set_xscale("log")
        left, right = min(*low, *activations) / 1.3, max(*high, *activations) * 1.3
        axes.set_xlim(left, right)
        log_ticks(axes, left, right)
        axes.set_yticks(
            named, [shorten(ranges[index].layer, 26, keep_end=True) for index in named], fontsize=8.5
        )
        axes.set_xlabel("largest magnitude that INT8 can hold")
        figure.legend(
            loc="outside upper center", ncols=3, frameon=False, fontsize=8.5,
            handletextpad=0.4, columnspacing=1.2,
        )  # fmt: skip
        return _svg(figure, key, alternative)


def sensitivity(errors: Sequence[LayerError], key: str, alternative: str) -> str:
    """The costliest layers to quantise, the worst on top."""
    with _drawing(key):
        figure, axes, named = _by_layer(len(errors), 44)
        rows = np.arange(len(errors))
        values = [100 * layer.error for layer in errors]
        axes.barh(rows, values, height=0.66, color=ORANGE)
        room = max(values) or 1.0
        axes.set_xlim(0, 1.16 * room)
        for row, value in zip(rows, values, strict=True):
            axes.text(
                value + 0.01 * room,
                float(row),
                f"{two_digits(value)}\u00a0%",
                va="center",
                fontsize=8.5,
            )
        axes.set_yticks(
            named, [shorten(errors[index].layer, 26, keep_end=True) for index in named], fontsize=8.5
        )
        axes.grid(False, axis="y")
        axes.set_xlabel("change of the logits if only this layer is INT8, %")
        return _svg(figure, key, alternative)


def latency_shares(
    rows: Sequence[str],
    shares: NDArray[np.float64],
    totals: Sequence[str],
    colours: Sequence[str],
    key: str,
    alternative: str,
) -> str:
    """Where each engine's time goes, by kind of layer.

    Args:
        rows: names of the engines.
        shares: of their time, shape (engines, kinds); each row sums to 1.
        totals: written behind the rows.
        colours: of the kinds.
        key: unique among the page's figures.
        alternative: for who cannot see it.
    """
    with _drawing(key):
        figure, axes = _figure(_WIDTH, 40 + 24 * len(rows))
        left = np.zeros(len(rows))
        positions = np.arange(len(rows))
        for kind, colour in enumerate(colours):
            axes.barh(positions, shares[:, kind], left=left, height=0.68, color=colour, edgecolor="white")
            for row, share in enumerate(shares[:, kind]):
                if share >= 0.08:
                    axes.text(
                        *(left[row] + share / 2, row, f"{share:.0%}".replace("%", "\u00a0%")),
                        ha="center", va="center", fontsize=8, color=_readable_on(colour),
                    )  # fmt: skip
            left += shares[:, kind]
        for row, total in enumerate(totals):
            axes.text(1.02, row, total, va="center", fontsize=8.5)
        axes.set_xlim(0, 1)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(positions, rows)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}\u00a0%"))
        axes.tick_params(axis="y", length=0)
        axes.grid(False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("share of the layers' time")
        return _svg(figure, key, alternative)


def _readable_on(colour: str) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 145 else INK


def two_digits(value: float) -> str:
    """A percentage to two significant digits, or to the unit."""
    return f"{value:.0f}" if value >= 9.95 else f"{value:#.2g}"


def shorten(text: str, most: int, *, keep_end: bool = False) -> str:
    """One line of at most `most` characters; names of layers and classes can be anything."""
    text = " ".join(text.split()) or "?"
    if len(text) <= most:
        return text
    return "…" + text[1 - most :] if keep_end else text[: most - 1] + "…"
