"""Structured pruning: whole channels go, by the L2 magnitude of their weights (Li et al. 2017).

Torch-Pruning (Fang et al. 2023, https://arxiv.org/abs/2301.12900) finds which layers must lose the
same channels together.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Final

import torch
import torch_pruning as tp
from torch import nn

from models.errors import TrimRTError
from models.networks import PRUNABLE, classifier_head
from models.preprocessing import Preprocessing
from models.recipe import Pruning

_SEARCH_STEPS: Final = 10  # halvings: the ratio is then found to 0.001
_MAX_RATIO: Final = 0.99


class PruningError(TrimRTError):
    """A network that cannot be pruned as asked; the message says what to do."""


class _MagnitudePruner(tp.pruner.MagnitudePruner):  # type: ignore[misc]
    """Torch-Pruning's, but a layer that would round to no channels keeps one multiple.

    Torch-Pruning itself leaves such a layer as wide as it was.
    """

    def _round_to(self, n_pruned: int, current_channels: int, round_to: int) -> int:
        kept = (current_channels - n_pruned) // round_to * round_to
        return current_channels - max(kept, min(round_to, current_channels))


class Pruner:
    """Prunes one network in place, in `settings.steps` steps up to `ratio`."""

    def __init__(self, network: nn.Module, spec: Preprocessing, settings: Pruning, ratio: float) -> None:
        """Trace `network`, which must be in evaluation mode, contiguous and on the CPU.

        Raises:
            PruningError: torch-pruning cannot trace this network.
        """
        try:
            with warnings.catch_warnings():
                # Parameters outside of layers are refused later, with a message of our own.
                warnings.filterwarnings("ignore", "Unwrapped parameters", UserWarning)
                self._pruner = _MagnitudePruner(
                    network,
                    torch.zeros(1, 3, spec.height, spec.width),
                    importance=tp.importance.MagnitudeImportance(p=2),
                    global_pruning=settings.scope == "global",
                    pruning_ratio=ratio,
                    iterative_steps=settings.steps,
                    round_to=settings.round_to,
                    ignored_layers=[classifier_head(network)[1]],
                    # Its defaults are dictionaries that all pruners share.
                    in_channel_groups={},
                    out_channel_groups={},
                )
        except Exception as error:  # tracing fails in as many ways as there are architectures
            raise unprunable(error) from error

    def step(self) -> None:
        """Remove the next step's channels.

        Raises:
            PruningError: layers that torch-pruning misunderstood; the network is spoilt.
        """
        try:
            self._pruner.step()
        except Exception as error:  # as above
            raise unprunable(error) from error


def unprunable(error: Exception) -> PruningError:
    """What is to be said of an error that torch-pruning raised."""
    return PruningError(f"torch-pruning cannot follow this network ({error}); {PRUNABLE}")


def find_ratio(
    network: nn.Module,
    spec: Preprocessing,
    settings: Pruning,
    measure: Callable[[nn.Module], int],
    target: float,
) -> float:
    """The smallest ratio whose pruned network measures at most `target`, by bisection.

    Args:
        network: not changed.
        spec: input size.
        settings: all but its ratio is used.
        measure: a pruned network's parameters or multiply-accumulates.
        target: in the unit of `measure`; below 1, a share of the unpruned network's.

    Raises:
        PruningError: no ratio gets there.
    """
    goal = target * measure(network) if target < 1 else target
    one_shot = settings.model_copy(update={"steps": 1})

    def pruned_size(ratio: float) -> int:
        candidate = copy.deepcopy(network)
        Pruner(candidate, spec, one_shot, ratio).step()
        return measure(candidate)

    low, high = 0.0, _MAX_RATIO
    if pruned_size(low) <= goal:
        return low
    smallest = pruned_size(high)
    if smallest > goal:
        raise PruningError(
            f"the target of {goal:,.0f} cannot be reached: with channels in multiples of "
            f"{settings.round_to}, the smallest network has {smallest:,}"
        )
    for _ in range(_SEARCH_STEPS):
        middle = (low + high) / 2
        if pruned_size(middle) <= goal:
            high = middle
        else:
            low = middle
    return high
