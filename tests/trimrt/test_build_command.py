"""`trimrt build` and `trimrt prepare` as a user meets them."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from builder.kit import Kit
from models.datasets import DataSplit
from runtime.manifest import Precision, read_manifest


def test_checkpoint_becomes_a_package_in_one_command(
    checkpoint: Path, tmp_path: Path, trimrt: Callable[..., Result]
) -> None:
    result = trimrt(
        *("build", checkpoint, "--target", "openvino", "--output", tmp_path, "--max-batch", 16),
        *("--calibration-images", 32, "--calibration", "max", "--max-drop", 1),
    )

    assert result.exit_code == 0, result.output
    assert "the exported graph's logits differ by" in result.output
    manifest = read_manifest(tmp_path / "tiny-digits-int8-openvino")
    assert manifest.batch.max == 16
    assert manifest.provenance.calibration is not None
    assert manifest.provenance.calibration.images == 32


def test_package_is_rebuilt_by_the_command_in_its_manifest(
    packages: dict[Precision, Path], trimrt: Callable[..., Result]
) -> None:
    before = read_manifest(packages["fp16"])
    program, *arguments = shlex.split(before.build_command)

    result = trimrt(*arguments)

    assert program == "trimrt"
    assert result.exit_code == 0, result.output
    after = read_manifest(packages["fp16"])
    assert int(after.version) == int(before.version) + 1
    assert after.provenance.onnx_sha256 == before.provenance.onnx_sha256


def test_fp16_engine_of_a_cpu_says_that_it_computes_in_fp32(packages: dict[Precision, Path]) -> None:
    assert read_manifest(packages["fp16"]).arithmetic == "fp32"


def test_fp16_halves_the_blob_too(packages: dict[Precision, Path]) -> None:
    """OpenVINO by itself would store FP32 weights, because that is what it computes in."""
    fp32, fp16 = ((packages[p] / "engine.blob").stat().st_size for p in ("fp32", "fp16"))
    assert fp32 / fp16 >= 1.9


def test_manifest_tells_the_whole_story(packages: dict[Precision, Path], kit: Kit, checkpoint: Path) -> None:
    manifest = read_manifest(packages["int8"])

    assert manifest.name == packages["int8"].name == "tiny-digits-int8-openvino"
    assert (manifest.backend, manifest.precision) == ("openvino", "int8")
    assert manifest.input.model_dump() == {
        "name": "images", "dtype": "uint8", "shape": [-1, 24, 24, 3], "layout": "NHWC"
    }  # fmt: skip
    assert [output.name for output in manifest.outputs] == ["logits", "probabilities"]
    assert manifest.labels == [str(digit) for digit in range(10)]
    assert manifest.preprocessing == kit.student.preprocessing
    assert manifest.provenance.parameters == kit.student.parameters
    calibration = manifest.provenance.calibration
    assert calibration is not None
    assert (calibration.images, calibration.seed) == (512, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "int4"], "'int4' (did you mean int8?): choose from fp32, fp16, int8, int8-dynamic"),
        (["--min-batch", "8", "--max-batch", "4"], "batch sizes must be ordered"),
        (["--max-drop", "-1"], "is not in the range"),
        (["--target", "tpu"], "'tpu' is not one of"),
    ],
)
def test_wrong_options_are_explained(
    kit: Kit, tmp_path: Path, trimrt: Callable[..., Result], arguments: list[str], message: str
) -> None:
    result = trimrt("build", kit.path, "--output", tmp_path, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_folder_that_is_neither_checkpoint_nor_kit(tmp_path: Path, trimrt: Callable[..., Result]) -> None:
    result = trimrt("build", tmp_path, "--target", "openvino")
    assert result.exit_code == 1
    assert "is not a checkpoint" in result.output


def test_other_data_than_the_student_was_trained_on_is_refused(
    checkpoint: Path, data: DataSplit, tmp_path: Path, trimrt: Callable[..., Result]
) -> None:
    """One image less, and the validation images may be ones that the network has learned."""
    cache = tmp_path / "cache"
    shutil.copytree(data.train.root, cache / "digits")
    next((cache / "digits").rglob("*.png")).unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIMRT_CACHE", str(cache))
        result = trimrt("build", checkpoint, "--target", "openvino", "--output", tmp_path / "engines")

    assert result.exit_code == 1
    assert "is not what tiny-digits was trained on" in result.output


def test_data_with_other_classes_is_refused(
    checkpoint: Path, data: DataSplit, tmp_path: Path, trimrt: Callable[..., Result]
) -> None:
    shutil.copytree(data.train.root, tmp_path / "letters")
    (tmp_path / "letters/9").rename(tmp_path / "letters/nine")

    result = trimrt("build", checkpoint, "--data", tmp_path / "letters", "--output", tmp_path / "engines")

    assert result.exit_code == 1
    assert "has other classes" in result.output


def test_prepare_does_not_replace_what_is_no_kit(
    checkpoint: Path, tmp_path: Path, trimrt: Callable[..., Result]
) -> None:
    (tmp_path / "notes.txt").write_text("keep me")

    result = trimrt("prepare", checkpoint, "--output", tmp_path)

    assert result.exit_code == 1
    assert "is not a build kit" in result.output
    assert (tmp_path / "notes.txt").read_text() == "keep me"
