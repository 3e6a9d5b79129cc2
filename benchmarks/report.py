"""A run's results as JSON, a Markdown table and a plot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Final

from rich.console import Console

from benchmarks.goals import goals
from benchmarks.limit import Limit
from benchmarks.measurements import LARGE, LARGE_CONNECTIONS, SMALL, Measurement, Results, Run

_FORMS: Final = {"usual": "as usual", "trimrt": "TrimRT's preprocessing"}


def write_report(results: Results, folder: Path, console: Console) -> None:
    """Write `results.json`, `results.md` and `results.svg`, and print the table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(results.model_dump_json(indent=1) + "\n", encoding="utf-8")
    text = markdown(results)
    (folder / "results.md").write_text(text, encoding="utf-8")
    plot(results, folder / "results.svg")
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def markdown(results: Results) -> str:
    """The tables: throughput and latency, cost, and what TrimRT gains."""
    machine = results.machine
    counts = sorted(
        {m.connections for run in _servers(results) for m in run.measurements if m.photograph == SMALL}
    )
    lines = [
        f"{machine.processor}, {machine.cores} cores, {machine.memory_gb:g} GB, Python {machine.python}; "
        f"{results.seconds:g} s a load, {results.started_at:%Y-%m-%d %H:%M} UTC. "
        "TrimRT: mean of all its runs.",
        "",
        f"Images a second, and milliseconds, for {SMALL} JPEGs at so many connections:",
        "",
    ]
    head = ["server", "form"]
    head += [f"{count}" for count in counts]
    head += [f"p50, {count}" for count in counts] + [f"p99, {count}" for count in counts]
    head += [f"{LARGE}, {LARGE_CONNECTIONS}"]
    rows = [
        _limit_row(results, run, counts)
        for run in results.runs
        if isinstance(run, Limit) and run.photograph == SMALL
    ]
    rows += [_speed_row(runs, counts) for runs in _grouped(results)]
    lines += markdown_table(head, rows)
    lines += ["", "What it costs:", ""]
    head = ["server", "form", "CPU ms an image", "ready after s", "memory MB, idle", "loaded", "installed MB"]
    lines += markdown_table(head, [_cost_row(runs, counts) for runs in _grouped(results)])
    gains = list(_gain_rows(results, counts))
    if gains:
        lines += [
            "",
            "TrimRT over each, from TrimRT's runs next to it (throughput: more is better; p99: less is):",
            "",
        ]
        head = ["server", "form"]
        head += [f"throughput, {count}" for count in counts]
        head += [f"p99, {count}" for count in counts] + [f"throughput, {LARGE}"]
        lines += markdown_table(head, gains)
    rows = [
        [goal.what, goal.bar, f"{goal.measured:.2f}", "yes" if goal.reached else "no"]
        for goal in goals(results)
    ]
    if rows:
        lines += ["", "What TrimRT is to reach:", ""]
        lines += markdown_table(["TrimRT's", "goal", "measured", "reached"], rows)
    if results.failures:
        lines += ["", "Not measured:", "", *(f"- {failure}" for failure in results.failures)]
    return "\n".join(lines) + "\n"


def _servers(results: Results) -> list[Run]:
    return [run for run in results.runs if isinstance(run, Run)]


def _grouped(results: Results) -> list[list[Run]]:
    """Runs of the same server in the same form together, best throughput first."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in _servers(results):
        groups.setdefault((run.name, run.form), []).append(run)
    return sorted(groups.values(), key=lambda runs: -max(_throughputs(runs)))


def _throughputs(runs: list[Run]) -> list[float]:
    return [m.load.throughput for run in runs for m in run.measurements if m.photograph == SMALL]


def _at(runs: list[Run], photograph: str, connections: int) -> list[Measurement]:
    found = (run.at(photograph, connections) for run in runs)
    return [measurement for measurement in found if measurement is not None]


def _speed_row(runs: list[Run], counts: list[int]) -> list[str]:
    row = [runs[0].title, _FORMS[runs[0].form]]
    loads = [_at(runs, SMALL, count) for count in counts]
    row += [_mean([m.load.throughput for m in measured], 0) for measured in loads]
    row += [_mean([m.load.p50 for m in measured], 1) for measured in loads]
    row += [_mean([m.load.p99 for m in measured], 1) for measured in loads]
    return [*row, _mean([m.load.throughput for m in _at(runs, LARGE, LARGE_CONNECTIONS)], 1)]


def _limit_row(results: Results, limit: Limit, counts: list[int]) -> list[str]:
    large = [run.throughput for run in results.runs if isinstance(run, Limit) and run.photograph == LARGE]
    row = ["no server", f"best loop: {limit.setting}"]
    row += [f"{limit.throughput:.0f}"] * len(counts)
    row += [f"{limit.latency_ms:.1f}" if count == 1 else "" for count in counts]
    return [*row, *[""] * len(counts), _mean(large, 1)]


def _cost_row(runs: list[Run], counts: list[int]) -> list[str]:
    return [
        runs[0].title,
        _FORMS[runs[0].form],
        _mean([m.cpu_ms for m in _at(runs, SMALL, counts[-1])], 2),
        _mean([run.start_seconds for run in runs], 2),
        _mean([run.idle_mb for run in runs], 0),
        _mean([run.loaded_mb for run in runs], 0),
        f"{runs[0].installed_mb:.0f}",
    ]


def _gain_rows(results: Results, counts: list[int]) -> Iterator[list[str]]:
    for index, run in enumerate(results.runs):
        ours = results.neighbours(index)
        if isinstance(run, Limit):
            if run.photograph == SMALL:
                yield _limit_gains(ours, run, counts)
        elif run.name != "trimrt":
            row = [run.title, _FORMS[run.form]]
            row += [_ratio(ours, run, SMALL, count, "throughput") for count in counts]
            row += [_ratio(ours, run, SMALL, count, "p99") for count in counts]
            yield [*row, _ratio(ours, run, LARGE, LARGE_CONNECTIONS, "throughput")]


def _limit_gains(ours: list[Run], limit: Limit, counts: list[int]) -> list[str]:
    row = ["no server", "best loop"]
    row += [
        _quotient([m.load.throughput for m in _at(ours, SMALL, count)], limit.throughput) for count in counts
    ]
    alone = _quotient([m.load.p50 for m in _at(ours, SMALL, 1)], limit.latency_ms)
    return [*row, *(f"{alone} (p50)" if count == 1 and alone else "" for count in counts), ""]


def _ratio(ours: list[Run], theirs: Run, photograph: str, connections: int, what: str) -> str:
    other = theirs.at(photograph, connections)
    if other is None:
        return ""
    mine = [getattr(m.load, what) for m in _at(ours, photograph, connections)]
    return _quotient(mine, getattr(other.load, what))


def _quotient(values: list[float], divisor: float) -> str:
    return f"{fmean(values) / divisor:.2f}" if values and divisor else ""


def _mean(values: list[float], digits: int) -> str:
    return f"{fmean(values):.{digits}f}" if values else ""


def markdown_table(head: list[str], rows: list[list[str]], left: int = 2) -> list[str]:
    """The lines of a table whose first `left` columns are text, and the others numbers."""
    align = ["---" if index < left else "---:" for index in range(len(head))]
    return ["| " + " | ".join(row) + " |" for row in (head, align, *rows)]


def plot(results: Results, path: Path) -> None:
    """Throughput and p99 of every server at every number of connections."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    groups = _grouped(results)
    counts = sorted(
        {m.connections for run in _servers(results) for m in run.measurements if m.photograph == SMALL}
    )
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 0.8 + 0.45 * len(groups)), sharey=True)
    names = [f"{runs[0].title}\n{_FORMS[runs[0].form]}" for runs in groups]
    height = 0.8 / len(counts)
    for number, count in enumerate(counts):
        places = [row + (number - (len(counts) - 1) / 2) * height for row in range(len(groups))]
        for axis, what in ((left, "throughput"), (right, "p99")):
            widths = [
                fmean([getattr(m.load, what) for m in _at(runs, SMALL, count)] or [0]) for runs in groups
            ]
            axis.barh(places, widths, height, label=f"{count} connections" if axis is left else None)
    limits = [run.throughput for run in results.runs if isinstance(run, Limit) and run.photograph == SMALL]
    if limits:
        left.axvline(max(limits), color="black", linestyle="--", linewidth=1, label="no server")
    left.set_yticks(range(len(groups)), names, fontsize=7)
    left.invert_yaxis()
    left.set_xlabel("images a second")
    right.set_xlabel("p99, ms (logarithmic)")
    right.set_xscale("log")
    left.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
