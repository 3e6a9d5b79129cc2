"""Knowledge distillation from cached teacher outputs.

The teacher labels a fixed number of augmented views of the training images once; the student and
every fine-tuning learn from these, so the teacher costs nothing later and all of them see the same.
A view is not stored but drawn again from its seed; only the teacher's logits are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import safetensors
import safetensors.torch
import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn import functional

from models.augmentation import random_affines, transform
from models.evaluation import images_at_once, normalise, to_float
from models.files import replace_file
from models.preprocessing import Pixels, Preprocessing
from models.recipe import Augmentation, Distillation, TrainingPrecision
from models.state import StateSaver
from models.training import derive_seed, mixed_precision

VIEWS_TASK: Final = "teacher's views"
_CPU: Final = torch.device("cpu")


def kl_loss(
    logits: Tensor, teacher_logits: Tensor, targets: Tensor, *, alpha: float, temperature: float
) -> Tensor:
    """Cross-entropy and Kullback-Leibler divergence to the teacher's softened outputs.

    Hinton et al. 2015 (https://arxiv.org/abs/1503.02531), section 2: the divergence is scaled by the
    squared temperature, so that its gradients keep their size when the temperature changes.

    Args:
        logits: shape (N, classes).
        teacher_logits: shape (N, classes).
        targets: class indices, shape (N,).
        alpha: weight of the cross-entropy; the divergence has 1 - alpha.
        temperature: divides both logits in the divergence.

    Returns:
        The mean over the batch, a scalar.
    """
    hard = functional.cross_entropy(logits, targets)
    soft = functional.kl_div(
        functional.log_softmax(logits / temperature, dim=1),
        functional.log_softmax(teacher_logits / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return alpha * hard + (1 - alpha) * temperature**2 * soft


def dist_loss(logits: Tensor, teacher_logits: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy, and Pearson's correlation with the teacher's outputs instead of their very values.

    DIST (Huang et al. 2022, https://arxiv.org/abs/2205.10536), equations 8 to 11: a student that ranks
    the classes of an image, and the images of a class, as a stronger teacher does need not match its
    confidence. The two correlations weigh twice as much as the cross-entropy, each.

    Args:
        logits: shape (N, classes), N at least 2.
        teacher_logits: shape (N, classes).
        targets: class indices, shape (N,).
        temperature: divides both logits before the softmax.

    Returns:
        The mean over the batch, a scalar.
    """
    student = functional.softmax(logits / temperature, dim=1)
    teacher = functional.softmax(teacher_logits / temperature, dim=1)
    between_classes = 1 - _correlation(student, teacher).mean()
    within_classes = 1 - _correlation(student.T, teacher.T).mean()
    return functional.cross_entropy(logits, targets) + 2 * between_classes + 2 * within_classes


def _correlation(left: Tensor, right: Tensor) -> Tensor:
    """Pearson's correlation of each row of `left` with the same of `right`."""
    left, right = (rows - rows.mean(dim=1, keepdim=True) for rows in (left, right))
    return functional.cosine_similarity(left, right, dim=1)


def view_seed(seed: int, view: int) -> int:
    """The seed that view number `view` is drawn with; different from every training epoch's."""
    return derive_seed(view, f"view {seed}")


@dataclass(frozen=True)
class TeacherViews:
    """Augmented views of the training images with the teacher's logits; an epoch's `Objective`.

    Attributes:
        logits: float32, shape (views, N, classes).
        targets: class indices, shape (N,).
    """

    logits: Tensor
    targets: Tensor
    limits: Augmentation
    settings: Distillation
    seed: int

    def affines(self, epoch: int) -> Tensor:
        """Transformations of all images in `epoch`, shape (N, 2, 3)."""
        return random_affines(len(self.targets), self.limits, view_seed(self.seed, epoch % len(self.logits)))

    def loss(self, logits: Tensor, images: Tensor, epoch: int) -> Tensor:
        """The settings' loss of the `logits` of the images numbered `images`."""
        settings, targets = self.settings, self.targets[images].to(logits.device)
        if settings.loss == "labels":
            return functional.cross_entropy(logits, targets)
        teacher = self.logits[epoch % len(self.logits), images].to(logits.device)
        if settings.loss == "dist":
            return dist_loss(logits, teacher, targets, temperature=settings.temperature)
        return kl_loss(logits, teacher, targets, alpha=settings.alpha, temperature=settings.temperature)


@torch.inference_mode()
def label_views(
    teacher: Callable[[Tensor], Tensor],
    pixels: Pixels,
    spec: Preprocessing,
    limits: Augmentation,
    *,
    views: int,
    seed: int,
    progress: Progress,
    device: torch.device = _CPU,
    precision: TrainingPrecision = "fp32",
    kept: Path | None = None,
    fingerprint: str = "",
) -> Tensor:
    """The teacher's logits for each view of each image: float32 on the CPU, shape (views, N, classes).

    Args:
        teacher: gives logits of normalised images, float32 of shape (n, 3, H, W); in evaluation mode.
        pixels: the training images as the teacher takes them, uint8 NHWC.
        spec: for mean and standard deviation.
        limits: how images are varied.
        views: how many there are of each image.
        seed: of the views.
        progress: running.
        device: of the teacher.
        precision: of its convolutions and matrix products.
        kept: file with what an interrupted call has done, and a finished one; None: nothing is kept.
        fingerprint: of all that decides the outcome; what was kept with another one is not used.

    Raises:
        KeyboardInterrupt: Ctrl-C; what was done is kept.
    """
    logits, done = (None, 0) if kept is None else _load(kept, fingerprint)
    count, size = len(pixels), images_at_once(spec, device)

    def save() -> None:
        if kept is not None and logits is not None:
            _save(kept, logits, done, fingerprint)

    if logits is not None and done == views * count:
        return logits
    task = progress.add_task(VIEWS_TASK, total=views * count, completed=done, info="")
    with StateSaver(save) as saver:
        for view in range(done // count, views):
            affines = random_affines(count, limits, view_seed(seed, view)).to(device)
            for start in range(done - view * count, count, size):
                batch = slice(start, start + size)
                images = transform(to_float(pixels[batch], device), affines[batch])
                with mixed_precision(precision, device):
                    answers = teacher(normalise(images, spec)).float().cpu()
                if logits is None:
                    logits = torch.zeros(views, count, answers.shape[1])
                logits[view, batch] = answers
                done += len(images)
                progress.update(task, advance=len(images), info=f"view {view + 1}/{views}")
                saver.step_done()
        saver.save()
    progress.remove_task(task)
    assert logits is not None, "there is a view, and an image"
    return logits


def load_logits(path: Path, fingerprint: str) -> Tensor | None:
    """All logits that `label_views` kept with the same fingerprint, or None."""
    logits, done = _load(path, fingerprint)
    return logits if logits is not None and done == logits.shape[0] * logits.shape[1] else None


def _load(path: Path, fingerprint: str) -> tuple[Tensor | None, int]:
    """Logits, of which the first so many are computed."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("fingerprint") != fingerprint:
                return None, 0
            return file.get_tensor("logits"), int(metadata["done"])
    except (OSError, KeyError, safetensors.SafetensorError):
        return None, 0


def _save(path: Path, logits: Tensor, done: int, fingerprint: str) -> None:
    metadata = {"fingerprint": fingerprint, "done": str(done)}
    with replace_file(path) as new:
        new.write_bytes(safetensors.torch.save({"logits": logits}, metadata))
