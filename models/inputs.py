"""What the networks are fed: input size, stem and normalisation chosen to fit the images."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Final

import numpy as np
import PIL.Image

from models.card import CARD_NAME, read_card
from models.datasets import ImageSet
from models.defaults import PHOTO_INPUT, PHOTO_SIDE
from models.networks import Stem
from models.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Pixels, Preprocessing
from models.recipe import Recipe

_SMALLEST_INPUT: Final = 24  # below it a ResNet's last stage is one pixel wide even with the small stem
_PHOTO_RESIZE: Final = 256
_SAMPLE: Final = 1024  # images to judge by


def choose_inputs(images: ImageSet, recipe: Recipe) -> tuple[Preprocessing, Stem]:
    """Input size, stem, and the images' own mean and standard deviation.

    Args:
        images: the training images; an even sample of them is looked at.
        recipe: its `image` section overrides the choice. With pretrained weights the mean and standard
            deviation are those of the checkpoint they are in, else ImageNet's, which torchvision's expect.

    Raises:
        DatasetError: an image cannot be read.
        CheckpointError: the weights are in a checkpoint whose card is not valid.
    """
    sample = images.spread(_SAMPLE, images.name)
    if recipe.image.size is not None:
        size = recipe.image.size
    else:
        shorter_side = typical_side(images)
        size = max(shorter_side, _SMALLEST_INPUT) if shorter_side < PHOTO_SIDE else PHOTO_INPUT
    resize = size if size < PHOTO_SIDE else round(size * _PHOTO_RESIZE / PHOTO_INPUT)
    stem: Stem
    if recipe.image.stem == "auto":
        stem = "small" if size < PHOTO_SIDE else "standard"
    else:
        stem = recipe.image.stem
    weights = recipe.teacher.weights
    if weights is not None and (weights.parent / CARD_NAME).exists():
        trained = read_card(weights.parent).preprocessing
        mean, std = trained.mean, trained.std
    elif weights is not None:
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    else:
        mean, std = _statistics(sample.load_pixels(Preprocessing(resize=resize, height=size, width=size)))
    return Preprocessing(resize=resize, height=size, width=size, mean=mean, std=std), stem


def typical_side(images: ImageSet) -> int:
    """The median of the lengths of the images' shorter sides, in pixels."""
    return int(statistics.median(map(_shorter_side, images.spread(_SAMPLE, images.name).paths)))


def _statistics(pixels: Pixels) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each channel, of pixels from 0 to 1, rounded to four places."""
    values = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(3):
        # Counted image by image: as floating-point numbers all pixels would take gigabytes.
        counts = sum(np.bincount(image[..., channel].ravel(), minlength=256) for image in pixels)
        mean = float(np.average(values, weights=counts))
        means.append(round(mean, 4))
        deviation = float(np.sqrt(np.average((values - mean) ** 2, weights=counts)))
        deviations.append(max(round(deviation, 4), 0.01))  # images of a single colour have none to divide by
    (red, green, blue), (red_deviation, green_deviation, blue_deviation) = means, deviations
    return (red, green, blue), (red_deviation, green_deviation, blue_deviation)


def _shorter_side(path: Path) -> int:
    try:
        with PIL.Image.open(path) as image:
            return min(image.size)
    except Exception:  # loading the pixels will name the file and the fault
        return PHOTO_SIDE
