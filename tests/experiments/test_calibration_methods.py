"""The calibration experiment: what it compares are engines of the same network, and its mistakes are real."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper

from builder.prepare.options import PrepareOptions
from builder.prepare.preparation import Preparation, open_checkpoint, prepare
from experiments import calibration
from experiments.calibration import MISTAKES, Results, Row, Variant, calibrate, main, table
from experiments.graphs import Measured, Measurement, held_out_images, measure_graph
from experiments.results import made_here
from models.card import read_card
from models.datasets import DataSplit
from models.pretrained import DIGITS_STUDENT

WRONG = Variant("max", 32, next(iter(MISTAKES)))
VARIANTS = (Variant("max", 32), Variant("percentile", 32), WRONG)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, data: DataSplit) -> Preparation:
    options = PrepareOptions(verification_images=144)
    subject = open_checkpoint(DIGITS_STUDENT, None)
    return prepare(subject, tmp_path_factory.mktemp("workspace"), options, lambda _: None)


@pytest.fixture(scope="module")
def graphs(prepared: Preparation, tmp_path_factory: pytest.TempPathFactory) -> dict[Variant, Path]:
    paths = {}
    for variant in VARIANTS:
        paths[variant] = tmp_path_factory.mktemp("graphs") / "int8.onnx"
        calibrate(prepared, variant, paths[variant])
    return paths


def scales(path: Path) -> dict[str, float]:
    """Of the activations."""
    model = onnx.load(str(path))
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return {
        node.input[0]: float(constants[node.input[1]])
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }


def test_a_mistake_costs_accuracy_and_the_gate_sees_it(
    prepared: Preparation, graphs: dict[Variant, Path]
) -> None:
    test = held_out_images(prepared.subject)
    right, _, wrong = (measure_graph(graphs[variant], prepared.verification, test) for variant in VARIANTS)
    # One of so few validation images is more than the gate allows, and may change its label by rounding.
    assert right.validation.wrong - right.validation.reference_wrong <= 1
    assert wrong.refused is not None
    assert wrong.test.agreement < right.test.agreement - 0.02


def test_a_mistake_is_in_the_ranges_alone(prepared: Preparation, graphs: dict[Variant, Path]) -> None:
    """The network that was calibrated wrongly still meets images that are normalised as they should be."""
    right, wrong = (
        {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(str(path)).graph.initializer}
        for path in (graphs[VARIANTS[0]], graphs[WRONG])
    )
    for name in ("pre/mean", "pre/inverse_std"):
        np.testing.assert_array_equal(right[name], wrong[name])
    assert scales(graphs[VARIANTS[0]]) != scales(graphs[WRONG])


def test_a_percentile_clips_and_never_widens(graphs: dict[Variant, Path]) -> None:
    largest, clipped = scales(graphs[VARIANTS[0]]), scales(graphs[VARIANTS[1]])
    assert largest.keys() == clipped.keys()
    assert all(0 < clipped[tensor] <= largest[tensor] * (1 + 1e-6) for tensor in largest)
    assert any(clipped[tensor] < 0.95 * largest[tensor] for tensor in largest)


def row(fold: int, method: str, wrong: int, refused: str | None = None) -> Row:
    measurement = Measurement(
        wrong=wrong, images=100, reference_wrong=1, agreement=1 - wrong / 100, max_logit_difference=0.5
    )
    measured = Measured(bytes=1_000_000, validation=measurement, refused=refused, test=measurement)
    return Row(
        checkpoint=f"runs/fold{fold}/pruned",
        weights_sha256=f"{fold:064}",
        fold=fold,
        parameters=701_000,
        method=method,
        images=0 if method == "none" else 512,
        mistake=None,
        measured=measured,
    )


def test_the_table_pools_errors_and_averages_over_folds() -> None:
    rows = [row(0, "none", 1), row(1, "none", 0), row(0, "max", 2), row(1, "max", 4, "top-1 falls")]
    machine = {"processor": "p", "cores": 2, "memory_gb": 1, "system": "s", "python": "3"}
    results = Results.model_validate(
        {"command": "c", "machine": machine, "versions": {}, "seconds": 1, "rows": rows}
    )
    lines = table(results).splitlines()
    assert lines[0] == "0.701 M parameters, 2 folds:"
    assert lines[4].startswith("| none: FP32 | 99.50 ± 0.71 % | 0 of 2 |")
    calibrated = [cell.strip() for cell in lines[5].strip("|").split("|")]
    assert calibrated == [
        "max, 512 images",
        "97.00 ± 1.41 %",
        "1 of 2",
        "97.00 ± 1.41 %",
        "0.50 ± 0.00",
        "6 of 200",
    ]


def test_what_is_measured_already_is_not_measured_again(tmp_path: Path) -> None:
    out = tmp_path / "calibration.json"
    sha256 = read_card(DIGITS_STUDENT).weights_sha256
    kept = [
        row(0, variant.method, 1).model_copy(
            update={"weights_sha256": sha256, "images": variant.images, "mistake": variant.mistake}
        )
        for variant in calibration.VARIANTS
    ]
    Results(**made_here("an earlier part"), seconds=60, rows=kept).write(out)
    result = CliRunner().invoke(main, [str(DIGITS_STUDENT), "--out", str(out)])
    assert result.exit_code == 0, result.output
    results = Results.model_validate_json(out.read_text(encoding="utf-8"))
    assert results.rows == kept
    assert results.seconds >= 60
    assert results.command == f"python -m experiments.calibration {DIGITS_STUDENT}"
