"""Knowledge distillation from cached teacher outputs.

The teacher labels a fixed number of augmented views of the training images once; the student and
every fine-tuning learn from these, so the teacher costs nothing later and all of them see the same.
A view is not stored but drawn again from its seed; only the teacher's logits are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional

from models.augmentation import random_affines, transform
from models.evaluation import normalise, to_float
from models.files import replace_file
from models.preprocessing import Pixels, Preprocessing
from models.recipe import Augmentation, Distillation, TrainingPrecision
from models.training import derive_seed, mixed_precision

_BATCH = 256


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
    teacher: nn.Module,
    pixels: Pixels,
    spec: Preprocessing,
    limits: Augmentation,
    *,
    views: int,
    seed: int,
    progress: Progress,
    precision: TrainingPrecision = "fp32",
) -> Tensor:
    """The teacher's logits for each view of each image: float32 on the CPU, shape (views, N, classes)."""
    device = next(teacher.parameters()).device
    teacher.eval()
    task = progress.add_task("teacher's views", total=views * len(pixels), info="")
    labelled = []
    for view in range(views):
        affines = random_affines(len(pixels), limits, view_seed(seed, view)).to(device)
        logits = []
        for start in range(0, len(pixels), _BATCH):
            batch = slice(start, start + _BATCH)
            images = transform(to_float(pixels[batch], device), affines[batch])
            with mixed_precision(precision, device):
                logits.append(teacher(normalise(images, spec)).float().cpu())
            progress.advance(task, len(images))
        labelled.append(torch.cat(logits))
    progress.remove_task(task)
    return torch.stack(labelled)


def load_logits(path: Path, fingerprint: str) -> Tensor | None:
    """The logits that `save_logits` wrote with the same fingerprint, or None."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("fingerprint") != fingerprint:
                return None
            logits: Tensor = file.get_tensor("logits")
            return logits
    except (OSError, safetensors.SafetensorError):
        return None


def save_logits(path: Path, logits: Tensor, fingerprint: str) -> None:
    """Keep the teacher's logits for the next run."""
    with replace_file(path) as new:
        new.write_bytes(safetensors.torch.save({"logits": logits}, {"fingerprint": fingerprint}))
