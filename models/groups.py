"""A network's groups of channels: what each is worth, what other widths would cost, and pruning to them.

Torch-Pruning (Fang et al. 2023, https://arxiv.org/abs/2301.12900) finds which layers must lose the same
channels together.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
import torch_pruning as tp
from numpy.typing import NDArray
from torch import Tensor, nn

from models.networks import classifier_head
from models.preprocessing import Preprocessing
from models.pruning import unprunable
from models.widths import Widths, Worth

_LAYERS: Final = (nn.Conv2d, nn.Linear)
_TINY: Final = 1e-12  # beside shares; some layers' weights are all zero before the training


@dataclass
class _Sizes:
    """How many channels a layer has for each of a group's.

    Attributes:
        inputs: by group, e.g. 49 where maps of 7x7 pixels are flattened.
        outputs: by group.
        pixels: of its output.
    """

    inputs: dict[str, int] = field(default_factory=dict)
    outputs: dict[str, int] = field(default_factory=dict)
    pixels: int = 0


class ChannelGroups:
    """The groups of a network's channels, by the names that latency tables have for them.

    Attributes:
        channels: how many each group has.
    """

    def __init__(
        self, network: nn.Module, spec: Preprocessing, importance: Mapping[str, Tensor] | None = None
    ) -> None:
        """Trace `network`, which must be in evaluation mode, contiguous and on the CPU.

        Args:
            network: not changed until `prune`.
            spec: input size.
            importance: of each weight, not negative, by the parameter's name; None: its square.

        Raises:
            PruningError: torch-pruning cannot trace this network.
        """
        example = torch.zeros(1, 3, spec.height, spec.width)
        self._importance: dict[Tensor, Tensor] | None = None
        if importance is not None:
            self._importance = {weight: importance[name] for name, weight in network.named_parameters()}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Unwrapped parameters", UserWarning)
                self._graph = tp.DependencyGraph().build_dependency(network, example)
            head = classifier_head(network)[1]
            found = list(self._graph.get_all_groups(ignored_layers=[head], root_module_types=list(_LAYERS)))
        except Exception as error:  # tracing fails in as many ways as there are architectures
            raise unprunable(error) from error
        names = {module: name for name, module in network.named_modules()}
        self._groups: dict[str, Any] = {}
        self._sizes: dict[nn.Module, _Sizes] = defaultdict(_Sizes)
        for group in found:
            modules = [dep.target.module for dep, _ in group]
            if any(isinstance(module, nn.Conv2d) and _is_grouped(module) for module in modules):
                continue  # its channels go in sets, which tables do not know
            makers = [dep.target.module for dep, _ in group if self._is_output(dep)]
            name = min(names[module] for module in makers if _mixes_channels(module))
            self._groups[name] = group
            for dep, indices in group:
                sizes = self._sizes[dep.target.module]
                side = sizes.outputs if self._is_output(dep) else sizes.inputs
                side[name] = side.get(name, 0) + len(indices)
        self.channels = {name: len(group[0].idxs) for name, group in self._groups.items()}
        for layer in self._sizes.values():
            for side in (layer.inputs, layer.outputs):
                side.update({name: count // self.channels[name] for name, count in side.items()})
        self._shares = {
            name: self._shares_of(group, self.channels[name]) for name, group in self._groups.items()
        }
        self._measure_maps(network, example)

    def worth(self) -> Worth:
        """What each group's best channels are worth, by how many are kept: shape (channels + 1,).

        That is the logarithm of the share of its weights' importance that a layer keeps, summed over the
        layers that make or read the channels. So what is left of a group becomes the more precious the less
        it is.
        """
        worth = {}
        for name, shares in self._shares.items():
            kept = shares[:, _best_first(shares)].cumsum(axis=1)
            worth[name] = np.concatenate([[-np.inf], np.log(kept + _TINY).sum(axis=0)])
        return worth

    def prune(self, widths: Widths) -> None:
        """Remove the least important channels of each group; these groups are of no use afterwards.

        Raises:
            PruningError: layers that torch-pruning misunderstood; the network is spoilt.
        """
        try:
            for name, width in widths.items():
                worst = _best_first(self._shares[name])[width:]
                if len(worst):
                    root = self._groups[name][0].dep
                    self._graph.get_pruning_group(
                        root.target.module, root.handler, sorted(map(int, worst))
                    ).prune()
        except Exception as error:  # as above
            raise unprunable(error) from error

    def saved_parameters(self, widths: Widths) -> int:
        """Weights and biases that a network of these widths has fewer."""
        return sum(self._size(layer, self.channels) - self._size(layer, widths) for layer in self._sizes)

    def saved_macs(self, widths: Widths) -> int:
        """Multiply-accumulates for one image that a network of these widths does fewer."""
        return sum(
            sizes.pixels * (self._weights(layer, self.channels) - self._weights(layer, widths))
            for layer, sizes in self._sizes.items()
        )

    def _size(self, layer: nn.Module, widths: Widths) -> int:
        """Of a layer's parameters."""
        weights = self._weights(layer, widths)
        return weights + sum(
            self._count(parameter.numel(), self._sizes[layer].outputs, widths)
            for parameter in layer.parameters(recurse=False)
            if parameter.ndim == 1
        )

    def _weights(self, layer: nn.Module, widths: Widths) -> int:
        """Of a convolution or matrix product."""
        if not isinstance(layer, _LAYERS):
            return 0
        sizes, shape = self._sizes[layer], layer.weight.shape
        outputs = self._count(shape[0], sizes.outputs, widths)
        inputs = shape[1] if _is_depthwise(layer) else self._count(shape[1], sizes.inputs, widths)
        return outputs * inputs * math.prod(shape[2:])

    def _count(self, all_channels: int, entries: dict[str, int], widths: Widths) -> int:
        """How many channels are left of a layer's inputs or outputs."""
        return all_channels - sum(
            each * (self.channels[name] - widths.get(name, self.channels[name]))
            for name, each in entries.items()
        )

    def _shares_of(self, group: Any, channels: int) -> NDArray[np.float64]:
        """The share of its weights' importance that a layer has in each channel, shape (layers, channels)."""
        shares = []
        for item in group:
            layer = item.dep.target.module
            if not isinstance(layer, _LAYERS):
                continue
            weights = self._importance_of(layer.weight)
            of_side = (weights if self._is_output(item.dep) else weights.transpose(0, 1)).flatten(1).sum(1)
            # Where maps are flattened, each channel has several inputs.
            of_channels = np.zeros(channels)
            np.add.at(of_channels, item.root_idxs, of_side.numpy()[item.idxs])
            shares.append(of_channels / (of_channels.sum() or 1))
        return np.array(shares)

    def _importance_of(self, weight: Tensor) -> Tensor:
        if self._importance is None:
            return weight.detach().double().square()
        return self._importance[weight].double()

    def _is_output(self, dep: Any) -> bool:
        return bool(self._graph.is_out_channel_pruning_fn(dep.handler))

    def _measure_maps(self, network: nn.Module, example: Tensor) -> None:
        def note(layer: nn.Conv2d | nn.Linear, _inputs: Any, output: Tensor) -> None:
            self._sizes[layer].pixels = output.numel() // len(layer.weight)

        hooks = [layer.register_forward_hook(note) for layer in self._sizes if isinstance(layer, _LAYERS)]
        with torch.inference_mode():
            network(example)
        for hook in hooks:
            hook.remove()


def _best_first(shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """Channels by what they have of all layers' weights, the most first."""
    return np.argsort(-shares.sum(axis=0), kind="stable")


def _mixes_channels(layer: nn.Module) -> bool:
    return isinstance(layer, _LAYERS) and not _is_depthwise(layer)


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels == layer.out_channels > 1


def _is_grouped(layer: nn.Conv2d) -> bool:
    return layer.groups > 1 and not _is_depthwise(layer)
