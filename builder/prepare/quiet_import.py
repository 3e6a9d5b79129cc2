"""ONNX Runtime, imported without its warnings about GPUs that are not there."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

_STANDARD_ERROR: Final = 2  # as a descriptor, for it is not Python that writes


def import_onnxruntime() -> Any:
    """The module. When it is first imported it looks for GPUs, and warns of every device it cannot read.

    Raises:
        ImportError: it is not installed.
    """
    if "onnxruntime" in sys.modules:
        return sys.modules["onnxruntime"]
    with _no_standard_error():
        return importlib.import_module("onnxruntime")


@contextmanager
def _no_standard_error() -> Iterator[None]:
    try:
        kept = os.dup(_STANDARD_ERROR)
    except OSError:  # it is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, _STANDARD_ERROR)
    try:
        yield
    finally:
        os.dup2(kept, _STANDARD_ERROR)
        os.close(nowhere)
        os.close(kept)
