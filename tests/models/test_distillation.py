"""Distillation: the losses of Hinton and of Huang, and views that are the same whenever they are drawn."""

from __future__ import annotations

import math
from _thread import interrupt_main
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from torch.nn import functional

from models.augmentation import random_affines, transform
from models.distillation import (
    TeacherViews,
    dist_loss,
    kl_loss,
    label_views,
    load_logits,
    view_seed,
)
from models.evaluation import normalise, to_float
from models.networks import build_network
from models.preprocessing import Preprocessing
from models.recipe import Augmentation, Distillation, DistillationLoss
from models.training import Images


class TestDivergence:
    def test_by_hand(self) -> None:
        # Two classes; the student says 2:1, the teacher 4:1, and T = 2 takes square roots of both.
        student, teacher = torch.tensor([[2.0, 1.0]]).log(), torch.tensor([[4.0, 1.0]]).log()
        p, q = math.sqrt(2) / (math.sqrt(2) + 1), 2 / 3
        divergence = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
        expected = 0.3 * math.log(3 / 2) + 0.7 * 4 * divergence
        loss = kl_loss(student, teacher, torch.tensor([0]), alpha=0.3, temperature=2)
        assert float(loss) == pytest.approx(expected, rel=1e-5)

    def test_alpha_1_is_cross_entropy(self) -> None:
        logits, targets = torch.randn(8, 5), torch.arange(8) % 5
        loss = kl_loss(logits, torch.randn(8, 5), targets, alpha=1, temperature=4)
        torch.testing.assert_close(loss, functional.cross_entropy(logits, targets))

    def test_agreeing_with_the_teacher_costs_nothing(self) -> None:
        logits = torch.randn(8, 5)
        loss = kl_loss(logits, logits + 3, torch.zeros(8, dtype=torch.long), alpha=0, temperature=4)
        assert float(loss) == pytest.approx(0, abs=1e-5)

    def test_gradients_keep_their_size_when_the_temperature_changes(self) -> None:
        generator = torch.Generator().manual_seed(0)
        teacher = torch.randn(64, 5, generator=generator)
        sizes = []
        for temperature in (20.0, 40.0):
            logits = torch.zeros(64, 5, requires_grad=True)
            targets = torch.zeros(64, dtype=torch.long)
            kl_loss(logits, teacher, targets, alpha=0, temperature=temperature).backward()
            assert logits.grad is not None
            sizes.append(float(logits.grad.norm()))
        assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


class TestDist:
    def test_by_hand(self) -> None:
        # Of two classes, each image's outputs correlate with the teacher's fully: positively, or
        # negatively where the two disagree on the order.
        student = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log()
        targets = torch.tensor([0, 0])
        cross_entropy = -(math.log(3 / 4) + math.log(1 / 4)) / 2
        for teacher, distance in ((student * 5, 0.0), (student.flip(1) * 5, 2.0)):
            loss = dist_loss(student, teacher, targets, temperature=1)
            assert float(loss) == pytest.approx(cross_entropy + 2 * distance + 2 * distance, rel=1e-5)

    def test_the_order_matters_and_not_the_confidence(self) -> None:
        generator = torch.Generator().manual_seed(0)
        teacher = torch.randn(32, 5, generator=generator).softmax(1)
        targets = teacher.argmax(1)
        # The same shares, evened out: a linear change of every row and every column.
        timid = (0.5 * teacher + 0.1).log()
        loss = dist_loss(timid, teacher.log(), targets, temperature=1)
        torch.testing.assert_close(loss, functional.cross_entropy(timid, targets))
        assert float(kl_loss(timid, teacher.log(), targets, alpha=0, temperature=1)) > 0.01

    def test_classes_are_compared_within_each_image(self) -> None:
        # Equal rows for the teacher's every image: nothing to learn within classes, all between them.
        logits = torch.randn(16, 5, generator=torch.Generator().manual_seed(1), requires_grad=True)
        dist_loss(
            logits, logits.detach().flip(0), torch.zeros(16, dtype=torch.long), temperature=4
        ).backward()
        assert logits.grad is not None
        assert torch.isfinite(logits.grad).all()
        assert bool((logits.grad != 0).all())


class TestAugmentation:
    def test_nothing_allowed_is_the_identity(self) -> None:
        still = Augmentation(rotation=0, scale=0, shear=0, shift=0, flip=False)
        pixels = torch.rand(4, 3, 9, 9)
        torch.testing.assert_close(transform(pixels, random_affines(4, still, 1)), pixels)

    def test_the_same_seed_draws_the_same(self) -> None:
        limits = Augmentation(flip=True)
        assert torch.equal(random_affines(50, limits, 3), random_affines(50, limits, 3))
        assert not torch.equal(random_affines(50, limits, 3), random_affines(50, limits, 4))

    def test_limits_are_kept(self) -> None:
        affines = random_affines(2000, Augmentation(rotation=0, scale=0.2, shear=0, shift=0.1, flip=False), 0)
        scale, shift = affines[:, 0, 0], affines[:, :, 2]
        assert 0.8 <= float(scale.min()) < 0.82
        assert 1.18 < float(scale.max()) <= 1.2
        assert 0.19 < float(shift.abs().max()) <= 0.2  # grid units: the width is 2

    def test_rotation_turns_and_does_not_stretch(self) -> None:
        affines = random_affines(500, Augmentation(rotation=30, scale=0, shear=0, shift=0, flip=False), 0)
        torch.testing.assert_close(torch.linalg.det(affines[:, :, :2]), torch.ones(500))
        angles = torch.atan2(affines[:, 1, 0], affines[:, 0, 0]).rad2deg()
        assert 29 < float(angles.max()) <= 30.001
        assert -30.001 <= float(angles.min()) < -29

    def test_flip_mirrors_half_of_the_images(self) -> None:
        affines = random_affines(1000, Augmentation(rotation=0, scale=0, shear=0, shift=0, flip=True), 0)
        mirrored = affines[:, 0, 0] < 0
        assert 400 < int(mirrored.sum()) < 600
        pixels = torch.rand(1000, 3, 4, 4)
        torch.testing.assert_close(transform(pixels, affines)[mirrored], pixels[mirrored].flip(3))


LIMITS = Augmentation(flip=False)


Labelled = tuple[torch.nn.Module, torch.Tensor]


def label(
    teacher: Callable[[torch.Tensor], torch.Tensor],
    images: Images,
    spec: Preprocessing,
    *,
    kept: Path | None = None,
    fingerprint: str = "",
) -> torch.Tensor:
    """The teacher's logits of two views."""
    progress = Progress(disable=True)
    return label_views(
        teacher,
        images.pixels,
        spec,
        LIMITS,
        views=2,
        seed=5,
        progress=progress,
        kept=kept,
        fingerprint=fingerprint,
    )


@pytest.fixture(scope="module")
def labelled(train_images: Images, spec: Preprocessing) -> Labelled:
    """A teacher, and its logits for two views of the training images."""
    torch.manual_seed(0)
    teacher = build_network("squeezenet1_1", 3, "small").eval()
    return teacher, label(teacher, train_images, spec)


class TestViews:
    def test_the_teacher_labelled_what_the_student_will_see(
        self,
        labelled: Labelled,
        train_images: Images,
        spec: Preprocessing,
    ) -> None:
        teacher, logits = labelled
        targets = torch.from_numpy(train_images.targets)
        views = TeacherViews(logits, targets, LIMITS, Distillation(), seed=5)
        for epoch in (0, 1, 2):
            pixels = to_float(train_images.pixels, torch.device("cpu"))
            seen = normalise(transform(pixels, views.affines(epoch)), spec)
            torch.testing.assert_close(teacher(seen), logits[epoch % 2], atol=1e-4, rtol=1e-4)

    def test_loss_finds_each_images_own_logits(self, labelled: Labelled, train_images: Images) -> None:
        logits = labelled[1]
        targets = torch.from_numpy(train_images.targets)
        views = TeacherViews(logits, targets, LIMITS, Distillation(alpha=0), seed=5)
        some = torch.tensor([7, 3, 11])
        assert float(views.loss(logits[1, some], some, epoch=3)) == pytest.approx(0, abs=1e-6)
        assert float(views.loss(logits[1, some], some.flip(0), epoch=3)) > 1e-6

    @pytest.mark.parametrize("loss", ["kl", "dist", "labels"])
    def test_the_settings_choose_the_loss(
        self, loss: DistillationLoss, labelled: Labelled, train_images: Images
    ) -> None:
        teacher, targets = labelled[1], torch.from_numpy(train_images.targets)
        views = TeacherViews(teacher, targets, LIMITS, Distillation(loss=loss, temperature=2), seed=5)
        some, logits = torch.tensor([7, 3, 11]), torch.randn(3, 3)
        expected = {
            "kl": kl_loss(logits, teacher[0, some], targets[some], alpha=0.5, temperature=2),
            "dist": dist_loss(logits, teacher[0, some], targets[some], temperature=2),
            "labels": functional.cross_entropy(logits, targets[some]),
        }
        assert len({round(float(value), 5) for value in expected.values()}) == 3
        torch.testing.assert_close(views.loss(logits, some, epoch=2), expected[loss])

    def test_logits_are_kept_under_their_fingerprint(
        self, labelled: Labelled, train_images: Images, spec: Preprocessing, tmp_path: Path
    ) -> None:
        teacher, logits = labelled
        file = tmp_path / "views"
        label(teacher, train_images, spec, kept=file, fingerprint="mine")
        loaded = load_logits(file, "mine")
        assert loaded is not None
        assert torch.equal(loaded, logits)
        assert load_logits(file, "another's") is None
        assert load_logits(tmp_path / "nothing", "mine") is None
        file.write_bytes(b"half")
        assert load_logits(file, "mine") is None

    @pytest.mark.parametrize("batch", [1, 2, 3])
    def test_an_interruption_changes_nothing(
        self,
        labelled: Labelled,
        train_images: Images,
        spec: Preprocessing,
        tmp_path: Path,
        batch: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("models.distillation.images_at_once", lambda spec, device: 32)  # of 43, twice
        teacher, _ = labelled
        whole = label(teacher, train_images, spec)
        seen: list[int] = []

        def interrupted(images: torch.Tensor) -> torch.Tensor:
            seen.append(len(images))
            if len(seen) == batch:
                interrupt_main()
            return teacher(images)

        file = tmp_path / "views"
        with pytest.raises(KeyboardInterrupt):
            label(interrupted, train_images, spec, kept=file)
        assert load_logits(file, "") is None  # a part of them serves nobody else
        assert torch.equal(label(interrupted, train_images, spec, kept=file), whole)
        assert sum(seen) == 2 * len(train_images.targets)  # each view of each image once

    def test_views_have_seeds_of_their_own(self) -> None:
        assert len({view_seed(seed, view) for seed in range(20) for view in range(20)}) == 400
