"""Settings that fit the machine and the images, where nobody chose others.

Small images and GPUs keep the recipe's own defaults. Photographs on a CPU would take a day with those.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, TypeVar

import torch
import torchvision
from pydantic import BaseModel

from models.networks import architectures
from models.recipe import Recipe

PHOTO_SIDE: Final = 96  # pixels; inputs below it get the small stem and are not mirrored
PHOTO_INPUT: Final = 224

_SIDE: Final = 128
_SMALL_SIDE: Final = 64  # the small stem halves the image once less, so it is as much work
_FITTED_FROM: Final = 96  # of such pixels
_LARGE_FROM: Final = 160  # fewer images fit into the same memory
_OF_FIXED_SIZE: Final = ("maxvit_", "vit_")  # architectures for images of 224 pixels alone

_TEACHER: Final = "resnet34"
_EPOCHS: Final = {"teacher": 30, "student": 30, "pruning": 10}
_VIEWS: Final = 20
_BATCH_SIZE: Final = 16
_LARGE_BATCH_SIZE: Final = 8
_RATES: Final = {"teacher": 7e-4, "student": 1e-3, "pruning": 5e-4}  # for batches of that size
_FEW_IMAGES: Final = 1000  # of more, fewer passes are enough
_LEAST_SHARE: Final = 0.25
_FROM_PRETRAINED: Final = {"epochs": 8, "learning_rate": 3e-4}

_Section = TypeVar("_Section", bound=BaseModel)


def fit_recipe(recipe: Recipe, *, side: int, images: int, device: torch.device) -> Recipe:
    """The recipe with the settings that nobody chose fitted to the machine.

    Args:
        recipe: what it sets itself stays.
        side: of the images, in pixels.
        images: to train on.
        device: to train on.
    """
    own = recipe.teacher.model_fields_set
    if device.type == "cpu":
        recipe = _fit_to_cpu(recipe, side, images)
    is_photo = (recipe.image.size or side) >= PHOTO_SIDE and recipe.image.stem != "small"
    if not is_photo or "weights" in own:
        return recipe
    weights = pretrained_weights(recipe.teacher.architecture)
    if weights is None or not weights.is_file():
        return recipe
    beginning = {name: value for name, value in _FROM_PRETRAINED.items() if name not in own}
    teacher = recipe.teacher.model_copy(update={"weights": weights, **beginning})
    return recipe.model_copy(update={"teacher": teacher})


def _fit_to_cpu(recipe: Recipe, side: int, images: int) -> Recipe:
    networks = recipe.teacher.architecture, recipe.student.architecture
    image = recipe.image
    if not any(name.removeprefix("timm:").startswith(_OF_FIXED_SIZE) for name in networks):
        image = _fill(image, size=_SIDE if side >= PHOTO_SIDE else min(side, _SMALL_SIDE))
    size = image.size or (PHOTO_INPUT if side >= PHOTO_SIDE else side)
    if size < PHOTO_SIDE and image.stem != "standard":
        size *= 2
    if size < _FITTED_FROM:
        return recipe
    batch_size = _BATCH_SIZE if size < _LARGE_FROM else _LARGE_BATCH_SIZE
    share = min(1.0, max(_LEAST_SHARE, _FEW_IMAGES / images))
    fitted: dict[str, dict[str, Any]] = {
        name: {"batch_size": batch_size, "epochs": round(share * epochs), "learning_rate": _RATES[name]}
        for name, epochs in _EPOCHS.items()
    }
    beginning = (
        _FROM_PRETRAINED if "weights" in recipe.teacher.model_fields_set else {"architecture": _TEACHER}
    )
    return recipe.model_copy(
        update={
            "image": image,
            "teacher": _fill(recipe.teacher, **fitted["teacher"] | beginning),
            "student": _fill(recipe.student, **fitted["student"]),
            "distillation": _fill(recipe.distillation, views=round(share * _VIEWS)),
            "pruning": _fill(recipe.pruning, **fitted["pruning"]),
        }
    )


def pretrained_weights(architecture: str) -> Path | None:
    """Where torch keeps the architecture's ImageNet weights once something has downloaded them."""
    if architecture not in architectures():
        return None  # building it will say so
    url: str = torchvision.models.get_model_weights(architecture).DEFAULT.url
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def _fill(section: _Section, **values: object) -> _Section:
    """The section with the values of the fields that it does not set itself."""
    chosen = {name: value for name, value in values.items() if name not in section.model_fields_set}
    return section.model_copy(update=chosen)
