"""2:4 sparsity: which layers of a graph NVIDIA's sparse kernels could take."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from builder.kit import Sparsity, open_kit
from builder.prepare.qdq import constants_of, replace_constants
from builder.prepare.sparsity import count_sparse_layers, is_sparse
from runtime.manifest import Precision
from trimrt.selftest.checks import KIT

LAYERS = 21  # of a ResNet18: 20 convolutions, of which the first one sees three channels, and the head


@pytest.fixture(params=["fp16", "int8"])
def model(request: pytest.FixtureRequest) -> onnx.ModelProto:
    precision: Precision = request.param
    _, path = next(iter(open_kit(KIT).graphs(precision, "fp16")))
    return onnx.load(path)


def pruned(weights: np.ndarray) -> np.ndarray:
    """Two of every four input channels are zero."""
    result = weights.copy()
    result[:, 1::4] = 0
    result[:, 2::4] = 0
    return result


def test_no_layer_of_our_students_is_sparse(model: onnx.ModelProto) -> None:
    assert count_sparse_layers(model) == Sparsity(layers=LAYERS, sparse=0)


def test_pruned_layers_are_counted_in_floating_point_and_in_int8(model: onnx.ModelProto) -> None:
    convolutions = {
        name: values
        for name, values in constants_of(model).items()
        if values.ndim == 4 and values.shape[1] > 3
    }
    assert len(convolutions) == LAYERS - 2
    replace_constants(model, {name: pruned(values) for name, values in convolutions.items()})
    assert count_sparse_layers(model).sparse == LAYERS - 2


def test_every_group_of_four_input_channels_needs_two_zeros() -> None:
    weights = pruned(np.ones((8, 16, 3, 3)))
    assert is_sparse(weights, axis=1)
    assert not is_sparse(weights, axis=0), "zeros along the output channels are of no use"
    weights[7, 2, 2, 2] = 1
    assert not is_sparse(weights, axis=1)


def test_weights_of_matrices_are_counted_along_what_is_summed() -> None:
    weights = pruned(np.ones((8, 16)))
    assert is_sparse(weights, axis=1)
    assert is_sparse(weights.T, axis=-2)


def test_channels_that_are_no_multiple_of_four_are_not_sparse() -> None:
    assert not is_sparse(np.zeros((8, 3, 3, 3)), axis=1)
