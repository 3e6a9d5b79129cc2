"""The small networks that are written in every form, and PyTorch's older exporter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import onnx
import torch
from torch import nn

from builder.prepare.export import quiet

SIDE: Final = 16
WIDTH: Final = 32
CLASSES: Final = 5

Function = Callable[[torch.Tensor], torch.Tensor]


class Network(nn.Module):
    """Convolutions, a normalisation, a residual sum, and a linear layer."""

    def __init__(self, channels: int = 3, classes: int = CLASSES) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, WIDTH, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.second = nn.Conv2d(WIDTH, WIDTH, 3, 1, 1)
        self.last = nn.Linear(WIDTH, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.second(x) + x)
        result: torch.Tensor = self.last(x.mean((2, 3)))
        return result


def network(channels: int = 3, classes: int = CLASSES) -> Network:
    """With statistics and weights far from those of an untrained one."""
    torch.manual_seed(3)
    made = Network(channels, classes)
    made.norm.running_mean = torch.empty(WIDTH).uniform_(-1, 1)
    made.norm.running_var = torch.empty(WIDTH).uniform_(0.5, 2)
    nn.init.uniform_(made.norm.weight, 0.5, 2)
    nn.init.normal_(made.last.weight, std=3)
    return made.eval()


def export(
    module: nn.Module,
    path: Path,
    *,
    example: torch.Tensor | None = None,
    opset: int = 17,
    fixed: bool = False,
) -> onnx.ModelProto:
    """The module, as PyTorch's older exporter writes it."""
    if example is None:
        example = torch.zeros(1, 3, SIDE, SIDE)
    axes = None if fixed else {"input": {0: "n"}, "output": {0: "n"}}
    with quiet():
        torch.onnx.export(
            module,
            (example,),
            str(path),
            dynamo=False,
            opset_version=opset,
            do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            input_names=["input"],
            output_names=["output"],
            dynamic_axes=axes,
        )
    return onnx.load(str(path))


class Tail(nn.Module):
    """The network, and something before or behind it."""

    def __init__(self, inner: nn.Module, tail: Function, head: Function | None = None) -> None:
        super().__init__()
        self.inner, self.tail, self.head = inner, tail, head or (lambda x: x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All three."""
        result: torch.Tensor = self.tail(self.inner(self.head(x)))
        return result


class ChannelsLast(Network):
    """The same, transposed around each convolution, with its normalisation spelled out."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of NHWC images."""
        mean, variance = self.norm.running_mean, self.norm.running_var
        assert mean is not None
        assert variance is not None
        scale = self.norm.weight / (variance + self.norm.eps).sqrt()
        x = (_last(self.first, x) - mean) * scale + self.norm.bias
        x = torch.relu(x)
        x = torch.relu(_last(self.second, x) + x)
        result: torch.Tensor = self.last(x.mean((1, 2)))
        return result


def _last(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = layer(x.permute(0, 3, 1, 2))
    return result.permute(0, 2, 3, 1)


class Two(nn.Module):
    """Logits and features."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both."""
        return self.inner.first(x).mean((2, 3)), self.inner(x)


class Pooled(Network):
    """The same, with the layer that PyTorch's exporter flattens a whole batch for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.second(x) + x)
        result: torch.Tensor = self.last(nn.AdaptiveAvgPool2d(1)(x).flatten(1))
        return result


class Padded(Network):
    """A stride of 2 that is padded as TensorFlow does, by what the size of its input leaves over."""

    def __init__(self) -> None:
        super().__init__()
        self.second.stride, self.second.padding = (2, 2), (0, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        x = torch.relu(self.norm(self.first(x)))
        height, width = (((side + 1) // 2 - 1) * 2 + 3 - side for side in x.shape[2:])
        before_and_after = (width // 2, width - width // 2, height // 2, height - height // 2)
        x = torch.relu(self.second(nn.functional.pad(x, before_and_after)))
        result: torch.Tensor = self.last(x.mean((2, 3)))
        return result


def padded() -> Padded:
    """With the weights of `network`."""
    made = Padded()
    made.load_state_dict(network().state_dict())
    return made.eval()


class Token(nn.Module):
    """Patches with a class token and attention, whose sizes are those of the export."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.qkv = nn.Linear(8, 24)
        self.last = nn.Linear(8, CLASSES)
        nn.init.normal_(self.last.weight, std=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        count = x.shape[0]
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(count, -1, -1), x], 1)
        q, k, v = self.qkv(x).reshape(count, x.shape[1], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        attention = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        x = x + attention.transpose(1, 2).reshape(count, x.shape[1], 8)
        result: torch.Tensor = self.last(x[:, 0])
        return result


class Windows(nn.Module):
    """Attention in windows of an image, masked, as Swin and MaxViT have it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.qkv = nn.Linear(8, 24)
        self.mask = nn.Parameter(torch.randn(4, 4, 4))
        self.last = nn.Linear(8, CLASSES)
        nn.init.normal_(self.last.weight, std=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        count = x.shape[0]
        x = self.patches(x).permute(0, 2, 3, 1).view(count, 2, 2, 2, 2, 8)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, 8)
        windows = x.shape[0]
        q, k, v = self.qkv(x).view(windows, -1, 2, 12).transpose(1, 2).chunk(3, dim=3)
        scores = (q @ k.transpose(-2, -1)).view(windows // 4, 4, 2, 4, 4) + self.mask[None, :, None]
        x = x + (scores.view(-1, 2, 4, 4).softmax(-1) @ v).transpose(1, 2).reshape(windows, -1, 8)
        x = x.view(count, 2, 2, 2, 2, 8).permute(0, 1, 3, 2, 4, 5).reshape(count, -1, 8)
        result: torch.Tensor = self.last(x.mean(1))
        return result
