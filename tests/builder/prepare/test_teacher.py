"""Networks that are there already, as teachers: classes are matched by name, images get in as in training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import Result

from builder import open_teacher
from builder.prepare.export import export_onnx, quiet
from models.card import CARD_NAME
from models.checkpoint import load_checkpoint
from models.datasets import DataSplit
from models.evaluation import normalise, predict_logits, to_float
from models.teacher import ReadyTeacher

Trimrt = Callable[..., Result]

SHORT = (
    *("--threads", "1", "--student-architecture", "resnet18", "--student-epochs", "1"),
    *("--pruning-epochs", "1", "--distillation-views", "1"),
    *("--student-batch-size", "16", "--pruning-batch-size", "16"),
)


@pytest.fixture(scope="module")
def network_file(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small student as an ONNX file of pixels, which names its ten classes."""
    network, card = load_checkpoint(checkpoint)
    file = tmp_path_factory.mktemp("onnx") / "Own Net.onnx"
    export_onnx(network, card.preprocessing, file)
    return named(file, card.labels)


@pytest.fixture(scope="module")
def three_digits(data: DataSplit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with 16 images of each of three digits, which the small student was trained on."""
    folder = tmp_path_factory.mktemp("three-digits")
    for target in (7, 1, 4):
        directory = folder / data.labels[target]
        directory.mkdir()
        for index in np.flatnonzero(data.train.targets == target)[:16]:
            shutil.copy(data.train.paths[index], directory)
    return folder


def named(file: Path, labels: list[str]) -> Path:
    model = onnx.load(str(file))
    del model.graph.output[1:]  # probabilities
    del model.metadata_props[:]
    entry = model.metadata_props.add()
    entry.key, entry.value = "labels", json.dumps(labels)
    onnx.save(model, str(file))
    return file


def logits(teacher: ReadyTeacher, data: DataSplit, labels: tuple[str, ...]) -> torch.Tensor:
    pixels = data.validation.load_pixels(teacher.preprocessing)
    images = normalise(to_float(pixels, torch.device("cpu")), teacher.preprocessing)
    with torch.inference_mode():
        return teacher.limited_to(labels)(images)


def test_a_checkpoint_and_its_onnx_file_teach_the_same(
    checkpoint: Path, network_file: Path, data: DataSplit
) -> None:
    network, card = load_checkpoint(checkpoint)
    spec = card.preprocessing
    expected = predict_logits(network, data.validation.load_pixels(spec), spec)
    for path in (checkpoint, network_file):
        teacher = open_teacher(path, threads=1)
        torch.testing.assert_close(logits(teacher, data, data.labels), expected, atol=1e-3, rtol=1e-3)
        assert teacher.parameters == pytest.approx(card.metrics.parameters, rel=0.02)


def test_outputs_are_matched_by_name_in_any_order(
    network_file: Path, data: DataSplit, tmp_path: Path
) -> None:
    expected = logits(open_teacher(network_file), data, ("3", "8"))
    other = [*data.labels[5:], *data.labels[:5]]
    renamed = named(Path(shutil.copy(network_file, tmp_path / "other.onnx")), other)
    places = [other.index(label) for label in ("3", "8")]
    same_outputs = tuple(data.labels[place] for place in places)
    torch.testing.assert_close(
        logits(open_teacher(renamed), data, ("3", "8")),
        logits(open_teacher(network_file), data, same_outputs),
    )
    assert not torch.equal(logits(open_teacher(renamed), data, ("3", "8")), expected)


def test_a_student_learns_from_an_onnx_file(
    trimrt: Trimrt, network_file: Path, three_digits: Path, tmp_path: Path
) -> None:
    command = ("compress", three_digits, "--out", tmp_path, "--teacher", network_file, *SHORT)
    result = trimrt(*command)
    assert result.exit_code == 0, result.output
    assert "teacher: Own Net" in result.output
    assert "100.00% of the validation images right" in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"student", "pruned", ".training"}
    _, card = load_checkpoint(tmp_path / "pruned")
    assert [(each.role, each.architecture) for each in card.lineage] == [
        ("teacher", "onnx"),
        ("student", "resnet18"),
    ]
    assert card.labels == ["1", "4", "7"]
    again = trimrt(*command)
    assert again.output.count("is finished already") == 2


@pytest.mark.slow
def test_another_teachers_student_is_another(
    trimrt: Trimrt, network_file: Path, checkpoint: Path, three_digits: Path, tmp_path: Path
) -> None:
    hashes = set()
    for teacher in (network_file, checkpoint):
        student = ("--teacher", teacher, "--until", "student")
        result = trimrt("compress", three_digits, "--out", tmp_path, *student, *SHORT)
        assert result.exit_code == 0, result.output
        hashes.add(load_checkpoint(tmp_path / "student")[1].weights_sha256)
    assert len(hashes) == 2


@pytest.mark.slow
def test_a_state_dict_is_kept_as_it_is(trimrt: Trimrt, three_digits: Path, tmp_path: Path) -> None:
    run = ("compress", three_digits, *SHORT, "--teacher-architecture", "resnet18", "--until", "teacher")
    trained = trimrt(*run, "--out", tmp_path / "a", "--teacher-epochs", "1", "--teacher-batch-size", "16")
    assert trained.exit_code == 0, trained.output
    weights = tmp_path / "a" / "teacher" / "student.safetensors"
    kept = trimrt(*run, "--out", tmp_path / "b", "--teacher", weights)
    assert kept.exit_code == 0, kept.output
    cards = [json.loads((tmp_path / run / "teacher" / CARD_NAME).read_text()) for run in ("a", "b")]
    assert cards[0]["weights_sha256"] == cards[1]["weights_sha256"]


class TestRefusals:
    @pytest.mark.parametrize(
        ("labels", "message"),
        [
            ("cat dog hen pig cow ape bee ant bat elk", "are no classes of the network"),
            ("1 2 3 4 5 6 7 8 9 0", "gets 0% of the validation images right, and guessing gets 33%"),
            ("1 4 7", "has 3 labels, the network has 10 classes"),
        ],
    )
    def test_other_classes(
        self,
        labels: str,
        message: str,
        trimrt: Trimrt,
        network_file: Path,
        three_digits: Path,
        tmp_path: Path,
    ) -> None:
        (tmp_path / "labels.txt").write_text(labels.replace(" ", "\n"))
        teacher = ("--teacher", network_file, "--teacher-labels", tmp_path / "labels.txt")
        result = trimrt("compress", three_digits, "--out", tmp_path / "out", *teacher, *SHORT)
        assert result.exit_code == 1
        output = " ".join(result.output.split())
        assert message in output
        assert "--teacher-labels" in output or "labels.txt has" in output
        assert "Traceback" not in output

    def test_what_is_not_said_is_asked_for_by_the_options_of_this_command(
        self, trimrt: Trimrt, three_digits: Path, checkpoint: Path, tmp_path: Path
    ) -> None:
        network, card = load_checkpoint(checkpoint)
        file, spec = tmp_path / "floats.onnx", card.preprocessing
        example = torch.zeros(1, 3, spec.height, spec.width)
        with quiet():
            torch.onnx.export(network, (example,), str(file), dynamo=True, verbose=False)
        result = trimrt("compress", three_digits, "--teacher", file)
        assert result.exit_code == 1
        assert "say so with --teacher-preprocess" in " ".join(result.output.split())

    def test_settings_of_a_training_that_does_not_take_place(
        self, trimrt: Trimrt, three_digits: Path, network_file: Path
    ) -> None:
        result = trimrt("compress", three_digits, "--teacher", network_file, "--teacher-epochs", "3")
        assert result.exit_code == 2
        assert "leave out --teacher-epochs" in " ".join(result.output.split())

    def test_making_the_teacher_alone(self, trimrt: Trimrt, three_digits: Path, network_file: Path) -> None:
        result = trimrt("compress", three_digits, "--teacher", network_file, "--until", "teacher")
        assert result.exit_code == 1
        assert "the teacher is there already" in result.output
