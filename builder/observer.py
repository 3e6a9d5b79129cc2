"""How a program follows a build, which takes seconds to hours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.progress import Progress

if TYPE_CHECKING:
    from builder.compile.packages import Package
    from builder.prepare.sensitivity import LayerCost
    from runtime.manifest import Backend


class BuildObserver:
    """Called as a build goes on. Every method does nothing; a subclass overrides those it wants.

    Attributes:
        progress: a running display that gets bars for trainings and TensorRT's build phases; None: no bars.
    """

    progress: Progress | None = None

    def report(self, step: str) -> None:
        """A step begins, such as `exporting to ONNX`."""

    def chose_target(self, target: Backend, reason: str) -> None:
        """The target `auto` became `target`."""

    def noted(self, finding: str) -> None:
        """Something was found out about the network or its images, such as how they are normalised."""

    def exported(self, difference: float) -> None:
        """The network is a graph now, whose logits differ from PyTorch's by `difference` at most."""

    def ranked_layers(self, costs: Sequence[LayerCost]) -> None:
        """What quantising each layer alone costs, the costliest first, if that had to be found."""

    def published(self, package: Package) -> None:
        """An engine passed the gate and is in its folder."""
