"""Tables and figures as docs/results.md writes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean, stdev

from benchmarks.report import markdown_table


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first `left` columns are text, and the others numbers."""
    return "\n".join(markdown_table(head, rows, left)) + "\n"


def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """Mean and sample standard deviation, or the value where there is one."""
    if len(values) < 2:
        return form(values[0])
    return f"{form(fmean(values))} ± {form(stdev(values))}"


def percent(share: float) -> str:
    """A share in percent, two digits."""
    return f"{100 * share:.2f} %"


def percents(shares: Sequence[float]) -> str:
    """The spread of shares, in percent."""
    return spread([100 * share for share in shares], "{:.2f}".format) + " %"


def megabytes(size: float) -> str:
    """Bytes as MB of a million, two digits."""
    return f"{size / 1e6:.2f} MB"
