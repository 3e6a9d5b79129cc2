"""Classifiers of torchvision and timm, with a stem for small images and channel counts that can be replayed.

An architecture is a name of torchvision's, such as `resnet18`, or `timm:` and one of timm's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

from models.errors import TrimRTError
from models.naming import MANY, did_you_mean, few

Stem = Literal["standard", "small"]
ChannelPlan = dict[str, dict[str, int]]

# What pruning changes about a layer, by the layer's type.
_SIZES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("in_channels", "out_channels", "groups"),
    nn.BatchNorm2d: ("num_features",),
    nn.BatchNorm1d: ("num_features",),
    nn.Linear: ("in_features", "out_features"),
}
PRUNABLE: Final = "docs/architectures.md lists what can be pruned; --until student stops before pruning"
TIMM: Final = "timm:"
_TORCHVISION: Final = "torchvision:"


class NetworkError(TrimRTError):
    """A network that cannot be built; the message says what to do."""


def architectures() -> list[str]:
    """Names of torchvision's image classifiers."""
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def architecture_of(name: str) -> str:
    """The architecture of that name, which may begin with `torchvision:` or `timm:`.

    Raises:
        NetworkError: neither library has it, or timm is needed and not installed.
    """
    if name.startswith(TIMM):
        library, plain = "timm", name.removeprefix(TIMM)
        timm = _import_timm()
        # A name with another colon begins with the place that the weights come from.
        if ":" in plain or timm.is_model(plain):
            return name
        known = timm.list_models()
    else:
        library, plain = "torchvision", name.removeprefix(_TORCHVISION)
        known = architectures()
        if plain in known:
            return plain
    like = did_you_mean(plain, known) or f": {few(known, MANY)}"
    raise NetworkError(f"{library} has no classifier {plain!r}{like}")


def create_network(architecture: str, classes: int, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    """A classifier as its library makes it, with random weights (drawn from torch's global generator).

    Args:
        architecture: as `architecture_of` takes it.
        classes: number of outputs.
        arguments: what timm's `create_model` is given besides.

    Raises:
        NetworkError: no such architecture.
    """
    architecture = architecture_of(architecture)
    network: nn.Module
    if architecture.startswith(TIMM):
        name = architecture.removeprefix(TIMM)
        network = _import_timm().create_model(name, **{**(arguments or {}), "num_classes": classes})
        return network
    # Auxiliary heads would change the output in training mode.
    options = (
        {"aux_logits": False, "init_weights": True} if architecture in ("googlenet", "inception_v3") else {}
    )
    network = torchvision.models.get_model(architecture, weights=None, num_classes=classes, **options)
    return network


def _import_timm() -> Any:
    try:
        return importlib.import_module("timm")  # so that types do not depend on its being installed
    except ImportError as error:
        raise NetworkError("timm is not installed: pip install 'trimrt[timm]'") from error


def build_network(architecture: str, classes: int, stem: Stem = "standard") -> nn.Module:
    """A classifier with random weights (drawn from torch's global generator).

    Residual branches start at zero (Goyal et al. 2017, https://arxiv.org/abs/1706.02677, section 5.1).

    Args:
        architecture: as `architecture_of` takes it.
        classes: number of outputs.
        stem: `small` replaces the first convolution by a 3x3 one of stride 1, so that images of a few
            dozen pixels still have an extent in the last stage.

    Raises:
        NetworkError: no such classifier, or one that has no convolution to replace.
    """
    network = create_network(architecture, classes)
    _start_residuals_at_zero(network)
    if stem == "small":
        _replace_first_convolution(network, architecture)
    return network


def draw_weights(network: nn.Module) -> None:
    """Replace the weights by random ones (He et al. 2015), of whatever sizes the layers have by now."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.Linear)):
            module.reset_parameters()
    _start_residuals_at_zero(network)


def _start_residuals_at_zero(network: nn.Module) -> None:
    if isinstance(network, torchvision.models.ResNet):
        for module in network.modules():
            last_norm = getattr(module, "bn3", getattr(module, "bn2", None))
            if last_norm is not None:
                nn.init.zeros_(last_norm.weight)


def _replace_first_convolution(network: nn.Module, architecture: str) -> None:
    name, first = next(
        ((name, module) for name, module in network.named_modules() if isinstance(module, nn.Conv2d)),
        ("", None),
    )
    if first is None or first.kernel_size[0] > 11 or first.kernel_size == first.stride:
        raise NetworkError(
            f"{architecture} cuts images into patches and has no small stem; choose --image-stem standard "
            "and an image size it was made for, or a convolutional architecture"
        )
    small = nn.Conv2d(first.in_channels, first.out_channels, 3, padding=1, bias=first.bias is not None)
    nn.init.kaiming_normal_(small.weight, mode="fan_out", nonlinearity="relu")
    parent, _, attribute = name.rpartition(".")
    setattr(network.get_submodule(parent), attribute, small)


def classifier_head(network: nn.Module) -> tuple[str, nn.Conv2d | nn.Linear]:
    """The last layer, whose outputs are the classes, with its dotted name."""
    # timm's networks say which one it is; that need not be the last to be defined.
    own: Any = getattr(network, "get_classifier", None)
    last = network if own is None else own()
    within = set(last.modules()) if isinstance(last, nn.Module) else set(network.modules())
    heads = [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module in within
    ]
    return heads[-1]


class _Unallocated(TorchFunctionMode):
    """Networks made in this context have no memory for what `torch.empty` makes, which is nearly everything.

    Constructors may still compute with other tensors, as RegNet's do, which `torch.device("meta")` forbids.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.empty:
            kwargs = {**(kwargs or {}), "device": "meta"}
        return func(*args, **(kwargs or {}))


def skeleton(build: Callable[[], nn.Module]) -> nn.Module:
    """The network that `build` makes, mostly without memory or values for its state, in little time.

    Buffers that are no part of its state have their values: nothing else would bring them.
    """
    with torch.random.fork_rng(devices=[]):
        with _Unallocated():
            network = build()
        state = network.state_dict()
        if any(buffer.is_meta for name, buffer in network.named_buffers() if name not in state):
            network = build()
    return network


def channel_plan(network: nn.Module, architecture: str, classes: int, stem: Stem) -> ChannelPlan | None:
    """Where `network`'s layer sizes differ from the unpruned architecture's; None where nowhere.

    Returns:
        Module name to the attributes that differ and their values in `network`.

    Raises:
        NetworkError: it differs in more than a plan can say, so it could not be rebuilt.
    """
    unpruned = dict(skeleton(lambda: build_network(architecture, classes, stem)).named_modules())
    plan: ChannelPlan = {}
    for name, module in network.named_modules():
        differing = {
            attribute: int(getattr(module, attribute))
            for attribute in _sizes(module)
            if getattr(module, attribute) != getattr(unpruned[name], attribute)
        }
        if differing:
            plan[name] = differing
    rebuilt = build_planned_network(architecture, classes, stem, plan).state_dict()
    if _shapes(rebuilt) != _shapes(network.state_dict()):
        raise NetworkError(
            f"a pruned {architecture} cannot be rebuilt: only convolutions, batch normalisations and linear "
            f"layers may change; {PRUNABLE}"
        )
    return plan or None


def _sizes(module: nn.Module) -> tuple[str, ...]:
    return next((names for kind, names in _SIZES.items() if isinstance(module, kind)), ())


def _shapes(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def build_planned_network(
    architecture: str, classes: int, stem: Stem, plan: Mapping[str, Mapping[str, int]] | None
) -> nn.Module:
    """A network of the plan's sizes without values, to be filled by `load_state_dict(assign=True)`.

    Raises:
        NetworkError: the plan names layers or sizes that the architecture does not have.
    """
    network = skeleton(lambda: build_network(architecture, classes, stem))
    modules = dict(network.named_modules())
    with torch.device("meta"):
        for name, sizes in (plan or {}).items():
            module = modules.get(name)
            if module is None or not set(sizes) <= set(_sizes(module)):
                raise NetworkError(
                    f"the channel plan sets {', '.join(sizes)} of {name!r}, which is not in {architecture}"
                )
            for attribute, size in sizes.items():
                setattr(module, attribute, size)
            _reallocate(module)
    return network


def _reallocate(module: nn.Module) -> None:
    """Give `module` parameters and buffers of the sizes its attributes now name."""
    if isinstance(module, nn.Conv2d):
        shape = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
        outputs = module.out_channels
    elif isinstance(module, nn.Linear):
        shape = (module.out_features, module.in_features)
        outputs = module.out_features
    else:
        assert isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))
        shape = (module.num_features,)
        outputs = module.num_features
        module.register_buffer("running_mean", torch.empty(outputs))
        module.register_buffer("running_var", torch.empty(outputs))
    module.weight = nn.Parameter(torch.empty(shape))
    if module.bias is not None:
        module.bias = nn.Parameter(torch.empty(outputs))
