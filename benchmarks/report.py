"""A run's results as JSON, a Markdown table and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Final

from pydantic import BaseModel
from rich.console import Console

from benchmarks.goals import Goal, goals
from benchmarks.measurements import (
    DIGIT,
    LARGE,
    LARGE_CONNECTIONS,
    SMALL,
    Comparison,
    Limit,
    Measurement,
    Results,
    Run,
)
from runtime.tuning import Setting

_NAMES: Final = {SMALL: f"{SMALL} JPEGs", DIGIT: "PNGs of handwritten digits (8x8 pixels)"}
_FORMS: Final = {"usual": "as usual", "trimrt": "TrimRT's preprocessing"}


def write_report(measured: BaseModel, text: str, path: Path, console: Console) -> None:
    """Write what was measured to `path` as JSON, its tables beside it as Markdown, and print these."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(measured.model_dump_json(indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def markdown(results: Results) -> str:
    """The tables: throughput and latency, cost, and what TrimRT gains."""
    counts = _counts(results)
    lines = [
        f"{results.machine}; {results.seconds:g} s a load, {results.started_at:%Y-%m-%d %H:%M} UTC. "
        "TrimRT: mean of all its runs.",
        "",
        f"Images a second, and milliseconds, for {_NAMES[results.photograph]} at so many connections:",
        "",
    ]
    head = ["server", "form"]
    head += [f"{count}" for count in counts]
    head += [f"p50, {count}" for count in counts] + [f"p99, {count}" for count in counts]
    large = [f"{LARGE}, {LARGE_CONNECTIONS}"] if results.photograph == SMALL else []
    head += large
    rows = [_limit_row(results, results.limit)[: len(head)]] if results.limit else []
    rows += [_speed_row(runs, results)[: len(head)] for runs in _grouped(results)]
    lines += markdown_table(head, rows)
    lines += ["", "What it costs:", ""]
    head = ["server", "form", "CPU ms an image", "ready after s", "memory MB, idle", "loaded", "installed MB"]
    lines += markdown_table(head, [_cost_row(runs, results) for runs in _grouped(results)])
    if results.server_cpu_ms is not None:
        lines += [
            "",
            f"TrimRT itself takes {results.server_cpu_ms:.2f} ms of processor time for a request, "
            "besides decoding and inference.",
        ]
    gains = [_gain_row(comparison, results) for comparison in results.comparisons]
    if gains:
        lines += [
            "",
            "TrimRT over each that it took turns with (throughput: more is better, in brackets the rounds' "
            "least and most; p99: less is):",
            "",
        ]
        head = ["server", "form"]
        head += [f"throughput, {count}" for count in counts]
        head += [f"p99, {count}" for count in counts] + [f"throughput, {LARGE}" for _ in large]
        lines += markdown_table(head, [row[: len(head)] for row in gains])
    lines += goals_table(goals(results))
    if results.failures:
        lines += ["", "Not measured:", "", *(f"- {failure}" for failure in results.failures)]
    return "\n".join(lines) + "\n"


def _counts(results: Results) -> list[int]:
    """Numbers of connections."""
    runs = [*results.ours, *results.others]
    found = (m for run in runs for m in run.measurements if m.photograph == results.photograph)
    return sorted({m.connections for m in found})


def _grouped(results: Results) -> list[list[Run]]:
    """Runs of the same server in the same form together, best throughput first."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in (*results.ours, *results.others):
        groups.setdefault((run.title, run.form), []).append(run)
    return sorted(groups.values(), key=lambda runs: -max(_throughputs(runs, results.photograph)))


def _throughputs(runs: list[Run], photograph: str) -> list[float]:
    return [m.load.throughput for run in runs for m in run.measurements if m.photograph == photograph]


def _at(runs: list[Run], photograph: str, connections: int) -> list[Measurement]:
    found = (run.at(photograph, connections) for run in runs)
    return [measurement for measurement in found if measurement is not None]


def _speed_row(runs: list[Run], results: Results) -> list[str]:
    row = [runs[0].title, _FORMS[runs[0].form]]
    loads = [_at(runs, results.photograph, count) for count in _counts(results)]
    row += [_mean([m.load.throughput for m in measured], 0) for measured in loads]
    places = _places(results)
    row += [_mean([m.load.p50 for m in measured], places) for measured in loads]
    row += [_mean([m.load.p99 for m in measured], places) for measured in loads]
    return [*row, _mean([m.load.throughput for m in _at(runs, LARGE, LARGE_CONNECTIONS)], 1)]


def _places(results: Results) -> int:
    """Decimals of milliseconds."""
    return 1 if results.photograph == SMALL else 2


def _limit_row(results: Results, limit: Limit) -> list[str]:
    row = ["no server", f"best loop: {_setting(limit.settings[results.photograph].throughput)}"]
    loads = [limit.at(results.photograph, count) for count in _counts(results)]
    row += [f"{m.load.throughput:.0f}" if m else "" for m in loads]
    row += [f"{m.load.p50:.{_places(results)}f}" if m and m.connections == 1 else "" for m in loads]
    large = limit.at(LARGE, LARGE_CONNECTIONS)
    return [*row, *[""] * len(loads), f"{large.load.throughput:.1f}" if large else ""]


def _setting(best: Setting) -> str:
    return f"{best.slots} x batch {best.batch}, {best.threads} OpenVINO threads"


def _cost_row(runs: list[Run], results: Results) -> list[str]:
    return [
        runs[0].title,
        _FORMS[runs[0].form],
        _mean([m.cpu_ms for m in _at(runs, results.photograph, _counts(results)[-1])], 2),
        _mean([run.start_seconds for run in runs], 2),
        _mean([run.idle_mb for run in runs], 0),
        _mean([run.loaded_mb for run in runs], 0),
        f"{runs[0].installed_mb:.0f}",
    ]


def _gain_row(comparison: Comparison, results: Results) -> list[str]:
    other, name, counts = comparison.other, results.photograph, _counts(results)
    if isinstance(other, Run):
        row = [other.title, _FORMS[other.form]]
        latencies = [_number(comparison.ratio(name, count, lambda m: m.load.p99)) for count in counts]
    else:
        row = ["no server", "best loop"]
        alone = _number(comparison.ratio(name, 1, lambda m: m.load.p50))
        latencies = [f"{alone} (p50)" if count == 1 and alone else "" for count in counts]
    row += [_gain(comparison, name, count) for count in counts]
    return [*row, *latencies, _gain(comparison, LARGE, LARGE_CONNECTIONS)]


def _gain(comparison: Comparison, photograph: str, connections: int) -> str:
    """Ratio of throughput, with the range of its rounds."""
    whole = _number(comparison.ratio(photograph, connections, lambda m: m.load.throughput))
    rounds = comparison.round_ratios(photograph, connections)
    return f"{whole} ({min(rounds):.2f}-{max(rounds):.2f})" if whole and len(rounds) > 1 else whole


def _number(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _mean(values: list[float], digits: int) -> str:
    return f"{fmean(values):.{digits}f}" if values else ""


def goals_table(found: Sequence[Goal]) -> list[str]:
    """The lines of a table that says which goals were reached, under a heading; none without goals."""
    rows = [[goal.what, goal.bar, f"{goal.measured:.2f}", "yes" if goal.reached else "no"] for goal in found]
    head = ["TrimRT's", "goal", "measured", "reached"]
    if any(goal.bound is not None for goal in found):
        head.append("if the server cost nothing")
        rows = [[*row, _number(goal.bound)] for row, goal in zip(rows, found, strict=True)]
    return ["", "What TrimRT is to reach:", "", *markdown_table(head, rows)] if rows else []


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 2) -> list[str]:
    """The lines of a table whose first `left` columns are text, and the others numbers."""
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    return [lines[0], "|---" * left + "|--:" * (len(head) - left) + "|", *lines[1:]]


def plot(results: Results, path: Path) -> None:
    """Throughput and p99 of every server at every number of connections."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    groups = _grouped(results)
    counts = _counts(results)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 0.8 + 0.45 * len(groups)), sharey=True)
    names = [f"{runs[0].title}\n{_FORMS[runs[0].form]}" for runs in groups]
    height = 0.8 / len(counts)
    for number, count in enumerate(counts):
        places = [row + (number - (len(counts) - 1) / 2) * height for row in range(len(groups))]
        for axis, what in ((left, "throughput"), (right, "p99")):
            widths = [
                fmean([getattr(m.load, what) for m in _at(runs, results.photograph, count)] or [0])
                for runs in groups
            ]
            axis.barh(places, widths, height, label=f"{count} connections" if axis is left else None)
    if limit := results.limit:
        fastest = max(m.load.throughput for m in limit.measurements if m.photograph == results.photograph)
        left.axvline(fastest, color="black", linestyle="--", linewidth=1, label="no server")
    left.set_yticks(range(len(groups)), names, fontsize=7)
    left.invert_yaxis()
    left.set_xlabel("images a second")
    right.set_xlabel("p99, ms (logarithmic)")
    right.set_xscale("log")
    left.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
