"""Torchvision classifiers, with a stem that fits small images and channel counts that can be replayed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

import safetensors.torch
import torch
import torchvision
from torch import nn

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
PRUNABLE: Final = "ResNet, MobileNet, EfficientNet, DenseNet and SqueezeNet students can be pruned"


class NetworkError(TrimRTError):
    """A network that cannot be built; the message says what to do."""


def architectures() -> list[str]:
    """Names of torchvision's image classifiers."""
    names: list[str] = torchvision.models.list_models(module=torchvision.models)
    return names


def build_network(architecture: str, classes: int, stem: Stem = "standard") -> nn.Module:
    """A torchvision classifier with random weights (drawn from torch's global generator).

    Residual branches start at zero (Goyal et al. 2017, https://arxiv.org/abs/1706.02677, section 5.1).

    Args:
        architecture: one of `architectures()`.
        classes: number of outputs.
        stem: `small` replaces the first convolution by a 3x3 one of stride 1, so that images of a few
            dozen pixels still have an extent in the last stage.

    Raises:
        NetworkError: no such classifier, or one that has no convolution to replace.
    """
    if architecture not in architectures():
        like = did_you_mean(architecture, architectures())
        raise NetworkError(
            f"torchvision has no classifier {architecture!r}{like or f': {few(architectures(), MANY)}'}"
        )
    # Auxiliary heads would change the output in training mode.
    options = (
        {"aux_logits": False, "init_weights": True} if architecture in ("googlenet", "inception_v3") else {}
    )
    network: nn.Module = torchvision.models.get_model(
        architecture, weights=None, num_classes=classes, **options
    )
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


def classifier_head(network: nn.Module) -> tuple[str, nn.Module]:
    """The last layer, whose outputs are the classes, with its dotted name."""
    heads = [
        (name, module)
        for name, module in network.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    ]
    return heads[-1]


def channel_plan(network: nn.Module, architecture: str, classes: int, stem: Stem) -> ChannelPlan | None:
    """Where `network`'s layer sizes differ from the unpruned architecture's; None where nowhere.

    Returns:
        Module name to the attributes that differ and their values in `network`.

    Raises:
        NetworkError: it differs in more than a plan can say, so it could not be rebuilt.
    """
    with torch.device("meta"):
        unpruned = dict(build_network(architecture, classes, stem).named_modules())
    plan: ChannelPlan = {}
    for name, module in network.named_modules():
        differing = {
            attribute: int(getattr(module, attribute))
            for attribute in _SIZES.get(type(module), ())
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


def _shapes(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def build_planned_network(
    architecture: str, classes: int, stem: Stem, plan: Mapping[str, Mapping[str, int]] | None
) -> nn.Module:
    """A network of the plan's sizes on the meta device, to be filled by `load_state_dict(assign=True)`.

    Raises:
        NetworkError: the plan names layers or sizes that the architecture does not have.
    """
    with torch.device("meta"):
        network = build_network(architecture, classes, stem)
        modules = dict(network.named_modules())
        for name, sizes in (plan or {}).items():
            module = modules.get(name)
            if module is None or not set(sizes) <= set(_SIZES.get(type(module), ())):
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


def load_pretrained(network: nn.Module, file: Path) -> list[str]:
    """Fill `network` with the weights in `file`, but for a head or a first convolution of another shape.

    Args:
        network: changed in place.
        file: a state dict, as safetensors or as torch's own format (read without pickle's code).

    Returns:
        Names of the parameters that kept their random weights.

    Raises:
        NetworkError: unreadable, or weights of another architecture.
    """
    try:
        if file.suffix == ".safetensors":
            weights = safetensors.torch.load_file(file)
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and safetensors raise many types on files that are not theirs
        raise NetworkError(f"cannot read weights from {file}: {error}") from error
    if not isinstance(weights, dict) or not all(
        isinstance(value, torch.Tensor) for value in weights.values()
    ):
        raise NetworkError(f"{file} is not a state dict (a mapping of names to tensors)")
    own = network.state_dict()
    replaceable = {f"{classifier_head(network)[0]}.{suffix}" for suffix in ("weight", "bias")}
    replaceable.add(next(name for name, tensor in own.items() if tensor.ndim == 4))
    fitting = {
        name: tensor for name, tensor in weights.items() if name in own and tensor.shape == own[name].shape
    }
    missing = [name for name in own if name not in fitting and not name.endswith("num_batches_tracked")]
    if not set(missing) <= replaceable:
        example = next(name for name in missing if name not in replaceable)
        raise NetworkError(
            f"{file} does not fit this architecture: {len(missing)} of {len(own)} tensors are missing or of "
            f"another shape, e.g. {example}"
        )
    network.load_state_dict(fitting, strict=False)
    return missing
