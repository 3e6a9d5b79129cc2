"""What ships with the repository is what its card says."""

import pytest
import torch

from models.checkpoint import load_checkpoint
from models.datasets import open_dataset
from models.evaluation import count_macs, count_parameters, evaluate
from models.pretrained import DIGITS_STUDENT


def test_the_shipped_student_is_small() -> None:
    assert sum(file.stat().st_size for file in DIGITS_STUDENT.iterdir()) <= 3_000_000


def test_the_shipped_students_card_is_true() -> None:
    network, card = load_checkpoint(DIGITS_STUDENT)
    data = open_dataset(card.dataset.source, fold=card.dataset.fold or 0)
    assert data.card() == card.dataset
    spec = card.preprocessing
    score = evaluate(network, data.test.load_pixels(spec, progress=False), data.test.targets, spec)
    assert (score.wrong, score.images) == (card.metrics.wrong, card.metrics.images)
    assert score.accuracy == card.metrics.accuracy
    assert score.loss == pytest.approx(card.metrics.loss, rel=1e-3)
    assert count_parameters(network) == card.metrics.parameters
    assert count_macs(network, spec.height, spec.width) == card.metrics.macs


def test_its_channels_are_aligned_for_int8() -> None:
    network, _ = load_checkpoint(DIGITS_STUDENT)
    widths = {m.out_channels for m in network.modules() if isinstance(m, torch.nn.Conv2d)}
    assert widths
    assert all(width % 16 == 0 for width in widths)


def test_its_card_tells_where_it_came_from() -> None:
    _, card = load_checkpoint(DIGITS_STUDENT)
    teacher, student = card.lineage
    assert (teacher.role, student.role) == ("teacher", "student")
    assert teacher.metrics.parameters > student.metrics.parameters > card.metrics.parameters
