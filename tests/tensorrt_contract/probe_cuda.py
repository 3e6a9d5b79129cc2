"""Print how many arguments each function of `cuda.bindings.runtime` takes: `python probe_cuda.py MODULE`."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from typing import Any


def describe(value: Any) -> int | None:
    return len(inspect.signature(value).parameters) if inspect.isroutine(value) else None


if __name__ == "__main__":
    module = importlib.import_module(sys.argv[1])
    names = {name: describe(value) for name, value in vars(module).items() if not name.startswith("_")}
    for name, value in vars(module).items():
        if inspect.isclass(value):
            names |= {f"{name}.{member}": None for member in dir(value) if not member.startswith("_")}
    print(json.dumps(names))
