"""The ways to a static INT8 graph, in the order of their cost.

    entropy, max, mse     activation ranges
    equalised, bias       channels of one range, biases that make up for rounding
    rounded               weights that are rounded for the least error of each layer's output
    mixed precision       more and more of the layers that INT8 hurts most stay in floating point, in the best
                          graph so far

Each is made only when the one before it has been refused, sees training images alone, and is judged by exact
sums. Fine-tuning (`qat`) comes after them, where there is a network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from builder.comparison import Comparison
from builder.kit import Report
from builder.prepare.equalise import equalise
from builder.prepare.int8 import convert_to_int8
from builder.prepare.options import PrepareOptions
from builder.prepare.placement import keep_in_float
from builder.prepare.qdq import activation_scales, quantise_again
from builder.prepare.ranges import Ranges, least_error_scales
from builder.prepare.reconstruction import reconstruct
from builder.prepare.sensitivity import LayerCost, rank_layers, worthwhile_groups
from models.preprocessing import Pixels
from runtime.manifest import WeightChange

if TYPE_CHECKING:
    import onnx

IMAGES: Final = 64  # whose activations are all held in memory, layer by layer


@dataclass(frozen=True)
class Candidate:
    """A static INT8 graph with FP32 between the quantised layers.

    Attributes:
        path: its file.
        method: how the activation ranges were found.
        changes: what was done then.
        kept: names of the layers that are not quantised.
        seconds: that making it took.
        exact: what it gives for the held-out images where sums are exact.
    """

    path: Path
    method: Ranges
    changes: tuple[WeightChange, ...]
    kept: tuple[str, ...]
    seconds: float
    exact: Comparison


class Ladder:
    """Makes the graphs of one network, each once."""

    def __init__(
        self,
        master: Path,
        pixels: Pixels,
        options: PrepareOptions,
        judge: Callable[[onnx.ModelProto], Comparison],
        report: Report,
        ranked: Callable[[Sequence[LayerCost]], None],
    ) -> None:
        """Nothing is made yet.

        Args:
            master: the FP32 graph; the others are written beside it.
            pixels: training images, uint8 NHWC.
            options: which ways are taken.
            judge: holds a graph against FP32 on images that calibration does not see.
            report: takes lines of progress.
            ranked: takes the ranking of the layers, once it is made.
        """
        self._path = master
        self._pixels = pixels
        self._options = options
        self._judge = judge
        self._report = report
        self._ranked = ranked
        self._made: list[Candidate] = []
        self._ways = self._climb()

    def candidates(self) -> Iterator[Candidate]:
        """All of them, in order; what was made for an earlier call is not made again."""
        place = 0
        while place < len(self._made) or self._make_next():
            yield self._made[place]
            place += 1

    def _make_next(self) -> bool:
        made = next(self._ways, None)
        if made is not None:
            self._made.append(made)
        return made is not None

    def _climb(self) -> Iterator[Candidate]:
        for method in self._options.methods:
            yield self._make(method, ())
        changes: tuple[WeightChange, ...] = ()
        if self._options.correction:
            equalised = self._equalised is not self._master
            changes = ("equalised", "bias") if equalised else ("bias",)
            yield self._make("mse", changes)
        if self._options.rounding:
            changes = (*changes, "rounded")
            yield self._make("mse", changes)
        if self._options.sensitivity:
            # What mends one network spoils another. Of equals, the last is the least accidental.
            best = max(reversed(self._made), key=lambda each: each.exact.label_agreement)
            for kept in worthwhile_groups(self._layer_costs(best)):
                yield self._make(best.method, best.changes, kept)

    def _layer_costs(self, base: Candidate) -> list[LayerCost]:
        """What quantising each layer of a candidate alone costs, the costliest first."""
        quantised, master = self._before_changes(base.method, base.changes)
        corrected = "bias" in base.changes
        costs = rank_layers(master, quantised, self._few, self._report, corrected=corrected)
        self._ranked(costs)
        return costs

    def _make(self, method: Ranges, changes: tuple[WeightChange, ...], kept: Sequence[str] = ()) -> Candidate:
        import onnx

        started = time.monotonic()
        name = "-".join([method, *changes])
        if kept:
            name += f"-mixed-{sum(bool(each.kept) for each in self._made) + 1}"
        self._report(f"making INT8 ({name}) with {len(self._pixels)} training images")
        quantised, master = self._before_changes(method, changes)
        model = keep_in_float(quantised, master, kept)
        if changes:
            rounded = "rounded" in changes
            model = reconstruct(model, master, self._few, weights=rounded, seed=self._options.seed)
        path = self._path.with_name(f"int8-{name}-fp32.onnx")
        onnx.save(model, str(path))
        seconds = time.monotonic() - started
        self._report(f"judging INT8 ({name}) by exact sums")
        return Candidate(path, method, changes, tuple(kept), seconds, self._judge(model))

    def _before_changes(
        self, method: Ranges, changes: Sequence[WeightChange]
    ) -> tuple[onnx.ModelProto, onnx.ModelProto]:
        """All layers quantised, before biases and weights change; and the FP32 graph that it is made of."""
        if changes:
            return self._by_least_error, self._equalised
        return self._calibrated(method), self._master

    def _calibrated(self, method: Ranges) -> onnx.ModelProto:
        """With ranges found by one method, and the weights as they are."""
        import onnx

        path = self._path.with_name(f"calibrated-{method}.onnx")
        if not path.exists():
            if method == "mse":
                onnx.save(self._with_least_error(self._master), str(path))
            else:
                convert_to_int8(self._path, path, self._pixels, method=method, rest="fp32")
        return onnx.load(str(path))

    @cached_property
    def _master(self) -> onnx.ModelProto:
        import onnx

        return onnx.load(str(self._path))

    @cached_property
    def _equalised(self) -> onnx.ModelProto:
        """The FP32 graph that all but plain calibration starts from."""
        if not self._options.correction:
            return self._master
        return equalise(self._master, self._few) or self._master

    @cached_property
    def _by_least_error(self) -> onnx.ModelProto:
        return self._with_least_error(self._equalised)

    def _with_least_error(self, master: onnx.ModelProto) -> onnx.ModelProto:
        """Q and DQ where ModelOpt puts them, with other ranges."""
        method = self._options.calibration
        placed = self._calibrated(method if method in ("entropy", "max") else "max")
        images = {node.output[0] for node in master.graph.node if node.name == "pre/layout"}
        tensors = [tensor for tensor in activation_scales(placed) if tensor not in images]
        return quantise_again(placed, master, least_error_scales(master, tensors, self._few))

    @cached_property
    def _few(self) -> Pixels:
        """So few that the activations of a whole network pass by in seconds."""
        chosen = np.linspace(0, len(self._pixels) - 1, min(IMAGES, len(self._pixels)))
        return self._pixels[chosen.astype(np.int64)]
