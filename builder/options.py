"""What can be chosen about a build, on the command line and in Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from builder.compile.selection import Objective
from builder.compile.targets.tensorrt.options import TensorRTOptions
from builder.compile.verification import Gate
from builder.prepare.options import PrepareOptions
from runtime.manifest import Backend, BatchSizes, Precision
from runtime.signatures import ANYONE, Trust


@dataclass(frozen=True)
class BuildOptions:
    """How engine packages are built.

    Attributes:
        precisions: one package each; `best` is the fastest that passes the gate of INT8, FP16 (FP32 for
            OpenVINO) and, on GPUs, INT8 that leaves residual sums or the first layer in FP16. None: INT8, of
            TensorRT-RTX FP16.
        target: compiler; `auto` is TensorRT where it and a GPU are, else OpenVINO.
        batch: batch sizes to compile for.
        gate: what an engine may lose and still be published.
        tensorrt: for TensorRT's builder.
        prepare: how the graphs are made. A build kit has its graphs already and takes only the defaults.
        objective: what `best` prefers: less time for one image, or more images a second.
        replace: replace packages of the same name that were made of other networks.
        trust: whose build kits are used; if it names keys, nothing but a kit is built.
    """

    precisions: Sequence[Precision | Literal["best"]] | None = None
    target: Backend | Literal["auto"] = "auto"
    batch: BatchSizes = field(default_factory=lambda: BatchSizes(min=1, opt=8, max=32))
    gate: Gate = field(default_factory=Gate)
    tensorrt: TensorRTOptions = field(default_factory=TensorRTOptions)
    prepare: PrepareOptions = field(default_factory=PrepareOptions)
    objective: Objective = "latency"
    replace: bool = False
    trust: Trust = ANYONE
