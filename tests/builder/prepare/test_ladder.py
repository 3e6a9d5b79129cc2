"""From refusal to an INT8 engine without anybody being asked: each way costs more than the one before it.

One network is the student with one channel of two blocks a thousand times larger, which a single range for
all channels cannot carry. The other is of depthwise convolutions, ReLU6 and sums, as efficient networks are.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import Result
from small_student import SPEC

from builder.comparison import Comparison
from builder.kit import INPUT, LOGITS, Graph, open_kit
from builder.prepare.equalise import equalise
from builder.prepare.int8 import convert_to_int8
from builder.prepare.ladder import Ladder
from builder.prepare.legality import require_legal
from builder.prepare.options import PrepareOptions
from builder.prepare.preparation import Preparation, open_checkpoint, prepare
from builder.prepare.qdq import constants_of, exact_logits, quantised_layers, watch
from builder.prepare.ranges import least_error_scales
from builder.prepare.reconstruction import reconstruct
from builder.prepare.sensitivity import rank_layers
from builder.weights import LEVELS
from experiments.qat import write_outliers
from models.datasets import DataSplit, ImageSet
from models.preprocessing import Pixels
from runtime.manifest import read_manifest


@pytest.fixture(scope="module")
def fragile(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_outliers(checkpoint, tmp_path_factory.mktemp("fragile") / "fragile")


@pytest.fixture(scope="module")
def preparation(fragile: Path, tmp_path_factory: pytest.TempPathFactory) -> Preparation:
    options = PrepareOptions(calibration_images=64, calibration="max")
    subject = open_checkpoint(fragile, data=None)
    return prepare(subject, tmp_path_factory.mktemp("workspace"), options, lambda _: None)


@pytest.fixture(scope="module")
def graphs(preparation: Preparation) -> dict[str, tuple[Graph, Path]]:
    """The first ways, by their names."""
    found = itertools.islice(preparation.graphs("int8", "fp32"), 3)
    return {graph.calibration.name: (graph, path) for graph, path in found if graph.calibration}


@pytest.fixture(scope="module")
def pixels(data: DataSplit) -> Pixels:
    return data.train.load_pixels(SPEC)[:64]


@pytest.fixture(scope="module")
def inverted(
    depthwise: Path, pixels: Pixels, tmp_path_factory: pytest.TempPathFactory
) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A network of depthwise convolutions in FP32, and calibrated."""
    path = tmp_path_factory.mktemp("inverted") / "int8.onnx"
    convert_to_int8(depthwise, path, pixels, method="max", rest="fp32")
    return onnx.load(depthwise), onnx.load(path)


def test_the_ways_are_in_the_order_of_their_cost(graphs: dict[str, tuple[Graph, Path]]) -> None:
    assert list(graphs) == ["max", "mse, equalised, bias", "mse, equalised, bias, rounded"]
    assert all(graph.seconds is not None for graph, _ in graphs.values())


def test_equalisation_rescues_what_one_range_for_all_channels_cannot_carry(
    graphs: dict[str, tuple[Graph, Path]],
) -> None:
    plain, equalised = graphs["max"][0].exact, graphs["mse, equalised, bias"][0].exact
    assert plain.label_agreement < 0.98
    assert equalised.label_agreement >= 0.99
    assert graphs["mse, equalised, bias"][0].int8_share == graphs["max"][0].int8_share, "all of it in INT8"


def test_a_graph_is_judged_by_what_it_gives_for_the_held_out_images(
    preparation: Preparation, graphs: dict[str, tuple[Graph, Path]]
) -> None:
    images = preparation.verification
    for graph, path in graphs.values():
        assert graph.exact == images.compare(exact_logits(onnx.load(path), images.pixels))


def test_nothing_is_made_twice(preparation: Preparation, graphs: dict[str, tuple[Graph, Path]]) -> None:
    before = {path: path.stat().st_mtime_ns for _, path in graphs.values()}
    again = [path for _, path in itertools.islice(preparation.graphs("int8", "fp32"), 3)]
    assert {path: path.stat().st_mtime_ns for path in again} == before


def test_what_each_layer_costs_adds_up_to_the_error_of_all_once_biases_are_corrected(
    inverted: tuple[onnx.ModelProto, onnx.ModelProto], pixels: Pixels
) -> None:
    """Mean errors do not add up as squares, and a bias takes them away."""
    master, calibrated = inverted

    def sum_of_costs(*, corrected: bool) -> float:
        costs = rank_layers(master, calibrated, pixels, lambda _: None, corrected=corrected)
        return float(np.sqrt(sum(cost.error**2 for cost in costs)))

    reference = exact_logits(master, pixels)
    whole = exact_logits(reconstruct(calibrated, master, pixels, weights=False), pixels) - reference
    error = float(np.sqrt(np.mean(whole**2) / np.mean(reference**2)))
    corrected, uncorrected = sum_of_costs(corrected=True), sum_of_costs(corrected=False)
    assert abs(corrected - error) < abs(uncorrected - error)
    assert corrected < uncorrected


@pytest.mark.slow
def test_layers_are_left_out_of_whichever_graph_did_best(
    preparation: Preparation, pixels: Pixels, tmp_path: Path
) -> None:
    """Corrections are for what networks usually suffer from. One that does not suffer from it gets worse."""

    def judge(model: onnx.ModelProto) -> Comparison:
        found = preparation.verification.compare(exact_logits(model, preparation.verification.pixels))
        return replace(found, label_agreement=0.9 if model == onnx.load(calibrated) else 0.8)

    calibrated, master = tmp_path / "calibrated-max.onnx", tmp_path / "fp32.onnx"
    shutil.copyfile(preparation.master, master)
    options = PrepareOptions(calibration="max")
    ladder = Ladder(master, pixels, options, judge, lambda _: None, lambda _: None)
    *_, mixed = itertools.islice(ladder.candidates(), 4)
    assert mixed.kept
    assert (mixed.method, mixed.changes) == ("max", ())
    before, after = onnx.load(calibrated), onnx.load(mixed.path)
    assert set(quantised_layers(before)) - set(quantised_layers(after)) == set(mixed.kept)
    old, new = constants_of(before), constants_of(after)
    for layer in quantised_layers(after).values():
        np.testing.assert_array_equal(new[layer.weights], old[layer.weights])
        assert new[layer.activation_scale] == old[layer.activation_scale]


def test_every_way_is_legal_with_fp16_between_its_layers_too(preparation: Preparation) -> None:
    for graph, path in itertools.islice(preparation.graphs("int8", "fp16"), 3):
        require_legal(onnx.load(path))
        assert graph.rest == "fp16"


def test_equalised_channels_change_nothing_in_floating_point(
    preparation: Preparation, pixels: Pixels
) -> None:
    master = onnx.load(preparation.master)
    equalised = equalise(master, pixels)
    assert equalised is not None
    expected = exact_logits(master, pixels)
    np.testing.assert_allclose(exact_logits(equalised, pixels), expected, atol=1e-4 * np.abs(expected).max())


def test_relu6_is_not_equalised_through(
    inverted: tuple[onnx.ModelProto, onnx.ModelProto], pixels: Pixels
) -> None:
    """A factor would move its bound. The tensors along the sums are equalised all the same."""
    master, _ = inverted
    equalised = equalise(master, pixels)
    before, after = (constants_of(model) for model in (master, equalised))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    groups = {node.input[1]: node for node in master.graph.node if node.op_type == "Conv"}
    assert changed
    assert not {name for name in changed if name in groups and before[name].shape[1] == 1}, "depthwise"
    noise = np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint8)
    expected = exact_logits(master, noise)
    np.testing.assert_allclose(exact_logits(equalised, noise), expected, atol=1e-4 * np.abs(expected).max())


def _outputs(
    model: onnx.ModelProto, names: dict[str, str], pixels: Pixels
) -> Iterator[tuple[str, np.ndarray]]:
    parts = list(watch(model, names.values(), pixels))
    for layer, tensor in names.items():
        value = np.concatenate([part[tensor] for part in parts])
        yield layer, value if value.ndim == 2 else np.moveaxis(value, 1, -1).reshape(-1, value.shape[1])


def test_sums_are_exact_where_a_graph_is_judged(
    inverted: tuple[onnx.ModelProto, onnx.ModelProto], pixels: Pixels
) -> None:
    """No integer kernel takes the place of what is written."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for model in inverted:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        (expected,) = session.run([LOGITS], {INPUT: pixels[:8]})
        np.testing.assert_array_equal(exact_logits(model, pixels[:8]), expected)


def test_biases_make_up_for_the_mean_error_of_every_channel(
    inverted: tuple[onnx.ModelProto, onnx.ModelProto], pixels: Pixels
) -> None:
    master, quantised = inverted
    corrected = reconstruct(quantised, master, pixels, weights=False)
    layers = {name: layer.node.output[0] for name, layer in quantised_layers(quantised).items()}
    wanted = {node.name: node.output[0] for node in master.graph.node if node.name in layers}
    expected = {name: value.mean(0) for name, value in _outputs(master, wanted, pixels)}

    def errors(model: onnx.ModelProto) -> float:
        found = {name: value.mean(0) for name, value in _outputs(model, layers, pixels)}
        return float(np.mean([np.abs(found[name] - expected[name]).mean() for name in layers]))

    assert errors(corrected) < 0.2 * errors(quantised)


def test_rounding_moves_weights_by_few_steps_and_lowers_the_error_of_the_logits(
    inverted: tuple[onnx.ModelProto, onnx.ModelProto], pixels: Pixels, data: DataSplit
) -> None:
    master, quantised = inverted
    rounded = reconstruct(quantised, master, pixels, weights=True)
    held_out = data.validation.load_pixels(SPEC)
    reference, plain, better = (exact_logits(each, held_out) for each in (master, quantised, rounded))
    assert np.square(better - reference).mean() < np.square(plain - reference).mean()
    before, after = constants_of(quantised), constants_of(rounded)
    for layer in quantised_layers(quantised).values():
        steps = np.abs(after[layer.weights].astype(int) - before[layer.weights])
        assert steps.max() <= 8
        assert after[layer.weights].dtype == np.int8
        np.testing.assert_array_equal(after[layer.weights_scale], before[layer.weights_scale])


def test_a_range_of_least_error_cuts_off_what_is_rare(
    inverted: tuple[onnx.ModelProto, onnx.ModelProto], pixels: Pixels
) -> None:
    master, _ = inverted
    tensors = [node.output[0] for node in master.graph.node if node.op_type == "Conv"]
    scales = least_error_scales(master, tensors, pixels)
    for name in tensors:
        values = np.concatenate([part[name].ravel() for part in watch(master, [name], pixels)])

        def error(scale: float, values: np.ndarray = values) -> float:
            return float(np.square(np.clip(np.rint(values / scale), -LEVELS, LEVELS) * scale - values).mean())

        assert error(scales[name]) <= 1.01 * error(float(np.abs(values).max()) / LEVELS)


@pytest.mark.slow
def test_only_training_images_are_looked_at(
    fragile: Path, tmp_path: Path, data: DataSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: set[Path] = set()
    load_pixels = ImageSet.load_pixels

    def watched(images: ImageSet, *arguments: object, **options: object) -> Pixels:
        files.update(images.paths)
        return load_pixels(images, *arguments, **options)

    monkeypatch.setattr(ImageSet, "load_pixels", watched)
    options = PrepareOptions(calibration_images=32, calibration="mse")
    preparation = prepare(open_checkpoint(fragile, data=None), tmp_path, options, lambda _: None)
    for _ in itertools.islice(preparation.graphs("int8", "fp32"), 4):
        assert not files & set(data.test.paths)
    assert len(files & set(data.train.paths)) == 32


def test_the_command_climbs_until_one_passes_and_the_manifest_tells_the_whole_story(
    fragile: Path, tmp_path: Path, trimrt: Callable[..., Result]
) -> None:
    result = trimrt(
        *("build", fragile, "--target", "openvino", "-p", "int8", "-o", tmp_path),
        *("--calibration", "max", "--calibration-images", 64),
    )
    assert result.exit_code == 0, result.output
    manifest = read_manifest(tmp_path / "fragile-int8-openvino")
    calibration = manifest.provenance.calibration
    assert calibration is not None
    assert (calibration.method, calibration.changes) == ("mse", ["equalised", "bias"])
    assert calibration.tried == ["max"]
    refused, published = calibration.ladder
    assert "exact sums" in refused.refused
    assert published.refused is None
    assert published.exact_agreement > 0.98 > refused.exact_agreement
    assert manifest.evidence is not None
    assert manifest.evidence.label_agreement >= 0.98


@pytest.mark.slow
def test_a_kit_holds_one_way_more_than_passes_and_no_compiled_failure(
    fragile: Path, tmp_path: Path, trimrt: Callable[..., Result]
) -> None:
    """Its device may compute less exactly than the workstation."""
    made = trimrt(
        *("prepare", fragile, "--target", "openvino", "-p", "int8", "-o", tmp_path / "kit"),
        *("--calibration", "max", "--calibration-images", 64),
    )
    assert made.exit_code == 0, made.output
    kit = open_kit(tmp_path / "kit")
    names = [graph.calibration.name for graph in kit.manifest.graphs]
    assert names == ["max", "mse, equalised, bias", "mse, equalised, bias, rounded"]
    built = trimrt("build", kit.path, "--target", "openvino", "-p", "int8", "-o", tmp_path / "engines")
    assert built.exit_code == 0, built.output
    calibration = read_manifest(tmp_path / "engines/fragile-int8-openvino").provenance.calibration
    assert calibration.name == "mse, equalised, bias"


def test_a_refusal_names_what_came_nearest_and_every_remedy_that_is_left(
    fragile: Path, tmp_path: Path, trimrt: Callable[..., Result]
) -> None:
    result = trimrt(
        *("build", fragile, "--target", "openvino", "-p", "int8", "-o", tmp_path),
        *("--calibration-images", 32, "--no-correction", "--no-rounding", "--no-sensitivity"),
    )
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert "The nearest is" in said
    for remedy in (
        *("--correction", "--rounding", "--sensitivity", "--qat", "--calibration-images"),
        *("--max-drop (now 0.5 points)", "--min-agreement (now 98 %)", "int8-dynamic"),
    ):
        assert remedy in said
