"""The report as one HTML file that needs nothing else: a template, a style sheet, and SVG plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray

from trimrt.report import plots
from trimrt.report.axes import Cost
from trimrt.report.results import Accuracy, Group, LayerRange, LayerTime, Measured, Model, Report

_FOLDER: Final = Path(__file__).parent
_CLASSES: Final = 20  # a confusion matrix of more cannot be read
_CHANGES: Final = 12  # classes in the table of changes
_SENSITIVE_LAYERS: Final = 12
_SLOW_LAYERS: Final = 6
_LABEL: Final = 12  # characters of a class's name in a plot
_SPACE: Final = "\u00a0"  # keeps a number and its unit on one line


@dataclass(frozen=True)
class Figure:
    """A plot with its caption, and the models that it is of, unless it is of all."""

    svg: Markup
    title: str
    caption: str
    models: tuple[Model, ...] = ()


@dataclass(frozen=True)
class Tile:
    """One figure that a reader looks for first."""

    title: str
    value: str
    model: Model
    text: str


@dataclass(frozen=True)
class Absence:
    """Models that a section does not show, and why."""

    models: list[Model]
    reason: str


@dataclass(frozen=True)
class SlowLayer:
    """A line of the list of slowest layers."""

    layer: LayerTime
    share: float
    length: float  # of its bar; the slowest layer's is 1


@dataclass(frozen=True)
class Profile:
    """Where one engine's time goes."""

    model: Model
    total_ms: float
    layers: int
    slowest: list[SlowLayer]


@dataclass(frozen=True)
class GroupView:
    """What the page shows of the models of one data set."""

    group: Group
    models: list[Model]
    tiles: list[Tile]
    trade_offs: list[Figure]
    trade_offs_absent: list[Absence]
    confusions: list[Figure]
    confusions_note: str
    confusions_absent: list[Absence]
    drops: Figure | None
    drops_note: str
    drops_absent: list[Absence]


def render(report: Report) -> str:
    """The whole page; all that it says is in `report`."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "count": count,
        "megabytes": megabytes,
        "milliseconds": milliseconds,
    }
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    profiles, shares, kinds = _profiles(report.models)
    return environment.get_template("page.html").render(
        report=report,
        style=Markup(style),
        style_of=plots.style_of,
        smaller=_smaller,
        faster=_faster,
        groups=[_group_view(index, report) for index in range(len(report.groups))],
        quantisation=_quantisation(report.models),
        quantisation_absent=_absent(report.models, "ranges", "sensitivity"),
        profiles=profiles,
        shares=shares,
        kinds=kinds,
        profiles_absent=_absent(report.models, "profile"),
        engines=[model for model in report.models if model.kind == "engine"],
    )


def percent(share: float) -> str:
    """A share in percent, to two decimals."""
    return f"{100 * share:.2f}{_SPACE}%"


def count(number: int) -> str:
    """Parameters or multiply-accumulates."""
    for unit, size in (("G", 1e9), ("M", 1e5), ("k", 1e3)):
        if number >= size:
            return f"{number / (1e6 if unit == 'M' else size):.2f}{_SPACE}{unit}"
    return str(number)


def megabytes(size: int) -> str:
    """A file's size, of 10^6 bytes."""
    return f"{_three_digits(size / 1e6)}{_SPACE}MB" if size >= 10_000 else f"{size / 1e3:.1f}{_SPACE}kB"


def milliseconds(time: float) -> str:
    """A time, to three digits."""
    return f"{_three_digits(time)}{_SPACE}ms"


def _three_digits(value: float) -> str:
    digits = next((digits for limit, digits in ((100, 0), (10, 1), (1, 2)) if value >= limit), 3)
    return f"{value:,.{digits}f}"


def _ratio(ratio: float, better: str, worse: str) -> str:
    """In words; nothing where the two are alike to two digits."""
    word, ratio = (better, ratio) if ratio >= 1 else (worse, 1 / ratio)
    if ratio < 1.05:
        return ""
    return f"{ratio:,.0f}× {word}" if ratio >= 9.95 else f"{ratio:.1f}× {word}"


def _smaller(model: Model, models: Sequence[Model]) -> str:
    """How the size compares with that of the first model."""
    if model is models[0] or not model.size_bytes or not models[0].size_bytes:
        return ""
    return _ratio(models[0].size_bytes / model.size_bytes, "smaller", "larger")


def _faster(model: Model, models: Sequence[Model]) -> str:
    """How the median latency compares with that of the first model."""
    first = models[0].latency
    if model is models[0] or model.latency is None or first is None:
        return ""
    return _ratio(first.median_ms / model.latency.median_ms, "faster", "slower")


def _absent(models: Iterable[Model], *needed: Measured) -> list[Absence]:
    """Models that lack something, by reason."""
    reasons: dict[str, list[Model]] = {}
    for model in models:
        reason = next((model.missing[what] for what in needed if getattr(model, what) is None), None)
        if reason is not None:
            reasons.setdefault(reason, []).append(model)
    return [Absence(lacking, reason) for reason, lacking in reasons.items()]


def _group_view(index: int, report: Report) -> GroupView:
    group = report.groups[index]
    models = [model for model in report.models if model.group == index]
    scored = [(model, model.accuracy) for model in models if model.accuracy is not None]
    confusions, confusions_note = _confusions(index, group, scored)
    drops, drops_note = _drops(index, group, models)
    return GroupView(
        group=group,
        models=models,
        tiles=_tiles(models),
        trade_offs=_trade_offs(index, [model for model, _ in scored]),
        trade_offs_absent=_absent(models, "accuracy", "latency"),
        confusions=confusions,
        confusions_note=confusions_note,
        confusions_absent=_absent(models, "accuracy"),
        drops=drops,
        drops_note=drops_note,
        drops_absent=_absent(models, "agreement"),
    )


def _tiles(models: list[Model]) -> list[Tile]:
    scored = [(model, model.accuracy) for model in models if model.accuracy is not None]
    tiles = []
    if scored:
        best, accuracy = max(scored, key=lambda pair: (pair[1].top1, -pair[0].size_bytes))
        ties = sum(other.top1 == accuracy.top1 for _, other in scored) - 1
        text = f"{accuracy.wrong:,} wrong of {accuracy.images:,}"
        if ties:
            text += f", like {ties} other{'s' if ties > 1 else ''}"
        tiles.append(Tile("Most accurate", percent(accuracy.top1), best, text))
    present = [model for model in models if model.size_bytes]
    if present:
        smallest = min(present, key=lambda model: model.size_bytes)
        tiles.append(
            Tile("Smallest", megabytes(smallest.size_bytes), smallest, _beside(smallest, "size", models))
        )
    timed = [(model, model.latency) for model in models if model.latency is not None]
    if timed:
        fastest, latency = min(timed, key=lambda pair: pair[1].median_ms)
        tiles.append(
            Tile("Fastest", milliseconds(latency.median_ms), fastest, _beside(fastest, "latency", models))
        )
    return tiles


def _beside(model: Model, cost: Cost, models: Sequence[Model]) -> str:
    ratio = _smaller(model, models) if cost == "size" else _faster(model, models)
    parts = [f"{ratio} than #{models[0].number}"] if ratio else []
    if model.accuracy is not None:
        parts.append(f"{percent(model.accuracy.top1)} accurate")
    return ", ".join(parts)


def _trade_offs(index: int, models: list[Model]) -> list[Figure]:
    figures = []
    timed = [model for model in models if model.latency is not None]
    costs: tuple[tuple[Cost, list[Model]], ...] = (("size", models), ("latency", timed))
    for cost, shown in costs:
        if not shown:
            continue
        svg, front = plots.trade_off(shown, cost, f"g{index}-{cost}")
        names = ", ".join(f"#{model.number}" for model in front)
        caption = (
            "Up is more accurate, left is "
            + ("smaller" if cost == "size" else "faster")
            + f". Dashed: the Pareto front; no model is better in both than {names} (filled). "
            + _budgets_in_words(shown)
            + "Vertical lines: 95 % intervals"
            + ("; horizontal: 10th to 90th percentile." if cost == "latency" else ".")
        )
        figures.append(Figure(Markup(svg), f"Accuracy against {cost}", caption))
    return figures


def _budgets_in_words(models: list[Model]) -> str:
    fronts = [", ".join(f"#{model.number}" for model in front) for front in plots.budget_fronts(models)]
    return f"Solid: one student pruned to several budgets ({'; '.join(fronts)}). " if fronts else ""


def _confusions(index: int, group: Group, scored: list[tuple[Model, Accuracy]]) -> tuple[list[Figure], str]:
    """One matrix for all models that make the same mistakes."""
    if not scored or group.class_images is None:
        return [], ""
    alike: dict[str, list[tuple[Model, Accuracy]]] = {}
    for model, accuracy in scored:
        alike.setdefault(accuracy.model_dump_json(), []).append((model, accuracy))
    images = np.array(group.class_images)
    matrices = [confusion(same[0][1], images) for same in alike.values()]
    mistakes = np.sum([matrix - np.diag(np.diag(matrix)) for matrix in matrices], axis=0)
    chosen = _most(mistakes.sum(axis=0) + mistakes.sum(axis=1), _CLASSES)
    labels = [plots.shorten(group.labels[index], _LABEL) for index in chosen]
    note = ""
    if len(chosen) < len(images):
        note = (
            f"Of {len(images)} classes, the {len(chosen)} with the most mistakes; the others together "
            "are “other”."
        )
        labels.append("other")
    figures = []
    for same, matrix in zip(alike.values(), matrices, strict=True):
        models, accuracy = tuple(model for model, _ in same), same[0][1]
        shown = matrix[np.ix_(chosen, chosen)]
        if note:
            shown = np.column_stack([shown, matrix[chosen].sum(axis=1) - shown.sum(axis=1)])
        title = f"{accuracy.wrong:,} wrong of {accuracy.images:,}"
        numbers = ", ".join(str(model.number) for model in models)
        alternative = f"Confusion matrix of model {numbers}: {title}"
        svg = plots.confusion_matrix(shown, labels, f"g{index}-m{models[0].number}", alternative)
        figures.append(Figure(Markup(svg), title, _worst(accuracy, group.labels), models))
    return figures, note


def confusion(accuracy: Accuracy, class_images: NDArray[np.int64]) -> NDArray[np.int64]:
    """Images by true and predicted class, shape (classes, classes)."""
    matrix = np.diag(class_images).astype(np.int64)
    for mistake in accuracy.mistakes:
        matrix[mistake.true, mistake.predicted] += mistake.images
        matrix[mistake.true, mistake.true] -= mistake.images
    return matrix


def _most(weights: NDArray[np.int64], most: int) -> list[int]:
    """Indices of the largest weights, in their own order."""
    return sorted(np.argsort(-weights, kind="stable")[:most].tolist())


def _worst(accuracy: Accuracy, labels: Sequence[str]) -> str:
    """The commonest mistakes in words."""
    worst = sorted(accuracy.mistakes, key=lambda mistake: -mistake.images)[:3]
    told = [
        f"{plots.shorten(labels[mistake.true], 24)} taken for {plots.shorten(labels[mistake.predicted], 24)}"
        + (f" ({mistake.images}×)" if mistake.images > 1 else "")
        for mistake in worst
    ]
    more = ", …" if len(accuracy.mistakes) > len(worst) else "."
    return f"{', '.join(told)}{more}" if told else ""


def _drops(index: int, group: Group, models: list[Model]) -> tuple[Figure | None, str]:
    by_number = {model.number: model for model in models}
    compared = [model for model in models if model.agreement is not None]
    if not compared or group.class_images is None:
        return None, ""
    images = np.array(group.class_images)
    right = {
        model.number: np.diag(confusion(model.accuracy, images))
        for model in models
        if model.accuracy is not None
    }
    rows, drops, same = [], [], []
    for model in compared:
        assert model.agreement is not None
        reference = by_number[model.agreement.reference]
        drop = 100 * (right[model.number] - right[reference.number]) / np.maximum(images, 1)
        if drop.any():
            rows.append(f"#{model.number} vs #{reference.number}")
            drops.append(drop)
        else:
            same.append(f"#{model.number} against #{reference.number}")
    note = f"Every class is exactly as accurate as in the reference: {', '.join(same)}." if same else ""
    if not rows:
        return None, note
    table = np.array(drops)
    chosen = _most(np.abs(table).sum(axis=0), _CHANGES)
    labels = [plots.shorten(group.labels[index], _LABEL) for index in chosen]
    worst_row, worst_class = np.unravel_index(int(table.argmin()), table.shape)
    caption = (
        "Points of accuracy gained (blue) or lost (orange) in each class, against the model that it was made "
        "from. "
        f"Worst: {rows[worst_row]}, class {plots.shorten(group.labels[int(worst_class)], 24)}, "
        f"{table[worst_row, worst_class]:+.1f} points.".replace("-", "−")
    )
    if len(chosen) < len(images):
        caption += f" The {len(chosen)} classes of {len(images)} that change most."
    svg = plots.class_drops(
        table[:, chosen],
        rows,
        labels,
        f"g{index}-drops",
        "Change of each class's accuracy against the reference.",
    )
    return Figure(Markup(svg), "Change by class", caption), note


def _quantisation(models: Sequence[Model]) -> list[Figure]:
    """Ranges and sensitivity of each INT8 engine, side by side where there is room."""
    return [
        figure for model in models for figure in (_ranges(model), _sensitivity(model)) if figure is not None
    ]


def _ranges(model: Model) -> Figure | None:
    if not model.ranges:
        return None
    widest = max(model.ranges, key=lambda layer: layer.activation)
    uneven = max(model.ranges, key=_unevenness)
    caption = (
        f"The {len(model.ranges)} INT8 layers in the order of the graph. Widest input: {widest.layer} "
        f"(±{widest.activation:.3g}); most uneven channels: {uneven.layer} (1 : {_unevenness(uneven):,.0f}). "
        "A dot far to the right of its neighbours leaves few levels for what is small."
    )
    svg = plots.calibration_ranges(
        model.ranges,
        f"ranges-m{model.number}",
        f"Calibration ranges of model {model.number}, layer by layer.",
    )
    return Figure(Markup(svg), f"Calibration ranges, {model.label}", caption, (model,))


def _unevenness(layer: LayerRange) -> float:
    return layer.weights_high / max(layer.weights_low, 1e-9)


def _sensitivity(model: Model) -> Figure | None:
    if not model.sensitivity:
        return None
    errors = [layer.error for layer in model.sensitivity]
    shown = model.sensitivity[:_SENSITIVE_LAYERS]
    caption = (
        f"The {len(shown)} costliest of {len(errors)} layers, each quantised alone. Half of all change the "
        f"logits by less than {plots.two_digits(100 * float(np.median(errors)))}{_SPACE}%."
    )
    svg = plots.sensitivity(
        shown, f"sensitivity-m{model.number}", f"The layers of model {model.number} that INT8 hurts most."
    )
    return Figure(Markup(svg), f"Sensitivity, {model.label}", caption, (model,))


def _profiles(models: Sequence[Model]) -> tuple[list[Profile], Figure | None, list[tuple[str, str]]]:
    """The slowest layers of each engine, all engines by kind of layer, and the kinds' colours."""
    profiles, times = [], []
    for model in models:
        if not model.profile:
            continue
        total = sum(layer.mean_ms for layer in model.profile) or 1.0
        slowest = sorted(model.profile, key=lambda layer: -layer.mean_ms)[:_SLOW_LAYERS]
        longest = slowest[0].mean_ms or 1.0
        lines = [SlowLayer(layer, layer.mean_ms / total, layer.mean_ms / longest) for layer in slowest]
        profiles.append(Profile(model, total, len(model.profile), lines))
        kinds: dict[str, float] = {}
        for layer in model.profile:
            kinds[layer.kind] = kinds.get(layer.kind, 0.0) + layer.mean_ms / total
        times.append(kinds)
    if not profiles:
        return [], None, []
    sums = {kind: sum(row.get(kind, 0.0) for row in times) for row in times for kind in row}
    main = sorted(sums, key=lambda kind: (-sums[kind], kind))[: len(plots.KIND_COLOURS)]
    shares = np.array([[row.get(kind, 0.0) for kind in main] for row in times])
    shares = np.column_stack([shares, 1 - shares.sum(axis=1)])
    colours = [*plots.KIND_COLOURS[: len(main)], plots.OTHER_COLOUR]
    svg = plots.latency_shares(
        [f"#{profile.model.number} {profile.model.precision}" for profile in profiles],
        shares,
        [milliseconds(profile.total_ms) for profile in profiles],
        colours,
        "shares",
        "Share of each kind of layer in the time of each engine.",
    )
    caption = (
        "Each bar is one engine's layers, one image at a time; behind it their time together, without "
        "what lies between the layers."
    )
    legend = list(zip([*main, "other"], colours, strict=True))
    if len(sums) == len(main):
        legend.pop()
    return profiles, Figure(Markup(svg), "By kind of layer", caption), legend
