"""INT8 calibration sees training images and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from small_student import SPEC

from builder.kit import INPUT, Graph, Kit
from builder.prepare.export import quiet
from builder.prepare.options import PrepareOptions
from builder.prepare.preparation import open_checkpoint, prepare
from models.datasets import DataSplit, ImageSet
from models.preprocessing import Pixels


@dataclass
class Observed:
    """What one preparation read and what ModelOpt was given, watched where it happened."""

    files: set[Path]
    calibrated: list[Pixels]
    graph: Graph


@pytest.fixture(scope="module")
def observed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Observed:
    with quiet():
        from modelopt.onnx import quantization

    files: set[Path] = set()
    calibrated: list[Pixels] = []
    load_pixels, quantize = ImageSet.load_pixels, quantization.quantize

    def watched_load_pixels(images: ImageSet, *arguments: Any, **options: Any) -> Pixels:
        files.update(images.paths)
        return load_pixels(images, *arguments, **options)

    def watched_quantize(*arguments: Any, **options: Any) -> None:
        calibrated.append(options["calibration_data"][INPUT])
        quantize(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageSet, "load_pixels", watched_load_pixels)
        patch.setattr(quantization, "quantize", watched_quantize)
        options = PrepareOptions(calibration_images=64, calibration="max", verification_images=144)
        subject, workspace = open_checkpoint(checkpoint, data=None), tmp_path_factory.mktemp("calibration")
        preparation = prepare(subject, workspace, options, lambda _: None)
        graph, _ = next(preparation.graphs("int8", "fp32"))
    return Observed(files, calibrated, graph)


def _images(pixels: Pixels) -> set[bytes]:
    return {image.tobytes() for image in pixels}


def test_no_test_image_is_read(observed: Observed, data: DataSplit) -> None:
    assert observed.files
    assert not observed.files & set(data.test.paths)


def test_modelopt_is_given_training_images(observed: Observed, data: DataSplit) -> None:
    (pixels,) = observed.calibrated

    assert len(_images(pixels)) == len(pixels) == 64
    assert _images(pixels) <= _images(data.train.load_pixels(SPEC))
    assert not _images(pixels) & _images(data.validation.load_pixels(SPEC))
    assert not _images(pixels) & _images(data.test.load_pixels(SPEC))


def test_the_choice_of_images_is_recorded(observed: Observed, data: DataSplit) -> None:
    calibration = observed.graph.calibration
    assert calibration is not None
    chosen = sorted(observed.files - set(data.validation.paths))
    indices = [index for index, path in enumerate(data.train.paths) if path in set(chosen)]

    assert (calibration.method, calibration.images, calibration.seed) == ("max", 64, 0)
    assert calibration.images_sha256 == data.train.subset(indices, "again").sha256


@pytest.mark.parametrize("images", [1, 7])
def test_a_handful_of_images_calibrates_too(checkpoint: Path, tmp_path: Path, images: int) -> None:
    """Fewer than the calibrator takes at once."""
    options = PrepareOptions(calibration_images=images, calibration="max", verification_images=144)
    preparation = prepare(open_checkpoint(checkpoint, data=None), tmp_path, options, lambda _: None)
    graph, _ = next(preparation.graphs("int8", "fp32"))
    assert graph.calibration is not None
    assert graph.calibration.images == images


def test_verification_images_are_the_validation_images(kit: Kit, data: DataSplit) -> None:
    """Shifted by a pixel this way and that, because 144 images could not tell half a point."""
    images = kit.verification
    validation = data.validation.load_pixels(SPEC)

    assert images.name == "digits-fold0-validation in 7 positions"
    assert len(images.pixels) == len(images.targets) == len(images.logits) == 7 * len(validation)
    assert (images.pixels[: len(validation)] == validation).all()
    for position, inner in enumerate(images.pixels.reshape(7, *validation.shape)):
        assert (images.targets.reshape(7, -1)[position] == data.validation.targets).all()
        shifted = {inner[:, 1 + y : 23 + y, 1 + x : 23 + x].tobytes() for y in (-1, 0, 1) for x in (-1, 0, 1)}
        assert validation[:, 1:23, 1:23].tobytes() in shifted
