"""`trimrt bench` on real engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny_engine import write_package

from runtime.engine import Options
from runtime.loading import load_engine
from trimrt.bench.timing import time_engines
from trimrt.cli import main


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("packages")
    return [write_package(directory, name) for name in ("first", "second")]


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, ["bench", *map(str, arguments), "--seconds", "0.1", "--warm-up", "0"])
    assert result.exit_code == 0, result.output
    return result.output


def test_several_engines_are_timed_at_every_batch_size(packages: list[Path], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    output = run(*packages, "--batch", "4,1", "--json", report)

    measured = json.loads(report.read_text())
    assert [engine["name"] for engine in measured["engines"]] == ["first", "second"]
    for engine in measured["engines"]:
        assert [timing["batch"] for timing in engine["timings"]] == [1, 4]
        assert engine["layers"] is None
        assert engine["name"] in output
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_the_figures_of_one_timing_agree_with_each_other(packages: list[Path]) -> None:
    engine = load_engine(packages[0], Options(slots=1))
    (timing,) = time_engines([engine], 2, seconds=0.2, warm_up=0, progress=lambda: None)

    percentiles = list(timing.percentiles_ms.values())
    assert list(timing.percentiles_ms) == ["p50", "p90", "p95", "p99"]
    assert percentiles == sorted(percentiles)
    assert 0 < timing.min_ms <= percentiles[0] <= percentiles[-1] <= timing.max_ms
    assert timing.min_ms <= timing.mean_ms <= timing.max_ms
    # One slot: it cannot have answered more than its own batch times allow.
    assert timing.throughput <= 1000 * timing.batch / timing.mean_ms
    assert timing.runs >= 10


def test_every_layer_that_ran_is_timed(packages: list[Path], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    output = run(packages[0], "--batch", "2", "--profile", "--json", report)

    (engine,) = json.loads(report.read_text())["engines"]
    assert "Softmax" in {layer["kind"] for layer in engine["layers"]}
    assert all(layer["mean_ms"] >= 0 for layer in engine["layers"])
    assert "slowest layers" in output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--batch", "9"], "takes batches of 1 to 8, not 9"),
        (["--batch", "one"], "is not a list of numbers"),
        (["--batch", "0"], "at least one image"),
    ],
)
def test_a_batch_size_that_cannot_be_is_refused(
    packages: list[Path], arguments: list[str], says: str
) -> None:
    result = CliRunner().invoke(main, ["bench", str(packages[0]), *arguments])

    assert result.exit_code == 2
    assert says in " ".join(result.output.split())


def test_what_is_no_engine_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["bench", str(tmp_path)])

    assert result.exit_code == 1
    assert "is not an engine package" in result.output


def test_layers_of_a_backend_that_is_not_here_are_not_made_up(packages: list[Path], tmp_path: Path) -> None:
    from runtime.manifest import MANIFEST_NAME, EngineError
    from runtime.profiling import profile_layers

    manifest = json.loads((packages[0] / MANIFEST_NAME).read_text())
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(manifest | {"backend": "tensorrt"}))

    with pytest.raises(EngineError, match="tensorrt cannot be imported"):
        profile_layers(tmp_path, batch=1, runs=1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--json", "{file}/report.json"], "cannot make"),
        (["--json", "{folder}"], "is a directory"),
    ],
)
def test_a_report_that_cannot_be_written_is_told_before_anything_is_timed(
    packages: list[Path], tmp_path: Path, arguments: list[str], says: str
) -> None:
    file = tmp_path / "file"
    file.touch()
    filled = [argument.format(file=file, folder=tmp_path) for argument in arguments]

    result = CliRunner().invoke(main, ["bench", str(packages[0]), "--seconds", "3600", *filled])

    assert result.exit_code == 2
    assert says in " ".join(result.output.split())


def test_reports_go_to_a_new_folder(packages: list[Path], tmp_path: Path) -> None:
    run(packages[0], "--json", tmp_path / "new" / "report.json")
    assert json.loads((tmp_path / "new" / "report.json").read_text())["engines"]
