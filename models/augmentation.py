"""Random affine transformations of a batch of images, each reproducible from a seed."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from models.recipe import Augmentation


def random_affines(images: int, limits: Augmentation, seed: int) -> Tensor:
    """Draw one transformation for each image; the same seed draws the same.

    Returns:
        float32, shape (images, 2, 3): output to input coordinates, both in -1..1 (as `affine_grid` takes).
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(images, generator=generator) * 2 - 1) * limit

    angle = uniform(math.radians(limits.rotation))
    scale = 1 + uniform(limits.scale)
    shear = uniform(limits.shear)
    shift = torch.stack([uniform(2 * limits.shift), uniform(2 * limits.shift)], dim=1)
    mirror = torch.ones(images)
    if limits.flip:
        mirror[torch.rand(images, generator=generator) < 0.5] = -1
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = torch.stack([cos * mirror, (cos * shear - sin), sin * mirror, (sin * shear + cos)], dim=1)
    return torch.cat([rows.view(-1, 2, 2), shift[:, :, None]], dim=2)


def transform(pixels: Tensor, affines: Tensor) -> Tensor:
    """Apply `affines` with bilinear sampling; what comes from outside the image is black.

    Args:
        pixels: float32, shape (N, 3, H, W).
        affines: float32, shape (N, 2, 3), from `random_affines`.

    Returns:
        float32, shape (N, 3, H, W).
    """
    grid = functional.affine_grid(affines, list(pixels.shape), align_corners=False)
    return functional.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
