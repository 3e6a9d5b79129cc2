"""No engine is published that is worse than it may be."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from builder.compile.packages import build_package
from builder.compile.targets.openvino.target import OpenVINOTarget
from builder.compile.verification import Gate, compare, engine_logits
from builder.kit import KIT_NAME, Kit
from builder.prepare.int8 import convert_to_int8
from models.datasets import DataSplit
from runtime.loading import load_engine
from runtime.manifest import BatchSizes, Precision, read_manifest, sha256_of


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8-dynamic"])
def test_manifest_holds_what_the_engine_gives_when_run_again(
    packages: dict[Precision, Path], kit: Kit, precision: Precision
) -> None:
    engine = load_engine(packages[precision])
    evidence = engine.manifest.evidence
    assert evidence is not None

    again = compare(engine, kit.verification)

    assert evidence.image_set == "digits-fold0-validation in 7 positions"
    assert dataclasses.asdict(again).items() <= evidence.model_dump().items()
    assert evidence.reference_top1 >= 0.9  # a reference that knows nothing would prove nothing
    assert evidence.latency_ms > 0
    assert evidence.throughput > 0


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8-dynamic"])
def test_engine_is_as_accurate_on_test_images(
    packages: dict[Precision, Path], data: DataSplit, precision: Precision
) -> None:
    fp32, engine = load_engine(packages["fp32"]), load_engine(packages[precision])
    pixels = data.test.load_pixels(engine.manifest.preprocessing)
    top1, fp32_top1 = (
        np.mean(engine_logits(each, pixels).argmax(axis=1) == data.test.targets) for each in (engine, fp32)
    )
    assert top1 >= fp32_top1 - 0.009


@pytest.fixture(scope="module")
def badly_calibrated(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An INT8 graph calibrated on black images, so that all else is clipped."""
    path = tmp_path_factory.mktemp("graphs") / "black.onnx"
    _, master = next(kit.graphs("fp32", "fp32"))
    convert_to_int8(master, path, np.zeros((8, 24, 24, 3), np.uint8), method="max", rest="fp32")
    return path


@pytest.mark.parametrize(("share", "exit_code"), [(0.49, 1), (0.5, 0)])
def test_an_engine_that_is_int8_by_name_only_is_not_published(
    trimrt: Callable[..., Result], kit: Kit, tmp_path: Path, share: float, exit_code: int
) -> None:
    folder = shutil.copytree(kit.path, tmp_path / "kit")
    graphs = [graph.model_copy(update={"int8_share": share}) for graph in kit.manifest.graphs]
    (folder / KIT_NAME).write_text(kit.manifest.model_copy(update={"graphs": graphs}).model_dump_json())
    result = trimrt(
        "build", folder, "--precision", "int8", "--target", "openvino", "-o", tmp_path / "engines"
    )
    assert result.exit_code == exit_code
    assert ("only 49% of its multiply-accumulates run in INT8" in " ".join(result.output.split())) == (
        exit_code == 1
    )
    assert len(list((tmp_path / "engines").glob("*int8*"))) == 1 - exit_code


def _kit_with(kit: Kit, folder: Path, replacements: dict[str, Path]) -> Path:
    """A copy of `kit` in which some graphs are other files."""
    shutil.copytree(kit.path, folder)
    graphs = []
    for graph in kit.manifest.graphs:
        if graph.file in replacements:
            shutil.copyfile(replacements[graph.file], folder / graph.file)
            graph = graph.model_copy(update={"sha256": sha256_of(folder / graph.file)})
        graphs.append(graph)
    manifest = kit.manifest.model_copy(update={"graphs": graphs})
    (folder / KIT_NAME).write_text(manifest.model_dump_json())
    return folder


def _visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_engine_that_fails_the_gate_is_not_published(
    kit: Kit, badly_calibrated: Path, tmp_path: Path, trimrt: Callable[..., Result]
) -> None:
    bad = dict.fromkeys(["int8-entropy-fp32.onnx", "int8-max-fp32.onnx"], badly_calibrated)
    source, output = _kit_with(kit, tmp_path / "kit", bad), tmp_path / "engines"

    result = trimrt("build", source, "--precision", "fp32,int8", "--output", output)

    assert result.exit_code == 1
    assert "tiny-digits-int8-openvino was not published" in result.output
    assert "top-1 falls by" in result.output
    assert "--qat (of `trimrt prepare`) fine-tunes the network for INT8" in result.output
    assert _visible(output) == ["tiny-digits-fp32-openvino"]  # which is none the worse for it
    assert not list(output.glob("*/*.partial")) + list(output.glob("*.partial"))


def test_engine_that_fails_the_gate_leaves_the_published_one_alone(
    kit: Kit, badly_calibrated: Path, tmp_path: Path, trimrt: Callable[..., Result]
) -> None:
    bad = dict.fromkeys(["int8-entropy-fp32.onnx", "int8-max-fp32.onnx"], badly_calibrated)
    source, output = _kit_with(kit, tmp_path / "kit", bad), tmp_path / "engines"
    assert trimrt("build", kit.path, "--precision", "int8", "--output", output).exit_code == 0
    package = output / "tiny-digits-int8-openvino"
    before = {path.name: path.read_bytes() for path in package.iterdir()}

    assert trimrt("build", source, "--precision", "int8", "--output", output).exit_code == 1

    assert {path.name: path.read_bytes() for path in package.iterdir()} == before


def test_next_calibration_method_is_tried_and_both_are_recorded(
    kit: Kit, badly_calibrated: Path, tmp_path: Path, trimrt: Callable[..., Result]
) -> None:
    source = _kit_with(kit, tmp_path / "kit", {"int8-entropy-fp32.onnx": badly_calibrated})

    result = trimrt("build", source, "--precision", "int8", "--output", tmp_path / "engines")

    assert result.exit_code == 0, result.output
    assert re.search(r"rejected entropy \(\d+ s\): top-1 falls by", result.output)
    calibration = read_manifest(tmp_path / "engines/tiny-digits-int8-openvino").provenance.calibration
    assert calibration is not None
    assert (calibration.method, calibration.tried) == ("max", ["entropy"])


def test_both_limits_are_options(
    kit: Kit, badly_calibrated: Path, tmp_path: Path, trimrt: Callable[..., Result]
) -> None:
    source = _kit_with(kit, tmp_path / "kit", {"int8-entropy-fp32.onnx": badly_calibrated})
    loose = ("--max-drop", 100, "--min-agreement", 0)

    result = trimrt("build", source, "--precision", "int8", "--output", tmp_path / "engines", *loose)

    assert result.exit_code == 0, result.output
    evidence = read_manifest(tmp_path / "engines/tiny-digits-int8-openvino").evidence
    assert evidence is not None
    assert evidence.label_agreement < Gate().min_agreement


class _ElsewhereTarget(OpenVINOTarget):
    """Compiles for a device that this machine does not have."""

    def missing_device(self) -> str:
        return "this machine has no such device"


def test_engine_that_cannot_be_run_here_says_that_it_is_unverified(kit: Kit, tmp_path: Path) -> None:
    package = build_package(
        kit,
        _ElsewhereTarget(),
        "fp32",
        tmp_path,
        batch=BatchSizes(min=1, opt=1, max=4),
        gate=Gate(),
        command="trimrt build kit",
        report=lambda _: None,
    )

    assert package.unverified is not None
    assert package.unverified.startswith("this machine has no such device")
    assert read_manifest(package.folder).evidence is None


def test_fixed_batch_is_verified_with_its_last_batch_filled_up(kit: Kit, tmp_path: Path) -> None:
    """1008 images are no multiple of 5."""
    package = build_package(
        kit,
        OpenVINOTarget(),
        "fp32",
        tmp_path,
        batch=BatchSizes(min=5, opt=5, max=5),
        gate=Gate(),
        command="trimrt build kit",
        report=lambda _: None,
    )

    evidence = package.manifest.evidence
    assert evidence is not None
    assert (evidence.images, evidence.label_agreement) == (1008, 1.0)
