"""Channels of INT8 networks are rounded up to blocks of 16 for CPUs, and no result changes by it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from numpy.typing import NDArray

from builder.compile.targets.openvino.channel_padding import pad_channels
from builder.compile.targets.openvino.target import OpenVINOTarget
from builder.prepare.export import export_onnx
from builder.prepare.int8 import convert_to_int8
from models.preprocessing import Preprocessing
from runtime.manifest import BatchSizes
from runtime.openvino import CONFIGURATION, this_machine

SPEC = Preprocessing(resize=16, height=16, width=16)
PIXELS = np.random.default_rng(0).integers(0, 256, (16, SPEC.height, SPEC.width, 3), np.uint8)

nn = torch.nn


class Residual(nn.Module):
    """Two convolutions around which the input is added, perhaps times a weight for each channel."""

    def __init__(self, channels: int, inner: int, *, excited: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, inner, 3, padding=1)
        self.second = nn.Conv2d(inner, channels, 3, padding=1)
        self.excitation = (
            nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 3, 1), nn.ReLU(), nn.Conv2d(3, channels, 1)
            )
            if excited
            else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(torch.relu(self.first(x)))
        if self.excitation is not None:
            y = y * torch.sigmoid(self.excitation(y))
        return torch.relu(x + y)


class Branches(nn.Module):
    """Two convolutions whose channels are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(19, 7, 1), nn.Conv2d(19, 12, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.left(x), self.right(x)], 1)


class Attention(nn.Module):
    """Nine channels times one weight for each place; both would be 16."""

    def __init__(self) -> None:
        super().__init__()
        self.weigh = nn.Conv2d(9, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(self.weigh(x))


def classifier(*middle: nn.Module, channels: int = 19) -> nn.Module:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)]
    return nn.Sequential(nn.Conv2d(3, channels, 3), nn.ReLU(), nn.MaxPool2d(2), *middle, *head)


def vgg_like() -> nn.Module:
    """Rows and columns are flattened with the channels."""
    head = [nn.Flatten(), nn.Linear(19 * 3 * 3, 21), nn.ReLU(), nn.Linear(21, 5)]
    return nn.Sequential(nn.Conv2d(3, 19, 3, stride=2), nn.ReLU(), nn.AvgPool2d(2), *head)


def fully_convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 19, 3), nn.ReLU(), nn.Conv2d(19, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


@pytest.fixture
def quantised(tmp_path: Path) -> Callable[[nn.Module], openvino.Model]:
    """The INT8 network as OpenVINO reads it."""

    def convert(network: nn.Module) -> openvino.Model:
        return openvino.Core().read_model(int8_graph(network, tmp_path))

    return convert


def int8_graph(network: nn.Module, folder: Path) -> Path:
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    master, path = folder / "master.onnx", folder / "int8.onnx"
    export_onnx(network.eval(), SPEC, master)
    convert_to_int8(master, path, PIXELS, method="max", rest="fp32")
    return path


def widths(model: openvino.Model) -> list[int]:
    """Output channels of the convolutions."""
    return [
        op.get_output_partial_shape(0)[1].get_length()
        for op in model.get_ordered_ops()
        if op.get_type_name() == "Convolution"
    ]


def logits(model: openvino.Model) -> NDArray[np.float32]:
    found: NDArray[np.float32] = openvino.Core().compile_model(model, "CPU", CONFIGURATION)(PIXELS)[0]
    return found


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (classifier(), [32]),
        (classifier(Residual(19, 33)), [32, 48, 32]),
        (classifier(Residual(19, 8, excited=True)), [32, 16, 32, 16, 32]),
        (classifier(nn.Conv2d(19, 32, 1), nn.LeakyReLU(), nn.Conv2d(32, 19, 3), nn.SiLU()), [32, 32, 32]),
        (vgg_like(), [32]),
    ],
    ids=["stem", "residual", "squeeze and excitation", "activations", "flattened"],
)
def test_channels_are_multiples_of_16_and_the_logits_the_same(
    network: nn.Module, expected: list[int], quantised: Callable[[nn.Module], openvino.Model]
) -> None:
    plain = quantised(network)
    before = widths(plain)

    padded = pad_channels(plain)

    assert widths(padded) == expected
    assert widths(plain) == before, "the model that was given is not changed"
    exact = logits(plain)
    assert np.ptp(exact) > 0
    np.testing.assert_allclose(logits(padded), exact, rtol=1e-5, atol=1e-6 * np.abs(exact).max())


@pytest.mark.parametrize(
    "network",
    [
        classifier(channels=48),
        classifier(nn.Conv2d(19, 19, 3, groups=19)),
        classifier(Branches()),
        classifier(Attention(), channels=9),
        fully_convolutional(),
    ],
    ids=["whole blocks", "depthwise", "concatenation", "broadcast", "channels as output"],
)
def test_other_networks_stay_as_they_are(
    network: nn.Module, quantised: Callable[[nn.Module], openvino.Model]
) -> None:
    plain = quantised(network)
    assert pad_channels(plain) is plain


def test_fp32_networks_stay_as_they_are(tmp_path: Path) -> None:
    """Their kernels gain nothing by it."""
    export_onnx(classifier().eval(), SPEC, tmp_path / "master.onnx")
    plain = openvino.Core().read_model(tmp_path / "master.onnx")
    assert pad_channels(plain) is plain


@pytest.mark.parametrize(("features", "channels"), [(["amx_int8"], 32), (["avx512_vnni"], 19)])
def test_an_engines_kernels_are_padded_for_amx_but_not_the_graph_beside_it(
    features: list[str], channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = this_machine().model_copy(update={"cpu_features": features})
    monkeypatch.setattr("builder.compile.targets.openvino.target.this_machine", lambda: machine)
    graph = int8_graph(classifier(), tmp_path)
    folder = tmp_path / "package"
    folder.mkdir()

    artefact = OpenVINOTarget().compile(graph, folder, BatchSizes(min=1, opt=4, max=4), lambda _step: None)

    blob = openvino.Tensor(np.fromfile(folder / artefact.file, np.uint8))
    kernels = openvino.Core().import_model(blob, "CPU", CONFIGURATION).get_runtime_model().get_ordered_ops()
    convolutions = [op for op in kernels if op.get_rt_info()["layerType"].astype(str) == "Convolution"]
    assert [op.get_output_partial_shape(0)[1].get_length() for op in convolutions] == [channels]
    assert (folder / "model.onnx").read_bytes() == graph.read_bytes()
