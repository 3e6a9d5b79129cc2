"""The table of architectures: it has all that it should have, and what it says is so."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments import architectures
from experiments.architectures import FAMILIES, Results, Row, measure
from experiments.results import FOLDER
from experiments.tables import ROOT
from models.networks import architectures as torchvision_names


@pytest.fixture(scope="module")
def published() -> dict[str, Row]:
    text = (FOLDER / "architectures.json").read_text(encoding="utf-8")
    return {row.name: row for row in Results.model_validate_json(text).rows}


def test_it_has_most_of_torchvision_and_many_of_timms_families(published: dict[str, Row]) -> None:
    assert len(torchvision_names()) >= 80
    assert len(set(torchvision_names()) & set(published)) >= 75
    assert len(set(FAMILIES) & set(published)) >= 25


def test_the_page_lists_every_name_tried_or_not() -> None:
    page = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
    assert not [name for name in (*torchvision_names(), *FAMILIES) if f"`{name}`" not in page]


def test_every_architecture_can_be_trained_or_says_why_not(published: dict[str, Row]) -> None:
    assert all((row.size is None) == (row.refused is not None) for row in published.values())


def test_every_architecture_can_be_pruned_or_is_refused_soon(published: dict[str, Row]) -> None:
    for row in published.values():
        if row.size is not None:
            assert (row.pruned_macs is None) == (row.unprunable is not None), row.name
            assert row.refusal_seconds is None or row.refusal_seconds < 5, row.name


def test_exported_graphs_label_as_pytorch_does(published: dict[str, Row]) -> None:
    exported = [row for row in published.values() if row.graph is not None]
    assert len(exported) >= 10
    for row in exported:
        assert row.graph is not None
        assert row.graph.agreement == 1, row.name
        assert row.graph.difference < 1e-2, row.name


@pytest.mark.parametrize(
    "name", ["squeezenet1_1", "regnet_x_400mf", "shufflenet_v2_x0_5", "vit_b_16", "timm:lcnet_035"]
)
def test_the_table_is_what_is_measured(published: dict[str, Row], name: str) -> None:
    row, known = measure(name, graph=False), published[name]
    assert (row.size, row.parameters, row.macs) == (known.size, known.parameters, known.macs)
    assert row.pruned_macs == pytest.approx(known.pruned_macs)
    assert row.unprunable == known.unprunable


@pytest.mark.parametrize(
    "name",
    [
        "squeezenet1_1",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                *("resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2_x0_5"),
                *("regnet_y_400mf", "convnext_tiny", "timm:ghostnet_050", "timm:mobilenetv3_small_050"),
                *("timm:repvgg_a0", "timm:vit_tiny_patch16_224", "timm:levit_128s"),
            )
        ),
    ],
)
def test_it_is_exported_and_quantised(name: str) -> None:
    graph = measure(name, graph=True).graph
    assert graph is not None
    assert graph.agreement == 1
    assert graph.difference < 1e-2
    assert graph.int8_share > 0.5


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "architectures.json"
    asked: list[str] = []

    def note(name: str, *, graph: bool) -> Row:
        asked.append(name)
        return measure(name, graph=graph)

    monkeypatch.setattr(architectures, "measure", note)
    for names in (["squeezenet1_1"], ["squeezenet1_1", "squeezenet1_0"]):
        architectures.main([*names, "--no-graphs", "--out", str(out)], standalone_mode=False)
    assert asked == ["squeezenet1_1", "squeezenet1_0"]
    rows = Results.model_validate_json(out.read_text(encoding="utf-8")).rows
    assert [row.name for row in rows] == ["squeezenet1_0", "squeezenet1_1"]
