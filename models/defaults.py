"""Settings that fit the machine and the images, where nobody chose others.

Small images and GPUs keep the recipe's own defaults. Photographs on a CPU would take days with those.
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

_SIDE: Final = 128
_OF_FIXED_SIZE: Final = ("maxvit_", "vit_")  # architectures for images of 224 pixels alone
_LARGE_SIDE: Final = 160  # from it on, fewer images fit into the same memory
_TEACHER: Final = "resnet34"
_EPOCHS: Final = {"teacher": 30, "student": 30, "pruning": 10}
_VIEWS: Final = 20
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
    if (recipe.image.size or side) < PHOTO_SIDE:
        return recipe
    changes: dict[str, BaseModel] = {}
    teacher: dict[str, Any] = {}
    has_weights = recipe.teacher.weights is not None
    if device.type == "cpu":
        networks = recipe.teacher.architecture, recipe.student.architecture
        is_free = not any(network.startswith(_OF_FIXED_SIZE) for network in networks)
        image = _fill(recipe.image, size=_SIDE if is_free else None)
        batch_size = 32 if image.size is not None and image.size < _LARGE_SIDE else 16
        share = min(1.0, max(_LEAST_SHARE, _FEW_IMAGES / images))
        epochs = {name: round(share * count) for name, count in _EPOCHS.items()}
        teacher = {"batch_size": batch_size, "epochs": epochs["teacher"]}
        teacher |= _FROM_PRETRAINED if has_weights else {"architecture": _TEACHER}
        changes = {
            "image": image,
            "student": _fill(recipe.student, batch_size=batch_size, epochs=epochs["student"]),
            "distillation": _fill(recipe.distillation, views=round(share * _VIEWS)),
            "pruning": _fill(recipe.pruning, batch_size=batch_size, epochs=epochs["pruning"]),
        }
    if not has_weights:
        weights = pretrained_weights(_fill(recipe.teacher, **teacher).architecture)
        if weights is not None and weights.is_file():
            teacher |= {"weights": weights, **_FROM_PRETRAINED}
    changes["teacher"] = _fill(recipe.teacher, **teacher)
    return recipe.model_copy(update=changes)


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
