"""What is learned: data, networks, distillation, pruning and evaluation, and *the* preprocessing.

>>> from models import compress, make_recipe
>>> run = compress("digits", recipe=make_recipe(preset="quick"))

`docs/api.md` describes these names. Importing this package imports none of them: each is loaded when it is
first used, so the preprocessing alone needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from models.compression import CompressionRun, compress
    from models.recipe import Recipe, make_recipe

__all__ = ["CompressionRun", "Recipe", "compress", "make_recipe"]

_MODULES: Final = {
    "CompressionRun": "models.compression",
    "Recipe": "models.recipe",
    "compress": "models.compression",
    "make_recipe": "models.recipe",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
