"""How TrimRT grows: every curve is measured, kept and drawn."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from tiny_engine import write_package

from benchmarks.growth import CURVES, Growth, Point, copies, markdown, plot, process_counts, resumed
from benchmarks.load import Load
from benchmarks.measurements import this_machine
from runtime.loading import load_engine
from trimrt.bench.timing import Timing


def point(at: float, memory_mb: float | None = None, ready_s: float | None = None) -> Point:
    load = Load(requests=100, seconds=2, p50=1, p90=2, p99=3, longest=4)
    return Point(at=at, load=load, cpu_ms=1.5, memory_mb=memory_mb, ready_s=ready_s)


def test_only_measured_curves_are_written_and_drawn(tmp_path: Path) -> None:
    growth = Growth(machine=this_machine(), seconds=2)
    growth.connections = [point(1), point(1024)]
    growth.engines = [point(1, 100, 0.9), point(16, 400, 2.5)]

    text = markdown(growth)
    plot(growth, tmp_path / "growth.svg")

    assert "| 1024 | 50.0 | 1.0 | 3.0 | 1.50 | 0 | 0 |" in text
    assert "| 16 | 50.0 | 1.0 | 3.0 | 1.50 | 0 | 0 | 400 | 2.50 |" in text
    assert "classes" not in text
    assert (tmp_path / "growth.svg").read_text().count("images a second") == 2


def test_all_curves_fit_one_figure(tmp_path: Path) -> None:
    growth = Growth(machine=this_machine(), seconds=2)
    for name in CURVES:
        setattr(growth, name, [point(1, 1, 1), point(8, 1, 1)])
    growth.batches = {
        engine: [
            Timing(
                batch=batch,
                runs=10,
                throughput=100,
                mean_ms=2,
                min_ms=1,
                max_ms=3,
                percentiles_ms={"p50": 2},
                device_ms={},
            )
            for batch in (1, 2)
        ]
        for engine in ("FP32", "INT8")
    }

    plot(growth, tmp_path / "growth.svg")

    assert (tmp_path / "growth.svg").read_text().count("images a second") == len(CURVES)


def test_curves_are_added_to_those_of_loads_as_long(tmp_path: Path) -> None:
    path = tmp_path / "growth.json"
    before = Growth(machine=this_machine(), seconds=2, labels=[point(10)])
    path.write_text(before.model_dump_json(), encoding="utf-8")

    assert resumed(Growth(machine=this_machine(), seconds=2), path) == before
    with pytest.raises(click.ClickException, match="took 2 s, not 8 s"):
        resumed(Growth(machine=this_machine(), seconds=8), path)


def test_copies_of_an_engine_are_engines_of_their_own(tmp_path: Path) -> None:
    package = write_package(tmp_path)

    made = copies(package, 2, tmp_path / "copies")

    assert [load_engine(folder).manifest.name for folder in made] == ["copy-0", "copy-1"]


def test_processes_are_doubled_beyond_the_cores() -> None:
    assert process_counts(1) == [1, 2]
    assert process_counts(2) == [1, 2, 4]
    assert process_counts(6) == [1, 2, 4, 6, 8]
