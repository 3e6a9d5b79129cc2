"""What a network's outputs mean, and how they become logits.

Every engine gives logits and probabilities of its own making, so an activation at the end of a network is
taken off. It is found by looking through the nodes that only change shape or type, and by running the
network: rows that add up to one are probabilities, however they were computed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from builder.prepare.export import ExportError
from builder.prepare.onnx_file import describe, drop_unused
from runtime.manifest import Activation

if TYPE_CHECKING:
    import onnx

SCORES: Final = "normal/scores"  # the output of the normal form, shape (N, classes)
_SMALLEST_PROBABILITY: Final = 1e-7  # whose logarithm FP16 still holds
_TOLERANCE: Final = 1e-3
_SURE: Final = 20.0  # a logit beyond it says yes to one in half a billion
# They change a tensor's shape or type, or nothing.
_PASSING: Final = {"Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Dropout", "Transpose"}
# Behind them nobody knows any more which class had which score.
_COMPARING: Final = {"Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Equal"}
_DECIDING: Final = {"ArgMax", "ArgMin", "TopK", "OneHot"} | _COMPARING

# softmax, sigmoid, log-softmax: nodes of the graph; probabilities, log-probabilities, shares: by their values
Found = Literal["scores", "softmax", "log-softmax", "sigmoid", "probabilities", "log-probabilities", "shares"]
_SHARES: Final = ("sigmoid", "shares")


class Head(NamedTuple):
    """A network that gives logits.

    Attributes:
        model: its one output is `SCORES`, float32 of shape (N, classes).
        activation: turns the logits into probabilities.
        found: what the network's own outputs are.
        single: it has one score, of the second of two classes; the first has the logit 0.
        total: of a row of its own outputs, where they are probabilities; 100 for percentages.
    """

    model: onnx.ModelProto
    activation: Activation
    found: Found
    single: bool
    total: float = 1.0

    def own_outputs(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the network as it was gives where this one gives `logits`; shape (N, its own scores)."""
        if self.single:
            logits = logits[:, 1:]
        if self.found in _SHARES:
            return probabilities(logits, "sigmoid")
        if self.found in ("softmax", "probabilities"):
            return self.total * probabilities(logits, "softmax")
        if self.found in ("log-softmax", "log-probabilities"):
            shifted = logits - logits.max(axis=1, keepdims=True)
            own: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
            return own
        return logits

    def __str__(self) -> str:
        kinds = {"scores": "logits", "shares": "shares from 0 to 1", "sigmoid": "sigmoids"}
        text = f"outputs: {kinds.get(self.found, self.found)}"
        if self.single:
            return f"{text} of one class; the other has the rest"
        return f"{text}; activation {self.activation}"


def probabilities(logits: NDArray[np.float32], activation: Activation) -> NDArray[np.float32]:
    """What every engine makes of its logits, shape (N, classes)."""
    if activation == "sigmoid":
        return np.asarray(0.5 * (1 + np.tanh(0.5 * logits)), np.float32)
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: NDArray[np.float32] = shifted / shifted.sum(axis=1, keepdims=True)
    return result


def check_measures_nothing(logits: NDArray[np.float32]) -> None:
    """Refuse a score that says the same of all images, where no labels would tell that it is no logit.

    Args:
        logits: the one score of each image, shape (N,).

    Raises:
        ExportError: it does.
    """
    if max(logits.min(), -logits.max()) > _SURE:
        raise ExportError(
            f"its one score is from {logits.min():.3g} to {logits.max():.3g} for every image tried: as a "
            "logit it would always say the same. A network that measures something, such as an age, is no "
            "classifier; if it is a logit all the same, say so with --activation softmax"
        )


def possible_heads(
    model: onnx.ModelProto, outputs: NDArray[np.float32], asked: Activation | None
) -> Iterator[Head]:
    """Ways to make logits of the network's outputs, the likeliest first; the caller finds out which is right.

    Args:
        model: in normal form, with the outputs that the file gives.
        outputs: of a number of images, shape (N, scores).
        asked: the activation, where the user says it.

    Raises:
        ExportError: the outputs are not what was asked for, or say nothing.
    """
    classes = outputs.shape[1]
    last = _last_node(model)
    if last is not None and (last.op_type in _DECIDING or (last.op_type == "ReduceMax" and classes == 1)):
        raise ExportError(
            f"{describe(last)} leaves no score for each class; name the scores before it with "
            "--output-name, or export the network without it"
        )
    by_value, total = _by_value(outputs)
    if classes == 1 and by_value == "probabilities":
        raise ExportError("its one output is always 1; export the network without its softmax")
    if by_value == "probabilities" and (first := _first_of_several(outputs, total)):
        raise ExportError(
            f"its scores answer more than one question: the first {first} of {classes} add up to the same "
            "for every image, and so do the rest. Name the scores of one question with --output-name"
        )
    found: list[Found] = []
    by_structure = _activation_of(model)
    if by_structure is not None:
        found.append(by_structure[0])
    found.append(by_value)
    for kind in dict.fromkeys(found):
        activation: Activation = "sigmoid" if kind in _SHARES else "softmax"
        if asked == "sigmoid" and kind not in ("scores", *_SHARES):
            raise ExportError(
                "its outputs are probabilities that add up to one, of which one class is true; "
                "leave out --activation"
            )
        if classes == 1:
            activation = "softmax"
        elif asked is not None:
            activation = asked
        sum_of_row = total if kind == "probabilities" else 1.0
        yield Head(_with_logits(model, kind, classes), activation, kind, classes == 1, sum_of_row)


def _by_value(outputs: NDArray[np.float32]) -> tuple[Found, float]:
    """What the numbers themselves say, and what a row of probabilities adds up to."""
    totals = outputs.sum(axis=1, dtype=np.float64)
    several = outputs.shape[1] > 1
    alike = totals.min() > 0 and np.ptp(totals) <= _TOLERANCE * totals.max()
    if (outputs >= 0).all() and alike and (several or np.isclose(totals.max(), 1, atol=_TOLERANCE)):
        return "probabilities", float(totals.mean())
    with np.errstate(over="ignore"):
        if several and np.allclose(np.exp(outputs).sum(axis=1), 1, atol=_TOLERANCE):
            return "log-probabilities", 1.0
    if ((outputs >= 0) & (outputs <= 1)).all():
        return "shares", 1.0
    return "scores", 1.0


def _first_of_several(outputs: NDArray[np.float32], total: float) -> int | None:
    """How many columns the first softmax has, if several stand side by side; rows add up to `total`."""
    sums = np.cumsum(outputs, axis=1, dtype=np.float64)
    alike = np.ones(outputs.shape[1] - 1, bool)
    for parts in (sums[:, :-1], sums[:, -1:] - sums[:, :-1]):
        alike &= (np.ptp(parts, axis=0) <= _TOLERANCE * total) & (parts.min(axis=0) > 0.05 * total)
    changes = np.ptp(outputs, axis=0) > 10 * _TOLERANCE * total
    for count in np.flatnonzero(alike) + 1:
        # A network that says nearly the same of all images tells nothing.
        if changes[:count].any() and changes[count:].any():
            return int(count)
    return None


def _last_node(model: onnx.ModelProto) -> onnx.NodeProto | None:
    """The last one that computes anything."""
    producers = {name: node for node in model.graph.node for name in node.output}
    node = producers.get(model.graph.output[0].name)
    while node is not None and node.op_type in _PASSING:
        node = producers.get(node.input[0])
    return node


def _activation_of(model: onnx.ModelProto) -> tuple[Found, str, str] | None:
    """The activation at the end of a graph: its kind, the tensor it makes, and the one it is made of."""
    node = _last_node(model)
    if node is None:
        return None
    producers = {name: each for each in model.graph.node for name in each.output}
    result, operand = node.output[0], node.input[0]
    before = producers.get(operand)
    if node.op_type == "Softmax":
        return "softmax", result, operand
    if node.op_type == "Sigmoid":
        return "sigmoid", result, operand
    if node.op_type == "LogSoftmax":
        return "log-softmax", result, operand
    if node.op_type == "Log" and before is not None and before.op_type == "Softmax":
        return "log-softmax", result, before.input[0]
    if node.op_type == "Exp" and before is not None and before.op_type == "LogSoftmax":
        return "softmax", result, before.input[0]
    if node.op_type == "Div" and before is not None and before.op_type == "Exp":
        total = producers.get(node.input[1])
        if total is not None and total.op_type == "ReduceSum" and total.input[0] == operand:
            shifted = producers.get(before.input[0])
            if shifted is not None and shifted.op_type == "Sub":
                largest = producers.get(shifted.input[1])
                if largest is not None and largest.op_type == "ReduceMax":
                    return "softmax", result, shifted.input[0]
            return "softmax", result, before.input[0]
    return None


def _with_logits(model: onnx.ModelProto, found: Found, classes: int) -> onnx.ModelProto:
    """A copy whose one output is logits of shape (N, classes), two for one score."""
    from onnx import TensorProto, helper, numpy_helper

    model = copy.deepcopy(model)
    graph = model.graph
    output = graph.output[0].name
    if found in ("softmax", "log-softmax", "sigmoid"):
        activation = _activation_of(model)
        assert activation is not None, "its kind is that of the graph"
        _, result, operand = activation
        if result == output:
            output = operand
        for node in graph.node:
            node.input[:] = [operand if name == result else name for name in node.input]

    def constant(name: str, values: NDArray[np.generic]) -> str:
        graph.initializer.append(numpy_helper.from_array(values, f"normal/{name}"))
        return f"normal/{name}"

    def append(kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"normal/head_{kind.lower()}_{len(graph.node)}"
        graph.node.append(helper.make_node(kind, list(inputs), [name], name, **attributes))
        return name

    # Of any shape: (N,), (N, C, 1, 1), (N, 1, 1, C) and so on.
    output = append("Reshape", output, constant("rows", np.array([-1, classes], np.int64)))
    if found in ("probabilities", "shares"):
        smallest = constant("smallest", np.array(_SMALLEST_PROBABILITY, np.float32))
        one = constant("one", np.array(1, np.float32))
        kept = append("Log", append("Max", output, smallest))
        if found == "shares":
            others = append("Log", append("Max", append("Sub", one, output), smallest))
            kept = append("Sub", kept, others)
        output = kept
    if classes == 1:
        zero = append("Mul", output, constant("zero", np.array(0, np.float32)))
        output = append("Concat", zero, output, axis=1)
    graph.node.append(helper.make_node("Identity", [output], [SCORES], "normal/head"))
    del graph.output[:], graph.value_info[:]
    shape: list[str | int | None] = ["batch", max(classes, 2)]
    graph.output.append(helper.make_tensor_value_info(SCORES, TensorProto.FLOAT, shape))
    drop_unused(model)
    return model
