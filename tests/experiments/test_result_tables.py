"""The published figures: what the documents say is what the result files say, and it holds the bars."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import pytest

from experiments import calibration, qat
from experiments.results import FOLDER, Engine, Made, Results
from experiments.tables import DOCUMENTS, MARKER, ROOT, render
from models.card import read_card
from models.pretrained import DIGITS_STUDENT
from runtime.manifest import Precision

_Results = TypeVar("_Results", bound=Made)


def read_results(study: str) -> Results:
    return Results.model_validate_json((FOLDER / f"{study}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def digits() -> Results:
    """All folds of the digits."""
    results = read_results("digits")
    assert [fold.fold for fold in results.folds] == [0, 1, 2, 3, 4]
    assert sum(fold.network("teacher").images for fold in results.folds) == 1797
    return results


def engines(results: Results, network: str, precision: Precision) -> list[Engine]:
    """The engine of every fold."""
    found = [fold.engine(network, precision) for fold in results.folds]
    return [engine for engine in found if engine is not None]


def with_fp32(results: Results, network: str, precision: Precision) -> list[tuple[Engine, Engine]]:
    """The engine of every fold, and the FP32 one beside it."""
    pairs = zip(engines(results, network, precision), engines(results, network, "fp32"), strict=True)
    return list(pairs)


def wrong(results: Results, network: str, precision: Precision | None = None) -> int:
    """Errors among the test images of all folds, of the network or of its engine."""
    if precision is None:
        return sum(fold.network(network).wrong for fold in results.folds)
    return sum(engine.wrong for engine in engines(results, network, precision))


class TestDocuments:
    @pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
    def test_tables_are_those_of_the_result_files(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        assert "<!-- results: " in text
        assert render(text) == text, "run `make tables`"

    def test_every_marker_is_closed(self) -> None:
        for path in DOCUMENTS:
            text = path.read_text(encoding="utf-8")
            assert text.count("<!-- results: ") == text.count("<!-- /results -->")
            assert len(MARKER.findall(text)) == text.count("<!-- results: ")

    def test_the_demonstrations_output_is_of_the_shipped_student(self) -> None:
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        card = read_card(DIGITS_STUDENT)
        for role, metrics in [
            *((ancestor.role, ancestor.metrics) for ancestor in card.lineage),
            ("pruned", card.metrics),
        ]:
            row = next(line.split() for line in text.splitlines() if line.startswith(f"  {role} resnet"))
            assert row[2] == f"{metrics.parameters / 1e6:.2f}"
            assert row[4] == f"{metrics.macs / 1e6:.1f}"
            assert row[8] == f"{metrics.accuracy:.2%}"
        assert f"   $ {card.command}" in text

    def test_every_result_stands_in_the_documents_with_its_machine(self) -> None:
        shown = [match.groups() for path in DOCUMENTS for match in MARKER.finditer(path.read_text("utf-8"))]
        for file in FOLDER.glob("*.json"):
            tables = {table.split()[0] for _, name, table, _ in shown if name == file.stem}
            assert "machine" in tables
            assert len(tables) > 1

    def test_a_missing_study_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="nothing"):
            render("<!-- results: nothing machine -->\n<!-- /results -->", tmp_path)


class TestBars:
    """Of 1797 test images; a change that loses what was reached fails here."""

    @pytest.mark.parametrize(
        ("network", "most"), [("teacher", 10), ("student", 9), ("report", 10), ("aligned", 10)]
    )
    def test_networks(self, digits: Results, network: str, most: int) -> None:
        assert wrong(digits, network) <= most

    def test_the_report_preset_has_the_reports_size(self, digits: Results) -> None:
        assert all(round(fold.network("report").parameters / 1e6, 2) == 9.02 for fold in digits.folds)

    @pytest.mark.parametrize("network", ["report", "aligned"])
    def test_static_int8(self, digits: Results, network: str) -> None:
        for int8, fp32 in zip(
            engines(digits, network, "int8"), engines(digits, network, "fp32"), strict=True
        ):
            assert fp32.bytes / int8.bytes >= 3.95
            assert int8.agreement >= 0.996
        assert wrong(digits, network, "int8") <= wrong(digits, network, "fp32") + 1

    @pytest.mark.parametrize("network", ["report", "aligned", "aggressive"])
    def test_fp16(self, digits: Results, network: str) -> None:
        for fp16, fp32 in zip(
            engines(digits, network, "fp16"), engines(digits, network, "fp32"), strict=True
        ):
            assert fp16.agreement == 1
            assert fp16.max_logit_difference < 0.02
            assert fp32.bytes / fp16.bytes > 1.95

    @pytest.mark.parametrize("network", ["report", "aligned", "aggressive"])
    def test_dynamic_int8(self, digits: Results, network: str) -> None:
        for int8, fp32 in with_fp32(digits, network, "int8-dynamic"):
            assert fp32.bytes / int8.bytes >= 3.7
        assert wrong(digits, network, "int8-dynamic") <= wrong(digits, network, "fp32") + 1

    def test_aggressive(self, digits: Results) -> None:
        int8 = engines(digits, "aggressive", "int8")
        assert len(int8) == 5
        assert max(engine.bytes for engine in int8) <= 750_000
        assert wrong(digits, "aggressive", "int8") <= 11

    def test_every_engine_labels_as_its_network_does(self, digits: Results) -> None:
        for fold in digits.folds:
            assert len(fold.engines) == 12
        others = {  # the README says so
            (engine.network, engine.precision): engine.agreement
            for fold in digits.folds
            for engine in fold.engines
            if engine.agreement < 1
        }
        assert list(others) == [("aggressive", "int8")]
        assert min(others.values()) > 0.996

    def test_hardly_a_parameter_is_dead(self, digits: Results) -> None:
        assert min(n.live_parameters for fold in digits.folds for n in fold.networks) > 0.95

    def test_a_fold_by_itself_costs_little(self) -> None:
        (fold,) = read_results("digits-alone").folds
        assert fold.seconds is not None
        assert fold.peak_rss_mb is not None
        assert fold.seconds < 12 * 60
        assert fold.peak_rss_mb < 2500

    def test_fashion_mnist(self) -> None:
        (fold,) = read_results("fashion-mnist").folds
        teacher, int8 = fold.network("teacher"), fold.engine("aggressive", "int8")
        assert teacher.images == 10_000
        assert teacher.wrong <= 750
        assert int8 is not None
        assert int8.wrong <= teacher.wrong + 150

    def test_calibration_as_it_should_be_costs_nothing_and_mistakes_are_refused(self) -> None:
        rows = _read(calibration.Results, "calibration").rows
        assert {row.fold for row in rows} == {0, 1, 2, 3, 4}
        for row in rows:
            if row.mistake is None:
                assert row.measured.refused is None
                assert row.measured.test.agreement >= 0.99
            else:
                assert row.measured.refused is not None

    def test_qat_passes_where_no_calibration_does(self) -> None:
        results = _read(qat.Results, "qat")
        assert set(results.published) == {"qat"}
        assert {row.seed for row in results.rows if row.graph == "qat"} == set(qat.SEEDS)
        for row in results.rows:
            assert (row.measured.refused is None) == (row.graph in ("fp32", "qat"))
        assert results.int8_convolutions == results.convolutions


def _read(kind: type[_Results], name: str) -> _Results:
    return kind.model_validate_json((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
