"""Which channels of a graph can only go together, and the graph with fewer of them.

A convolution makes new channels; what follows hands them on, until another layer takes them in. A sum makes
its two sources one group. What treats channels in an unknown way keeps all those that it sees. A graph with
fewer channels computes something else, but takes as long as one that was trained with so few.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from builder.compile.narrowing.graph_file import GraphFile, Node

_WEIGHTS: Final = {
    "QuantizeLinear",
    "DequantizeLinear",
    "Cast",
    "Identity",
}  # what may be between and a layer
_HANDED_ON: Final = {
    *(
        "Relu",
        "Clip",
        "LeakyRelu",
        "PRelu",
        "Elu",
        "Gelu",
        "Erf",
        "Tanh",
        "Sigmoid",
        "HardSigmoid",
        "HardSwish",
    ),
    *("Mish", "Softplus", "Sqrt", "Cast", "Identity", "Dropout", "QuantizeLinear", "DequantizeLinear"),
    *(
        "MaxPool",
        "AveragePool",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "ReduceMean",
        "ReduceMax",
        "Pad",
        "Resize",
    ),
    *("Flatten", "Squeeze", "Unsqueeze"),
}
_SUMS: Final = {"Add", "Sub", "Mul", "Div", "Min", "Max"}


@dataclass(eq=False)
class _Source:
    """What makes channels; those that can only go together have one root.

    Attributes:
        width: channels.
        layers: that make them.
        kept: whether none of them may go.
    """

    width: int
    layers: list[str]
    kept: bool = False
    parent: _Source | None = None

    @property
    def root(self) -> _Source:
        return self if self.parent is None else self.parent.root

    def join(self, other: _Source) -> None:
        ours, theirs = self.root, other.root
        if ours is not theirs:
            theirs.parent = ours
            ours.layers += theirs.layers
            ours.kept |= theirs.kept


@dataclass(frozen=True)
class _Axis:
    """Entries along an axis: for each channel of each source, in order, so many."""

    sources: Sequence[_Source]
    entries: int = 1

    def indices(self, widths: Mapping[_Source, int]) -> NDArray[np.int64]:
        """Those of the first channels of each source."""
        starts = np.cumsum([0, *(self.entries * source.width for source in self.sources)])
        kept = [self.entries * widths.get(source.root, source.width) for source in self.sources]
        return np.concatenate([start + np.arange(count) for start, count in zip(starts, kept, strict=False)])


@dataclass(frozen=True)
class Group:
    """Channels that can only go together.

    Attributes:
        name: of one of the layers, the same in all graphs of a network.
        channels: how many there are.
        layers: that make them.
    """

    name: str
    channels: int
    layers: tuple[str, ...]


@dataclass
class _Uses:
    """Where a graph's constants and attributes say how many channels there are.

    Attributes:
        axes: of constants, by name and axis.
        entries: of constants that are shapes, by name and place.
        depthwise: convolutions by their places, whose attribute `group` is the width of a source.
        layers: for each layer, the sources that it takes in, and the one it makes.
    """

    axes: dict[tuple[str, int], _Axis] = field(default_factory=dict)
    entries: dict[tuple[str, int], _Axis] = field(default_factory=dict)
    depthwise: dict[int, _Axis] = field(default_factory=dict)
    layers: list[tuple[Sequence[_Source], _Source]] = field(default_factory=list)


class NarrowableGraph:
    """A graph whose groups of channels are known.

    Attributes:
        structure: a hash of operations and shapes, the same for all weights of a network.
        groups: those that may be narrowed, by name.
        pairs: names of two groups that one layer reads and writes.
    """

    def __init__(self, model: bytes) -> None:
        """Follow the channels through the graph.

        Raises:
            ValueError: not an ONNX model.
        """
        self._file = GraphFile(model)
        self.structure = self._file.structure
        tracer = _Tracer(self._file)
        tracer.run()
        self._uses = tracer.uses
        roots = {source.root for source in tracer.sources if not source.root.kept}
        self._roots = {min(root.layers): root for root in sorted(roots, key=lambda root: min(root.layers))}
        self.groups = [
            Group(name, root.width, tuple(sorted(root.layers))) for name, root in self._roots.items()
        ]
        names = {root: name for name, root in self._roots.items()}
        pairs = [
            (names[source.root], names[made.root])
            for taken, made in self._uses.layers
            for source in taken
            if source.root in names and made.root in names and source.root is not made.root
        ]
        self.pairs = sorted({(min(pair), max(pair)) for pair in pairs})

    def narrowed(self, widths: Mapping[str, int]) -> bytes:
        """The graph with only so many channels in some groups, by their names.

        Raises:
            KeyError: there is no such group.
        """
        wanted = {self._roots[name]: width for name, width in widths.items()}
        constants: dict[str, NDArray[Any]] = {}
        for (name, axis), use in self._uses.axes.items():
            values = constants.get(name, self._file.constants[name])
            constants[name] = values.take(use.indices(wanted), axis)
        for (name, place), use in self._uses.entries.items():
            values = constants.get(name, self._file.constants[name]).copy()
            values[place] = len(use.indices(wanted))
            constants[name] = values
        numbers = {place: {"group": len(use.indices(wanted))} for place, use in self._uses.depthwise.items()}
        return self._file.replaced(constants, numbers)


class _Tracer:
    """Follows channels from node to node."""

    def __init__(self, graph: GraphFile) -> None:
        self._graph = graph
        self._constants = graph.constants
        self._producers = {name: node for node in graph.nodes for name in node.outputs}
        self._channels: dict[str, _Axis] = {}  # of tensors, along axis 1
        self.sources: list[_Source] = []
        self.uses = _Uses()

    def run(self) -> None:
        for node in self._graph.nodes:
            given = [self._channels[name] for name in node.inputs if name in self._channels]
            made = self._follow(node, given)
            if made is None:
                self._keep(given)
            else:
                self._channels.update(dict.fromkeys(node.outputs, made))
        self._keep(self._channels[name] for name in self._graph.outputs if name in self._channels)

    def _keep(self, uses: Iterable[_Axis]) -> None:
        for use in uses:
            for source in use.sources:
                source.root.kept = True

    def _follow(self, node: Node, given: Sequence[_Axis]) -> _Axis | None:
        """The channels of the node's output; None: unknown."""
        operator = node.operator
        if operator == "Conv":
            return self._convolution(node)
        if operator in ("Gemm", "MatMul"):
            return self._product(node)
        if not given:
            return None
        if operator in _HANDED_ON:
            return self._channels.get(node.inputs[0])
        if operator in _SUMS:
            return self._sum(node, given)
        if operator == "BatchNormalization":
            uses = [self._use(name, 0, given[0]) for name in node.inputs[1:]]
            return given[0] if all(uses) else None
        if operator == "Concat" and node.numbers.get("axis") == 1 and len(given) == len(node.inputs):
            sources = [source for use in given for source in use.sources]
            return _Axis(sources) if all(use.entries == 1 for use in given) else None
        if operator == "Reshape":
            return self._reshape(node, given[0])
        return None

    def _convolution(self, node: Node) -> _Axis | None:
        weights = self._weights(node.inputs[1])
        if weights is None:
            return None
        outputs, inputs = self._constants[weights].shape[:2]
        groups = node.numbers.get("group", 1)
        taken = self._channels.get(node.inputs[0])
        if taken is not None and groups == outputs == _count(taken) and inputs == 1:
            made = taken  # depthwise: each channel by itself
            self.uses.depthwise[node.place] = taken
        elif groups > 1:
            return None
        else:
            if taken is not None and not self._use(weights, 1, taken):
                return None
            made = self._make(weights, outputs, taken)
        return made if self._use_outputs(node, weights, 0, made) else None

    def _product(self, node: Node) -> _Axis | None:
        weights, taken = self._weights(node.inputs[1]), self._channels.get(node.inputs[0])
        if weights is None or taken is None or self._constants[weights].ndim != 2:
            return None
        axis = 0 if node.numbers.get("transB") else 1  # of the outputs
        entries, rest = divmod(self._constants[weights].shape[1 - axis], _count(taken) // taken.entries)
        taken = _Axis(taken.sources, entries)  # flattened: so many pixels of each channel
        if rest or not self._use(weights, 1 - axis, taken):
            return None
        made = self._make(weights, self._constants[weights].shape[axis], taken)
        return made if self._use_outputs(node, weights, axis, made) else None

    def _make(self, weights: str, width: int, taken: _Axis | None) -> _Axis:
        source = _Source(width, [weights.removeprefix("network/").removesuffix(".weight")])
        self.sources.append(source)
        self.uses.layers.append((taken.sources if taken is not None else (), source))
        return _Axis([source])

    def _use_outputs(self, node: Node, weights: str, axis: int, made: _Axis) -> bool:
        """Note what a layer has for each output: weights, their scales and zero points, the bias."""
        uses = [self._use(weights, axis, made)]
        name = node.inputs[1]
        while name in self._producers:
            producer = self._producers[name]
            constants = [self._constants.get(name) for name in producer.inputs[1:]]
            uses += [
                self._use(name, 0, made)
                for name, values in zip(producer.inputs[1:], constants, strict=True)
                if values is not None and values.size > 1
            ]
            name = producer.inputs[0]
        if len(node.inputs) > 2 and node.inputs[2]:
            uses.append(node.inputs[2] in self._constants and self._use(node.inputs[2], 0, made))
        return all(uses)

    def _weights(self, name: str) -> str | None:
        """The constant that becomes a layer's weights."""
        while name in self._producers and self._producers[name].operator in _WEIGHTS:
            name = self._producers[name].inputs[0]
        return name if name in self._constants else None

    def _sum(self, node: Node, given: Sequence[_Axis]) -> _Axis | None:
        first = given[0]
        for other in given[1:]:
            widths = [[source.width for source in use.sources] for use in (first, other)]
            if widths[0] != widths[1] or first.entries != other.entries:
                return None
            for ours, theirs in zip(first.sources, other.sources, strict=True):
                ours.join(theirs)
        for name in node.inputs:
            values = self._constants.get(name)
            if name in self._channels or (values is not None and values.size == 1):
                continue
            if values is None:
                return None
            wide = [axis for axis, size in enumerate(values.shape) if size > 1]
            if len(wide) != 1 or not self._use(name, wide[0], first):
                return None
        return first

    def _reshape(self, node: Node, given: _Axis) -> _Axis | None:
        """Of what leaves the channels where they are: (images, values), or (images, channels, 1, 1)."""
        shape = self._constants.get(node.inputs[1])
        if shape is None or len(shape) < 2 or any(size != 1 for size in shape[2:]):
            return None
        if shape[1] == -1:
            return given
        entries, rest = divmod(int(shape[1]), _count(given) // given.entries)
        if rest:
            return None
        made = _Axis(given.sources, entries)
        known = self.uses.entries.setdefault((node.inputs[1], 1), made)
        return made if _alike(known, made) else None

    def _use(self, constant: str, axis: int, use: _Axis) -> bool:
        """Note that a constant's axis has those channels; False: it has not, or has others as well."""
        if constant not in self._constants or self._constants[constant].shape[axis] != _count(use):
            return False
        known = self.uses.axes.setdefault((constant, axis), use)
        if not _alike(known, use):
            self._keep([known])
            return False
        return True


def _count(use: _Axis) -> int:
    return use.entries * sum(source.width for source in use.sources)


def _alike(one: _Axis, other: _Axis) -> bool:
    """Whether both are the same channels of the same sources."""
    roots = [[source.root for source in use.sources] for use in (one, other)]
    return roots[0] == roots[1] and one.entries == other.entries
