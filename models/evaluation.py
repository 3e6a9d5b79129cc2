"""Measuring a network: accuracy and loss, parameters, multiply-accumulates, and dead weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from models.preprocessing import Pixels, Preprocessing

_MOST_IMAGES: Final = 256
_FEWEST_IMAGES: Final = 8
_MOST_PIXELS: Final = 256 * 32 * 32


@dataclass(frozen=True)
class Score:
    """How well a network does on some images.

    Attributes:
        accuracy: top-1, as a share.
        loss: mean cross-entropy, nats.
        wrong: misclassified images.
        images: all images.
    """

    accuracy: float
    loss: float
    wrong: int
    images: int


def images_at_once(spec: Preprocessing, device: torch.device) -> int:
    """How many images are computed together: many small ones; on a CPU few large ones, to save memory."""
    if device.type != "cpu":
        return _MOST_IMAGES
    return max(_FEWEST_IMAGES, min(_MOST_IMAGES, _MOST_PIXELS // (spec.height * spec.width)))


def normalise(pixels: Tensor, spec: Preprocessing) -> Tensor:
    """Pixels of 0 to 255, shape (N, 3, H, W), as the network takes them."""
    mean = torch.tensor(spec.mean, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(spec.std, device=pixels.device).view(3, 1, 1)
    return (pixels / 255 - mean) / std


def to_float(pixels: Pixels, device: torch.device) -> Tensor:
    """`uint8` (N, H, W, 3) pixels as float32 (N, 3, H, W), still 0 to 255, in channels-last memory."""
    # A copy: memory-mapped pixels are read-only, which torch cannot express.
    return torch.from_numpy(np.array(pixels)).to(device).permute(0, 3, 1, 2).float()


@torch.inference_mode()
def predict_logits(network: nn.Module, pixels: Pixels, spec: Preprocessing) -> Tensor:
    """Logits of `network` in evaluation mode.

    Args:
        network: its mode is left as it was found.
        pixels: `uint8`, shape (N, H, W, 3).
        spec: for mean and standard deviation.

    Returns:
        float32 on the CPU, shape (N, classes).
    """
    device = next(network.parameters()).device
    training = network.training
    network.eval()
    size = images_at_once(spec, device)
    batches = [
        network(normalise(to_float(pixels[start : start + size], device), spec)).cpu()
        for start in range(0, len(pixels), size)
    ]
    network.train(training)
    return torch.cat(batches)


def evaluate(network: nn.Module, pixels: Pixels, targets: NDArray[np.int64], spec: Preprocessing) -> Score:
    """Score `network` on `uint8` (N, H, W, 3) pixels with class indices of shape (N,)."""
    return score(predict_logits(network, pixels, spec), targets)


def score(logits: Tensor, targets: NDArray[np.int64]) -> Score:
    """Score `logits` of shape (N, classes)."""
    expected = torch.from_numpy(targets)
    wrong = int((logits.argmax(1) != expected).sum())
    return Score(
        accuracy=(len(targets) - wrong) / len(targets),
        loss=float(functional.cross_entropy(logits.double(), expected)),
        wrong=wrong,
        images=len(targets),
    )


def count_parameters(network: nn.Module) -> int:
    """Number of trainable values."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_macs(network: nn.Module, height: int, width: int) -> int:
    """Multiply-accumulates of convolutions and matrix products for one image."""
    example = torch.zeros(1, 3, height, width, device=next(network.parameters()).device)
    training = network.training
    network.eval()
    # The counter asks parameters that are a layer's input, such as PiT's, for their gradients' functions.
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        network(example)
    network.train(training)
    return int(counter.get_total_flops()) // 2


def live_parameters(network: nn.Module, pixels: Pixels, spec: Preprocessing) -> float:
    """Share of the parameters that receive a gradient from these images.

    Where the last stage's maps have shrunk to one pixel, most taps of its 3x3 kernels only ever see
    padding: those weights are dead, however large the network looks.

    Args:
        network: not changed.
        pixels: `uint8`, shape (N, H, W, 3); a few dozen images are enough.
        spec: for mean and standard deviation.
    """
    device = next(network.parameters()).device
    probe = copy.deepcopy(network).train()
    for module in probe.modules():
        # Residual branches that start at zero pass no gradient before the first step.
        if isinstance(module, nn.BatchNorm2d) and not module.weight.any():
            nn.init.ones_(module.weight)
    probe.zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        logits = probe(normalise(to_float(pixels, device), spec))
        # A random direction: the gradient of a cross-entropy underflows where the network is certain.
        (logits * torch.randn(logits.shape).to(device)).sum().backward()
    gradients = [parameter.grad for parameter in probe.parameters() if parameter.grad is not None]
    return sum(int(gradient.count_nonzero()) for gradient in gradients) / count_parameters(probe)
