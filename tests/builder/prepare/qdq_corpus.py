"""Small quantised networks, legal and broken in exactly one place each.

The base is a residual network as TrimRT writes them: pixels in, two quantised convolutions with a
shortcut, a quantised classifier. Every entry changes one thing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CHANNELS = 16
SIZE = 8


@dataclass(frozen=True)
class Case:
    """One graph of the corpus.

    Attributes:
        name: what was changed.
        model: the graph.
        verdict: what our checker should say.
        stricter: TensorRT-RTX accepts what we refuse, for the reason given.
    """

    name: str
    model: onnx.ModelProto
    verdict: Literal["clean", "warning", "error"]
    stricter: str = ""


class Network:
    """A graph under construction, or under modification."""

    def __init__(self, float_type: int = TensorProto.FLOAT, opset: int = 20) -> None:
        self.float_type = float_type
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.batch: int | str = "batch"
        self._random = np.random.default_rng(0)

    # Building

    def constant(self, name: str, values: object, kind: int | None = None) -> str:
        kind = self.float_type if kind is None else kind
        array = np.asarray(values, dtype=helper.tensor_dtype_to_np_dtype(kind))
        self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def node(
        self, operator: str, name: str, inputs: list[str], domain: str = "", **attributes: object
    ) -> str:
        output = attributes.pop("output", f"{name}/out")
        self.nodes.append(helper.make_node(operator, inputs, [output], name, domain=domain, **attributes))
        return str(output)

    def quantised(self, name: str, tensor: str) -> str:
        """An activation through Q and DQ."""
        scale, zero = self.constant(f"{name}/scale", 0.05), self.constant(f"{name}/zero", 0, TensorProto.INT8)
        quantised = self.node("QuantizeLinear", f"{name}/q", [tensor, scale, zero])
        return self.node("DequantizeLinear", f"{name}/dq", [quantised, scale, zero])

    def weights(self, name: str, shape: tuple[int, ...], axis: int = 0) -> str:
        """INT8 weights through a DQ, one scale for each index along `axis`."""
        values = self._random.integers(-127, 128, shape)
        stored = self.constant(f"{name}/int8", values, TensorProto.INT8)
        scale = self.constant(f"{name}/scale", np.full(shape[axis], 0.01))
        zero = self.constant(f"{name}/zero", np.zeros(shape[axis]), TensorProto.INT8)
        return self.node("DequantizeLinear", f"{name}/dq", [stored, scale, zero], axis=axis)

    def model(self) -> onnx.ModelProto:
        value, pixels = helper.make_tensor_value_info, [self.batch, SIZE, SIZE, 3]
        graph = helper.make_graph(
            self.nodes,
            "network",
            [value("images", TensorProto.UINT8, pixels)],
            [value("logits", self.float_type, [self.batch, 10])],
            list(self.constants.values()),
        )
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    # Modifying

    def find(self, name: str) -> onnx.NodeProto:
        return next(node for node in self.nodes if node.name == name)

    def bypass(self, *names: str) -> None:
        """Remove nodes, joining their first input to their output."""
        for name in names:
            node = self.find(name)
            self.nodes.remove(node)
            for other in self.nodes:
                other.input[:] = [
                    node.input[0] if tensor == node.output[0] else tensor for tensor in other.input
                ]

    def insert_before(self, name: str, build: Callable[[], str], position: int) -> None:
        """Put what `build` adds before a node, and make its result that node's input."""
        index = self.nodes.index(self.find(name))
        length = len(self.nodes)
        self.find(name).input[position] = build()
        added = self.nodes[length:]
        del self.nodes[length:]
        self.nodes[index:index] = added


def residual_network(float_type: int = TensorProto.FLOAT, opset: int = 20) -> Network:
    net = Network(float_type, opset)
    net.node("Cast", "pre/cast", ["images"], to=float_type)
    net.node("Sub", "pre/centre", ["pre/cast/out", net.constant("pre/mean", [120.0, 115, 100])])
    net.node("Mul", "pre/scale", ["pre/centre/out", net.constant("pre/inverse_std", [0.017] * 3)])
    pixels = net.node("Transpose", "pre/layout", ["pre/scale/out"], perm=[0, 3, 1, 2])

    def convolution(name: str, tensor: str, channels: int) -> str:
        bias = net.constant(f"{name}/bias", np.linspace(-1, 1, CHANNELS))
        inputs = [tensor, net.weights(f"{name}/weight", (CHANNELS, channels, 3, 3)), bias]
        return net.node("Conv", name, inputs, pads=[1, 1, 1, 1])

    first = net.node("Relu", "relu1", [convolution("conv1", net.quantised("a0", pixels), 3)])
    shortcut = net.quantised("a1", first)
    second = net.node("Add", "add", [convolution("conv2", shortcut, CHANNELS), shortcut])
    pooled = net.node("GlobalAveragePool", "pool", [net.node("Relu", "relu2", [second])])
    flat = net.quantised("a2", net.node("Flatten", "flatten", [pooled]))
    inputs = [flat, net.weights("gemm/weight", (10, CHANNELS)), net.constant("gemm/bias", np.zeros(10))]
    net.node("Gemm", "gemm", inputs, transB=1, output="logits")
    return net


def corpus() -> list[Case]:
    """All cases, in the order: clean, legal but slower, broken."""
    cases: list[Case] = []

    def add(
        name: str, verdict: str, change: Callable[[Network], object], stricter: str = "", **build: int
    ) -> None:
        net = residual_network(**build)
        change(net)
        cases.append(Case(name, net.model(), verdict, stricter))  # type: ignore[arg-type]

    def scale(net: Network, values: object, name: str = "a1/scale", kind: int | None = None) -> str:
        return net.constant(name, values, kind)

    # --- legal

    add("as TrimRT writes it", "clean", lambda net: None)
    add("FP16 for the rest", "clean", lambda net: None, float_type=TensorProto.FLOAT16)
    add("BF16 for the rest", "clean", lambda net: None, float_type=TensorProto.BFLOAT16, opset=22)
    add("opset 13", "clean", lambda net: None, opset=13)
    add("opset 19", "clean", lambda net: None, opset=19)
    add("fixed batch", "clean", lambda net: setattr(net, "batch", 4))

    @_case(add, "not quantised at all", "clean")
    def _(net: Network) -> None:
        net.bypass("a0/q", "a0/dq", "a1/q", "a1/dq", "a2/q", "a2/dq")
        for layer, shape in (("conv1", (16, 3, 3, 3)), ("conv2", (16, 16, 3, 3)), ("gemm", (10, 16))):
            net.nodes.remove(net.find(f"{layer}/weight/dq"))
            net.find(layer).input[1] = net.constant(f"{layer}/float", np.ones(shape))

    @_case(add, "float weights quantised in the graph", "clean")
    def _(net: Network) -> None:
        values = net.constant("conv2/float", np.ones((CHANNELS, CHANNELS, 3, 3)))

        def quantise() -> str:
            inputs = [values, "conv2/weight/scale", "conv2/weight/zero"]
            return net.node("QuantizeLinear", "conv2/weight/q", inputs, axis=0)

        net.insert_before("conv2/weight/dq", quantise, 0)

    @_case(add, "constants made by Constant nodes", "clean")
    def _(net: Network) -> None:
        for name in list(net.constants):
            net.nodes.insert(0, helper.make_node("Constant", [], [name], value=net.constants.pop(name)))

    @_case(add, "transposed convolution, scales on axis 1", "clean")
    def _(net: Network) -> None:
        _transposed(net, axis=1)

    @_case(add, "depthwise convolution", "clean")
    def _(net: Network) -> None:
        net.nodes.remove(net.find("conv2/weight/dq"))
        net.insert_before("conv2", lambda: net.weights("conv2/depthwise", (CHANNELS, 1, 3, 3)), 1)
        net.find("conv2").attribute.append(helper.make_attribute("group", CHANNELS))

    @_case(add, "MatMul for a classifier", "clean")
    def _(net: Network) -> None:
        net.nodes.remove(net.find("gemm/weight/dq"))
        net.nodes.remove(net.find("gemm"))
        net.node(
            "MatMul",
            "matmul",
            ["a2/dq/out", net.weights("matmul/weight", (CHANNELS, 10), 1)],
            output="logits",
        )

    @_case(add, "Clip for an activation", "clean")
    def _(net: Network) -> None:
        low, high = net.constant("low", 0.0), net.constant("high", 6.0)
        node = net.find("relu1")
        node.op_type = "Clip"
        node.input.extend([low, high])

    @_case(add, "two DQ of one Q", "clean")
    def _(net: Network) -> None:
        net.insert_before(
            "add", lambda: net.node("DequantizeLinear", "a1/dq2", ["a1/q/out", "a1/scale", "a1/zero"]), 1
        )

    @_case(add, "max pooling of a quantised tensor", "clean")
    def _(net: Network) -> None:
        window = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
        net.insert_before("add", lambda: net.node("MaxPool", "maxpool", ["a1/dq/out"], **window), 1)
        net.insert_before("add", lambda: net.quantised("a3", "maxpool/out"), 1)

    @_case(add, "softmax and top 5 at the end", "clean")
    def _(net: Network) -> None:
        net.find("gemm").output[0] = "scores"
        net.node("Softmax", "softmax", ["scores"], output="logits", axis=1)
        k = net.constant("k", [5], TensorProto.INT64)
        net.nodes.append(helper.make_node("TopK", ["logits", k], ["top", "indices"], "topk", axis=1))

    @_case(add, "one scale for all weights", "warning")
    def _(net: Network) -> None:
        net.constant("conv1/weight/scale", 0.01)
        net.constant("conv1/weight/zero", 0, TensorProto.INT8)

    @_case(add, "weights quantised, input not", "warning")
    def _(net: Network) -> None:
        net.bypass("a0/q", "a0/dq")

    @_case(add, "input quantised, weights not", "warning")
    def _(net: Network) -> None:
        net.nodes.remove(net.find("conv1/weight/dq"))
        net.find("conv1").input[1] = net.constant("conv1/float", np.ones((CHANNELS, 3, 3, 3)))

    @_case(add, "Q between convolution and ReLU", "warning")
    def _(net: Network) -> None:
        net.insert_before("relu1", lambda: net.quantised("a3", "conv1/out"), 0)

    @_case(add, "residual sum without a quantised input", "warning")
    def _(net: Network) -> None:
        net.find("add").input[1] = "relu1/out"

    # --- broken

    add("activation zero point 3", "error", lambda net: net.constant("a1/zero", 3, TensorProto.INT8))
    add(
        "weight zero point 1",
        "error",
        lambda net: net.constant("conv2/weight/zero", np.ones(CHANNELS), TensorProto.INT8),
    )
    add(
        "UINT8 zero point",
        "error",
        lambda net: net.constant("a1/zero", 0, TensorProto.UINT8),
        "RTX computes it as INT8, so its numbers differ from ONNX's",
    )

    @_case(add, "no zero point", "error", "RTX takes it as INT8, ONNX defines it as UINT8")
    def _(net: Network) -> None:
        for name in ("a1/q", "a1/dq"):
            del net.find(name).input[2]

    @_case(add, "INT32 bias", "error")
    def _(net: Network) -> None:
        bias = net.constant("conv2/bias32", np.arange(CHANNELS), TensorProto.INT32)
        scale = net.constant("conv2/bias32/scale", np.full(CHANNELS, 0.001))
        zero = net.constant("conv2/bias32/zero", np.zeros(CHANNELS), TensorProto.INT32)
        net.insert_before(
            "conv2", lambda: net.node("DequantizeLinear", "bias/dq", [bias, scale, zero], axis=0), 2
        )

    for value in (0.0, -0.05, np.nan):
        add(f"activation scale {value}", "error", lambda net, value=value: scale(net, value))
    add("activation scale inf", "error", lambda net: scale(net, np.inf), "RTX only looks at the sign")
    add(
        "one weight scale 0",
        "error",
        lambda net: scale(net, np.r_[0.0, np.full(CHANNELS - 1, 0.01)], "conv2/weight/scale"),
    )
    add(
        "FP16 scale in an FP32 network",
        "error",
        lambda net: scale(net, 0.05, kind=TensorProto.FLOAT16),
    )
    add("INT32 scale", "error", lambda net: scale(net, 1, kind=TensorProto.INT32))

    @_case(add, "scale computed in the graph", "error")
    def _(net: Network) -> None:
        axes = net.constant("axes", [0, 1, 2, 3], TensorProto.INT64)
        net.insert_before("a1/q", lambda: net.node("ReduceMax", "range", ["relu1/out", axes], keepdims=0), 1)
        net.find("a1/dq").input[1] = "range/out"

    @_case(add, "FP16 weights on FP32 activations", "error")
    def _(net: Network) -> None:
        net.nodes.remove(net.find("conv1/weight/dq"))
        weights = np.ones((CHANNELS, 3, 3, 3))
        net.find("conv1").input[1] = net.constant("conv1/half", weights, TensorProto.FLOAT16)

    @_case(
        add, "weight scales on axis 1", "error", "runs without fused INT8 kernels; older importers reject it"
    )
    def _(net: Network) -> None:
        net.find("conv2/weight/dq").attribute[0].i = 1

    @_case(add, "transposed convolution, scales on axis 0", "error", "as above")
    def _(net: Network) -> None:
        _transposed(net, axis=0)

    @_case(add, "activation scales per channel", "error", "older importers reject it")
    def _(net: Network) -> None:
        net.constant("a1/scale", np.full(CHANNELS, 0.05))
        net.constant("a1/zero", np.zeros(CHANNELS), TensorProto.INT8)

    @_case(add, "UINT8 into Transpose", "error")
    def _(net: Network) -> None:
        net.bypass("pre/layout")
        net.insert_before(
            "pre/cast", lambda: net.node("Transpose", "layout", ["images"], perm=[0, 3, 1, 2]), 0
        )
        net.constant("pre/mean", np.full((1, 3, 1, 1), 120.0))
        net.constant("pre/inverse_std", np.full((1, 3, 1, 1), 0.017))

    @_case(add, "UINT8 into Sub", "error")
    def _(net: Network) -> None:
        net.bypass("pre/cast")

    @_case(add, "UINT8 in the middle, into Flatten", "error")
    def _(net: Network) -> None:
        net.insert_before("flatten", lambda: net.node("Cast", "to8", ["pool/out"], to=TensorProto.UINT8), 0)
        net.insert_before("a2/q", lambda: net.node("Cast", "back", ["flatten/out"], to=TensorProto.FLOAT), 0)

    @_case(add, "UINT8 in the middle, between two casts", "error")
    def _(net: Network) -> None:
        net.insert_before("flatten", lambda: net.node("Cast", "to8", ["pool/out"], to=TensorProto.UINT8), 0)
        net.insert_before("flatten", lambda: net.node("Cast", "back", ["to8/out"], to=TensorProto.FLOAT), 0)

    @_case(add, "QLinearConv", "error")
    def _(net: Network) -> None:
        net.bypass("a1/dq")
        net.nodes.remove(net.find("conv2/weight/dq"))
        conv = net.find("conv2")
        conv.op_type = "QLinearConv"
        weights = ["conv2/weight/int8", "conv2/weight/scale", "conv2/weight/zero"]
        conv.input[:] = ["a1/q/out", "a1/scale", "a1/zero", *weights, "a1/scale", "a1/zero"]
        conv.output[0] = "conv2/int8"
        for index, tensor in enumerate(("conv2/int8", "a1/q/out")):
            net.insert_before(
                "add",
                lambda tensor=tensor, index=index: net.node(
                    "DequantizeLinear", f"add/dq{index}", [tensor, "a1/scale", "a1/zero"]
                ),
                index,
            )

    @_case(add, "DynamicQuantizeLinear and MatMulInteger", "error")
    def _(net: Network) -> None:
        net.nodes = [node for node in net.nodes if not node.name.startswith(("a2/", "gemm"))]
        outputs = ["dynamic", "dynamic/scale", "dynamic/zero"]
        net.nodes.append(helper.make_node("DynamicQuantizeLinear", ["flatten/out"], outputs, "dynamic"))
        weights = net.constant("integer/weight", np.ones((CHANNELS, 10)), TensorProto.INT8)
        net.node("MatMulInteger", "integer", ["dynamic", weights, "dynamic/zero"])
        net.node("Cast", "integer/cast", ["integer/out"], output="logits", to=TensorProto.FLOAT)

    @_case(add, "an operator that only com.microsoft has", "error")
    def _(net: Network) -> None:
        node = net.find("relu2")
        node.op_type, node.domain = "QuickGelu", "com.microsoft"

    @_case(add, "an operator that com.microsoft has too", "error", "RTX goes by the name alone")
    def _(net: Network) -> None:
        node = net.find("relu2")
        node.op_type, node.domain = "Gelu", "com.microsoft"

    @_case(add, "DQ of a cast", "error", "RTX computes it; other importers want a Q there")
    def _(net: Network) -> None:
        net.nodes.remove(net.find("a1/q"))
        net.insert_before("a1/dq", lambda: net.node("Cast", "cast8", ["relu1/out"], to=TensorProto.INT8), 0)

    @_case(add, "INT16 activations", "error", opset=21)
    def _(net: Network) -> None:
        net.constant("a1/zero", 0, TensorProto.INT16)

    @_case(add, "FP8 activations", "error", opset=21)
    def _(net: Network) -> None:
        net.constant("a1/zero", 0, TensorProto.FLOAT8E4M3FN)

    @_case(add, "a tensor that nothing makes", "error")
    def _(net: Network) -> None:
        net.find("relu2").input[0] = "missing"

    return cases


def _transposed(net: Network, axis: int) -> None:
    net.nodes.remove(net.find("conv2/weight/dq"))
    net.insert_before("conv2", lambda: net.weights("conv2/transposed", (CHANNELS, CHANNELS, 3, 3), axis), 1)
    net.find("conv2").op_type = "ConvTranspose"


def _case(
    add: Callable[..., None], name: str, verdict: str, stricter: str = "", **build: int
) -> Callable[..., None]:
    return lambda change: add(name, verdict, change, stricter, **build)
