"""Weights as trainers save them: PyTorch's files, safetensors and Hugging Face's folders, read without code.

A file is searched for *states*, mappings from names to tensors, wherever it has them: at the top, under
`state_dict`, `model`, `net`, `state_dict_ema` and the like. Wrappers put a prefix before the names, such as
`module.`, `model.` or `backbone.`. The network decides: the state and the prefix are taken with which most of
its own names are found, averaged weights before others.

PyTorch's files are pickles. torch reads them with `weights_only`, which runs no code of the file; objects of
classes that it does not know, such as a timm checkpoint's arguments, become stand-ins that hold data alone.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from models.networks import NetworkError, classifier_head, skeleton

CONFIG_NAME: Final = "config.json"

_FILES: Final = ("model.safetensors", "pytorch_model.bin")  # in Hugging Face's folders, the preferred first
_ARCHITECTURE_KEYS: Final = ("architecture", "arch", "model_name")
_LABEL_KEYS: Final = ("classes", "class_names", "class_to_idx", "idx_to_class", "labels", "label_names")
_DEPTH: Final = 4  # of mappings in mappings that are searched
_SHOWN: Final = 3
# Segments that wrappers put between others, not only before all of them.
_WRAPPERS: Final = re.compile(r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# What a state may have that a network for inference does not: auxiliary heads, counters, tables.
_NEEDLESS: Final = re.compile(
    r"(?:^|\.)(?:aux\d?|AuxLogits|aux_classifier)\."
    r"|(?:^|\.)(?:num_batches_tracked|n_averaged|total_ops|total_params|relative_position_index|attn_mask)$"
)
_SAVE: Final = "torch.save(model.state_dict(), 'weights.pth')"
_EXPORT: Final = "torch.onnx.export(model, (images,), 'model.onnx', dynamo=True)"

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class WeightsFile:
    """What a file of weights holds.

    Attributes:
        path: of the file.
        states: mappings from names to tensors, by where in the file they are; `""` is the top.
        architecture: what the file calls the network; None: it does not say.
        by_timm: timm wrote it.
        labels: as the file has them, a list or a mapping from or to numbers; None: it has none.
        config: timm's `pretrained_cfg` or the arguments of its training, which say how images get in.
        model_args: arguments for timm's `create_model`.
        transformers: the class of transformers whose weights these are; None: they are of no such class.
    """

    path: Path
    states: Mapping[str, State]
    architecture: str | None = None
    by_timm: bool = False
    labels: object = None
    config: Mapping[str, Any] = field(default_factory=dict)
    model_args: Mapping[str, Any] = field(default_factory=dict)
    transformers: str | None = None


class Fit(NamedTuple):
    """How a state's tensors lie on a network's.

    Attributes:
        tensors: those of the right shape, by the network's names.
        place: of the state in the file.
        prefix: that its names have and the network's have not.
        missing: the network's names without a tensor.
        misshapen: names with a tensor of another shape, and what is wrong with it.
        unexpected: names that the network has not.
    """

    tensors: dict[str, Tensor]
    place: str
    prefix: str
    missing: Sequence[str]
    misshapen: Mapping[str, str]
    unexpected: Sequence[str]

    def __str__(self) -> str:
        names = f", names without {self.prefix!r}" if self.prefix else ""
        return f"{len(self.tensors)} tensors{f' of {self.place!r}' if self.place else ''}{names}"


class _StandIn:
    """In place of an object whose class the file names: its data, and none of its code."""

    name = ""
    state: object = None

    def __new__(cls, *_arguments: object, **_named: object) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *_arguments: object, **_named: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state


def read_weights(path: Path) -> WeightsFile:
    """What a file of weights holds, or a folder of Hugging Face's with such a file.

    Args:
        path: a file of PyTorch or safetensors; a `config.json` beside it is read as well.

    Raises:
        NetworkError: it cannot be read without running its code, or has no tensors with names.
    """
    if path.is_dir():
        found = next((path / name for name in _FILES if (path / name).is_file()), None)
        if found is None:
            raise NetworkError(f"{path} has no weights: neither {' nor '.join(_FILES)}")
        path = found
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if isinstance(content, _StandIn):
        raise NetworkError(_whole_model(path, content.name))
    states = dict(_states(content))
    if not states:
        if module := next((each for each in _values(content) if _is_module(each)), None):
            raise NetworkError(_whole_model(path, module.name))
        raise NetworkError(f"{path} has no weights: no names with tensors. Save them with {_SAVE}")
    return WeightsFile(path, states, **{**_told(content), **_told_beside(path)})


def fit(file: WeightsFile, network: nn.Module) -> Fit:
    """The state in `file` that fits `network` best, and how it does.

    Args:
        file: any of its states may be taken.
        network: its names and shapes are compared; values are not looked at.
    """
    own = {name: tensor.shape for name, tensor in network.state_dict().items()}
    fits = [_lay(state, place, own) for place, state in file.states.items()]
    # Of states that fit alike, averaged weights, which their trainer judged by; else the first.
    return max(fits, key=lambda each: (len(each.tensors), "ema" in f"{each.place}.{each.prefix}".lower()))


def load_weights(network: nn.Module, file: WeightsFile, name: str) -> Fit:
    """Fill `network` with the weights in `file`, which must be all of its own and no others.

    Args:
        network: changed in place.
        file: what was read.
        name: of the architecture, for messages.

    Raises:
        NetworkError: they are of another network; the message names the first that do not fit.
    """
    found = fit(file, network)
    if found.missing or found.misshapen or found.unexpected:
        raise NetworkError(f"{file.path} does not fit {name}: {_misfit(found)}")
    network.load_state_dict(found.tensors, strict=False)
    return found


def load_pretrained(network: nn.Module, path: Path) -> list[str]:
    """Fill `network` with the weights in `path`, but for a head or a first convolution of another shape.

    Args:
        network: changed in place.
        path: as for `read_weights`.

    Returns:
        Names of the parameters that kept their random weights.

    Raises:
        NetworkError: unreadable, or weights of another architecture.
    """
    found = fit(read_weights(path), network)
    replaceable = {f"{classifier_head(network)[0]}.{suffix}" for suffix in ("weight", "bias")}
    replaceable.add(next(name for name, tensor in network.state_dict().items() if tensor.ndim == 4))
    if not {*found.missing, *found.misshapen} <= replaceable:
        raise NetworkError(f"{path} does not fit this architecture: {_misfit(found)}")
    network.load_state_dict(found.tensors, strict=False)
    return [*found.missing, *found.misshapen]


def count_classes(file: WeightsFile, build: Callable[[int], nn.Module]) -> int | None:
    """The number of classes of the network in `file`, as the shapes of its head have it.

    Args:
        file: what was read.
        build: makes the network for a number of classes.

    Returns:
        None: the file has no such head.
    """
    # What differs between networks of two and of three classes is the head.
    two, three = (skeleton(lambda classes=classes: build(classes)) for classes in (2, 3))  # type: ignore[misc]
    shapes = {name: tensor.shape for name, tensor in two.state_dict().items()}
    heads = {
        name: next(axis for axis, size in enumerate(tensor.shape) if size != shapes[name][axis])
        for name, tensor in three.state_dict().items()
        if tensor.shape != shapes[name]
    }
    found = fit(file, two)
    state = file.states[found.place]
    for name, axis in heads.items():
        tensor = state.get(f"{found.prefix}{name}")
        if tensor is not None and tensor.ndim == len(shapes[name]):
            return tensor.shape[axis]
    return None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise NetworkError(f"cannot read weights from {path}: {_reason(error)}") from error


def _read_pickle(path: Path) -> Any:
    archive = False
    try:
        archive = zipfile.is_zipfile(path)
        if archive:
            with zipfile.ZipFile(path) as opened:
                script = any(Path(name).name == "constants.pkl" for name in opened.namelist())
            if script:
                raise NetworkError(
                    f"{path} is TorchScript. Save what it learned: "
                    f"torch.save(torch.jit.load({path.name!r}).state_dict(), 'weights.pth')"
                )
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path) if archive else []
        with torch.serialization.safe_globals([(_stand_in(name), name) for name in unknown]):
            # Mapped, so that an optimiser's state is never read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except NetworkError:
        raise
    except OSError as error:
        raise NetworkError(f"cannot read weights from {path}: {_reason(error)}") from error
    except Exception as error:  # torch raises many types on files that are not its own
        if isinstance(error, pickle.UnpicklingError) and (archive or "GLOBAL" in str(error)):
            raise NetworkError(
                f"{path} holds more than tensors, and reading that would run its code. Save what it learned: "
                f"{_SAVE}"
            ) from error
        raise NetworkError(f"cannot read weights from {path}: it is no file of PyTorch's") from error


def _stand_in(name: str) -> Any:
    """What the file's object of that name becomes."""
    if name == "collections.defaultdict":
        return _dictionary
    return type("StandIn", (_StandIn,), {"name": name})


def _dictionary(*_arguments: object) -> dict[Any, Any]:
    return {}


def _whole_model(path: Path, name: str) -> str:
    return (
        f"{path} is a pickled {name}, and reading it would run its code. Save what it learned: {_SAVE}; or "
        f"export it: {_EXPORT}"
    )


def _is_module(value: object) -> bool:
    return isinstance(value, _StandIn) and isinstance(value.state, Mapping) and "_modules" in value.state


def _values(content: object) -> Iterator[Any]:
    if isinstance(content, Mapping):
        yield from content.values()


def _states(content: object, place: str = "", depth: int = 0) -> Iterator[tuple[str, State]]:
    """Every mapping from names to tensors, with its place."""
    if not isinstance(content, Mapping) or depth > _DEPTH:
        return
    tensors = {
        _WRAPPERS.sub("", name): value
        for name, value in content.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }
    if tensors:
        yield place, tensors
    for name, value in content.items():
        if isinstance(name, str):
            yield from _states(value, f"{place}.{name}" if place else name, depth + 1)


def _told(content: object) -> dict[str, Any]:
    """What a checkpoint says of its network beside the weights."""
    if not isinstance(content, Mapping):
        return {}
    told: dict[str, Any] = {}
    arguments = content.get("args")
    if isinstance(arguments, _StandIn) and isinstance(arguments.state, Mapping):  # argparse.Namespace
        arguments = arguments.state
    sources = [content, content.get("hyper_parameters"), content.get("config")]
    for source in sources:
        if isinstance(source, Mapping):
            for key in _ARCHITECTURE_KEYS:
                if isinstance(source.get(key), str):
                    told.setdefault("architecture", source[key])
            for key in _LABEL_KEYS:
                if isinstance(source.get(key), list | tuple | dict) and source[key]:
                    told.setdefault("labels", source[key])
    if "arch" in content and isinstance(arguments, Mapping) and "version" in content:
        told |= {"by_timm": True, "config": dict(arguments)}
        if isinstance(arguments.get("model_kwargs"), Mapping):
            told["model_args"] = dict(arguments["model_kwargs"])
    return told


def _told_beside(path: Path) -> dict[str, Any]:
    """What Hugging Face's `config.json` in the same folder says."""
    try:
        config = json.loads((path.parent / CONFIG_NAME).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}
    if not isinstance(config, dict):
        return {}
    if not isinstance(config.get("architecture"), str):
        kinds = config.get("architectures") or [config.get("model_type")]
        return {"transformers": kinds[0]} if isinstance(kinds[0], str) else {}
    told: dict[str, Any] = {"architecture": config["architecture"], "by_timm": True}
    if isinstance(config.get("pretrained_cfg"), dict):
        told["config"] = config["pretrained_cfg"]
    if isinstance(config.get("model_args"), dict):
        told["model_args"] = config["model_args"]
    if config.get("label_names"):
        told["labels"] = config["label_names"]
    return told


def _lay(state: State, place: str, own: Mapping[str, torch.Size]) -> Fit:
    """`state` on a network, with the prefix with which most of its names are found."""
    counts: Counter[str] = Counter()
    for name, tensor in state.items():
        for start in (0, *(match.end() for match in re.finditer(r"\.", name))):
            if name[start:] in own:
                # A name of the right shape says more than the name alone.
                counts[name[:start]] += 2 if own[name[start:]] == tensor.shape else 1
    ranked = [prefix for prefix, count in counts.items() if count == max(counts.values())]
    prefix = next((each for each in ranked if "ema" in each.lower()), min(ranked, key=len, default=""))
    stripped = {
        name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)
    }
    tensors = {name: tensor for name, tensor in stripped.items() if own.get(name) == tensor.shape}
    misshapen = {
        name: f"{name} is {_sides(tensor.shape)}, not {_sides(own[name])}"
        for name, tensor in stripped.items()
        if name in own and name not in tensors
    }
    return Fit(
        tensors=tensors,
        place=place,
        prefix=prefix,
        missing=[name for name in own if name not in stripped and not _NEEDLESS.search(name)],
        misshapen=misshapen,
        unexpected=[name for name in stripped if name not in own and not _NEEDLESS.search(name)],
    )


def _misfit(found: Fit) -> str:
    parts = []
    if found.misshapen:
        parts.append(f"{len(found.misshapen)} of another shape ({_some(list(found.misshapen.values()))})")
    if found.missing:
        parts.append(f"{len(found.missing)} missing ({_some(found.missing)})")
    if found.unexpected:
        parts.append(f"{len(found.unexpected)} that it has not ({_some(found.unexpected)})")
    return f"of its tensors, {len(found.tensors)} fit, {', '.join(parts)}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _sides(shape: torch.Size) -> str:
    return "x".join(map(str, shape)) or "a single value"


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error) or type(error).__name__).splitlines()[0]
