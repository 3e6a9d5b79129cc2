"""`trimrt compress --latency-ms` and its like: a budget becomes a network, whose kit and engine tell it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from latency_tables import BLOCK, table_of
from short_run import SHORT

from builder.kit import open_kit
from models.card import Card, read_card
from models.groups import ChannelGroups
from models.networks import build_network
from models.preprocessing import Preprocessing
from models.promise import Device
from runtime.manifest import read_manifest
from runtime.openvino import this_machine
from trimrt.cli import main

ASKED_MS = 1.0
Trimrt = Callable[..., Result]


@pytest.fixture(scope="session")
def trimrt() -> Trimrt:
    def invoke(*arguments: object, code: int = 0) -> Result:
        result = CliRunner().invoke(main, list(map(str, arguments)))
        assert result.exit_code == code, result.output
        return result

    return invoke


def milliseconds(widths: Mapping[str, int]) -> float:
    """Of a device that takes longer the more blocks of channels there are."""
    return 0.1 + 0.01 * sum(-(-width // BLOCK) for width in widths.values())


@pytest.fixture(scope="module")
def table_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table of a device that is not here, of a ResNet18 for digits."""
    spec = Preprocessing(resize=24, height=24, width=24)
    channels = ChannelGroups(build_network("resnet18", 3, "small").eval(), spec).channels
    table = table_of(channels, milliseconds, [], machine="a small board", backend="tensorrt")
    file = tmp_path_factory.mktemp("tables") / "board.json"
    file.write_text(table.model_dump_json(), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def front(
    trimrt: Trimrt,
    few_digits: Path,
    finished: tuple[Path, str],
    table_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, str]:
    """Folder of a run with a network on the way to the budget, and what it printed."""
    out = tmp_path_factory.mktemp("front")
    budget = ["--latency-ms", ASKED_MS, "--latency-table", table_file, "--front", 2]
    result = trimrt("compress", few_digits, "--out", out, "--reuse", finished[0], *SHORT, *budget)
    return out, result.output


def latencies(card: Card) -> tuple[float, float, float | None]:
    assert card.promise is not None
    cost = card.promise.costs["latency_ms"]
    return cost.asked, cost.predicted, cost.measured


def test_cards_say_what_was_asked_and_predicted_and_for_which_device(front: tuple[Path, str]) -> None:
    first, last = read_card(front[0] / "front-1"), read_card(front[0] / "pruned")
    asked, predicted, measured = latencies(last)
    assert (asked, measured) == (ASKED_MS, None)
    assert 0.9 * ASKED_MS < predicted <= ASKED_MS
    assert latencies(first)[0] > latencies(first)[1] > ASKED_MS
    assert last.promise is not None
    assert last.promise.device == Device(
        machine="a small board", cores=2, backend="tensorrt", precision="int8", batch=1
    )


def test_networks_on_the_way_have_names_of_their_own(front: tuple[Path, str]) -> None:
    first, last = read_card(front[0] / "front-1"), read_card(front[0] / "pruned")
    assert last.name.endswith("-resnet18-1ms")
    assert first.name.endswith(f"-resnet18-{latencies(first)[0]:.4g}ms")
    assert first.metrics.parameters > last.metrics.parameters
    assert [ancestor.role for ancestor in first.lineage] == ["teacher", "student"]


def test_channels_are_as_wide_as_the_device_computes_them(front: tuple[Path, str]) -> None:
    plan = read_card(front[0] / "pruned").channel_plan
    assert plan is not None
    assert all(sizes["out_channels"] % BLOCK == 0 for sizes in plan.values() if "out_channels" in sizes)


def test_the_output_ends_with_what_was_asked_predicted_and_measured(front: tuple[Path, str]) -> None:
    predicted = latencies(read_card(front[0] / "pruned"))[1]
    told = f"latency: 1 ms asked, {predicted:.4g} predicted, not measured"
    assert f"-1ms: {told} (1 image on a small board, 2 cores, tensorrt, int8)" in front[1]


def test_a_finished_front_is_reused(
    trimrt: Trimrt, few_digits: Path, front: tuple[Path, str], table_file: Path
) -> None:
    before = (front[0] / "pruned" / "card.json").read_bytes()
    budget = ["--latency-ms", ASKED_MS, "--latency-table", table_file, "--front", 2]
    result = trimrt("compress", few_digits, "--out", front[0], *SHORT, *budget)
    assert result.output.count("is finished already") == 3
    assert (front[0] / "pruned" / "card.json").read_bytes() == before


def test_another_run_takes_over_the_whole_front_and_the_latency_table(
    trimrt: Trimrt, few_digits: Path, front: tuple[Path, str], table_file: Path, tmp_path: Path
) -> None:
    """The table that a run measured is in its folder; here it is the device's, as if it had been."""
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(front[0], old)
    shutil.copy(table_file, old / "latency.json")
    result = trimrt(
        "compress", few_digits, "--out", new, "--reuse", old, *SHORT, "--latency-ms", ASKED_MS, "--front", 2
    )
    assert result.output.count(f"reused from {old}") == 3
    for point in ("front-1", "pruned"):
        assert read_card(new / point) == read_card(old / point)
    assert (new / "latency.json").read_bytes() == table_file.read_bytes()


def test_the_report_joins_the_networks_of_a_front(
    trimrt: Trimrt, front: tuple[Path, str], tmp_path: Path
) -> None:
    page, figures = tmp_path / "report.html", tmp_path / "report.json"
    trimrt("report", front[0], "--out", page, "--json", figures, "--seconds", 0.5)
    models = json.loads(figures.read_text())["models"]
    fronts = {Path(model["path"]).name: model["front"] for model in models}
    student = read_card(front[0] / "student").weights_sha256
    assert fronts == {"teacher": None, "student": None, "front-1": student, "pruned": student}
    joined = ", ".join(f"#{model['number']}" for model in models if model["front"])
    assert f"Solid: one student pruned to several budgets ({joined})." in page.read_text()


def test_kit_and_manifest_carry_the_promise_and_an_engine_that_misses_it_is_told(
    trimrt: Trimrt, front: tuple[Path, str], tmp_path: Path
) -> None:
    """The promise is rewritten to one of this machine that no engine can keep."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(front[0] / "pruned", checkpoint)
    card = json.loads((checkpoint / "card.json").read_text())
    card["promise"]["costs"]["latency_ms"] = {"asked": 0.001, "predicted": 0.001}
    card["promise"]["device"] |= {
        "machine": this_machine().machine,
        "backend": "openvino",
        "precision": "fp32",
    }
    (checkpoint / "card.json").write_text(json.dumps(card))
    trimrt("prepare", checkpoint, "--output", tmp_path / "kit", "-p", "fp32", "--target", "openvino")
    assert open_kit(tmp_path / "kit").student.promise == read_card(checkpoint).promise
    result = trimrt(
        "build", tmp_path / "kit", "-p", "fp32", "--target", "openvino", "-o", tmp_path / "engines"
    )
    assert "promise missed: latency:" in result.output
    assert "over the 0.001 asked" in result.output
    (package,) = (tmp_path / "engines").iterdir()
    assert read_manifest(package).promise == read_card(checkpoint).promise
    assert "0.001 ms asked" in trimrt("inspect", package).output


@pytest.mark.slow
def test_size_and_work_need_no_table(
    trimrt: Trimrt, few_digits: Path, finished: tuple[Path, str], tmp_path: Path
) -> None:
    budget = ["--size-mb", 3, "--macs", 40e6]
    trimrt("compress", few_digits, "--out", tmp_path, "--reuse", finished[0], *SHORT, *budget)
    card = read_card(tmp_path / "pruned")
    assert card.promise is not None
    assert card.promise.device is None
    size, work = card.promise.costs["size_mb"], card.promise.costs["macs"]
    assert size.measured is not None
    assert size.measured <= 3
    assert work.measured == card.metrics.macs <= 40e6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--latency-ms", "0.1"], "0.1 ms cannot be met: the narrowest network takes 0.22"),
        (["--latency-ms", "1", "--macs", "10"], "10 multiply-accumulates cannot be met"),
    ],
)
def test_a_budget_that_cannot_be_met_is_refused_before_anything_is_trained(
    options: list[str], message: str, trimrt: Trimrt, few_digits: Path, table_file: Path, tmp_path: Path
) -> None:
    table = ["--latency-table", table_file]
    result = trimrt("compress", few_digits, "--out", tmp_path, *SHORT, *options, *table, code=1)
    assert message in result.output
    assert not (tmp_path / "teacher").exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--front", "3"], 1, "networks on the way to a budget"),
        (["--macs", "1e6", "--pruning-target-macs", "0.5"], 1, "leave out --pruning-target-macs"),
        (["--latency-table", __file__], 2, "--latency-table is for --latency-ms"),
        (["--latency-ms", "1", "--latency-table", __file__], 1, "is not a valid latency table"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    options: list[str], code: int, message: str, trimrt: Trimrt, few_digits: Path, tmp_path: Path
) -> None:
    assert message in trimrt("compress", few_digits, "--out", tmp_path, *SHORT, *options, code=code).output
