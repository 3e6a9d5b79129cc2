"""What the source of a build names: a path, a checkpoint by its name, or a library's network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from builder.kit import is_kit
from builder.prepare.other_formats import told_instead
from models.card import CARD_NAME, CheckpointError
from models.errors import TrimRTError
from models.files import restore
from models.finding import find_checkpoint, last_checkpoint
from models.naming import nothing_at
from runtime.packages import is_package

LIBRARIES: Final = ("torchvision:", "timm:")


WEIGHTS_SUFFIXES: Final = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".tar", ".th", ".pkl")


class MissingSourceError(TrimRTError):
    """What a build is to start from is not there; the message says what is like it."""


def find_source(source: str | Path) -> str:
    """The network's name in a library, or the path of a kit, a checkpoint or a file that is there.

    A run's folder stands for its last checkpoint.

    Args:
        source: a name in a library, a path, or the name of a checkpoint or of a run.

    Raises:
        MissingSourceError: there is nothing of that name, or it is an engine package.
    """
    name = os.fspath(source)
    if name.startswith(LIBRARIES):
        return name
    path = Path(name)
    restore(path)
    if path.is_dir() and not is_kit(path) and not (path / CARD_NAME).is_file():
        if last := last_checkpoint(path):
            return str(last)
        if is_package(path):
            raise MissingSourceError(f"{path} is an engine package; name what it was built from")
        if instead := told_instead(path):
            raise MissingSourceError(f"{path} {instead}")
    if path.is_file() and path.suffix.lower() == ".zip":
        raise MissingSourceError(
            f"{path} is no network; of photographs, `trimrt compress {path} --build` makes an engine"
        )
    if path.exists():
        return name
    if path.name != name or path.suffix:
        raise MissingSourceError(nothing_at(path))
    try:
        return str(find_checkpoint(name))
    except CheckpointError as error:
        raise MissingSourceError(f"{nothing_at(path)}, and {error}") from None


def is_weights(path: Path) -> bool:
    """Whether there is a file of weights, by its suffix, or a folder of Hugging Face's."""
    if path.is_dir():
        return (path / "config.json").is_file() and not (path / CARD_NAME).is_file()
    return path.suffix.lower() in WEIGHTS_SUFFIXES and path.is_file()
