"""Whether an architecture fits a run: found out before anything is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from models.networks import (
    PRUNABLE,
    NetworkError,
    Stem,
    build_network,
    build_planned_network,
    channel_plan,
    skeleton,
)
from models.preprocessing import Preprocessing
from models.pruning import Pruner, PruningError
from models.recipe import Pruning

_PRUNABLE_LAYERS = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)


def require_trainable(architecture: str, classes: int, stem: Stem, spec: Preprocessing) -> None:
    """Raise unless the architecture turns images of that size into one score for each class.

    Raises:
        NetworkError: there is no such architecture, or it takes images of other sizes only.
    """
    network = skeleton(lambda: build_network(architecture, classes, stem))
    try:
        shape = output_shape(network, spec)
    except Exception as error:  # networks refuse sizes in as many ways as there are architectures
        size = own_size(network)
        made_for = f" (it is made for {size})" if size not in (None, spec.height) else ""
        raise NetworkError(
            f"{architecture} cannot take {spec.height}x{spec.width} images: {_first_line(error)}; choose "
            f"another --image-size{made_for}, or another architecture"
        ) from error
    if shape != (2, classes):
        raise NetworkError(f"{architecture} gives scores of shape {shape}, not {classes} for each image")


def require_prunable(
    architecture: str, classes: int, stem: Stem, spec: Preprocessing, settings: Pruning
) -> nn.Module:
    """Prune the architecture with random weights: it has to work afterwards, and be rebuilt from its card.

    Returns:
        The pruned network, without values.

    Raises:
        PruningError: it cannot; the message says why.
    """
    others = {
        type(module).__name__
        for module in skeleton(lambda: build_network(architecture, classes, stem)).modules()
        if not isinstance(module, _PRUNABLE_LAYERS)
        and any(parameter.numel() > 1 for parameter in module.parameters(recurse=False))
    }
    if others:
        raise PruningError(
            f"{architecture} cannot be pruned: it has weights outside of convolutions, batch normalisations "
            f"and linear layers, in {', '.join(sorted(others)[:3])}; {PRUNABLE}"
        )
    network = build_network(architecture, classes, stem).eval()
    Pruner(network, spec, settings, settings.ratio).step()
    pruned = build_planned_network(
        architecture, classes, stem, channel_plan(network, architecture, classes, stem)
    )
    try:
        output_shape(pruned, spec)
    except Exception as error:  # as above
        raise PruningError(
            f"{architecture} cannot be pruned: it does not run with fewer channels ({_first_line(error)}); "
            f"{PRUNABLE}"
        ) from error
    return pruned


def output_shape(network: nn.Module, spec: Preprocessing) -> tuple[int, ...] | None:
    """Of what `network` makes of two images in evaluation mode, found without computing it.

    Args:
        network: loses its values.
        spec: input size.

    Returns:
        None: something else than a tensor.
    """
    with torch.no_grad():
        output: Any = network.to("meta").eval()(torch.zeros(2, 3, spec.height, spec.width, device="meta"))
    return tuple(output.shape) if isinstance(output, torch.Tensor) else None


def own_size(network: nn.Module) -> int | None:
    """Side of the images that a network is made for, where its library says so."""
    size: Any = getattr(network, "image_size", None)  # torchvision's ViT
    if size is None:
        size = (getattr(network, "pretrained_cfg", None) or {}).get("input_size", (None,))[-1]
    return size if isinstance(size, int) else None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
