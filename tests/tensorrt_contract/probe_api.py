"""Print a TensorRT module's API as JSON: what pybind11 says of every class, method, property and enum.

Run as `python probe_api.py MODULE` in a process where the module can be imported.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from types import ModuleType
from typing import Any

SIGNATURE = re.compile(r"^(?:\d+\. )?(\w+)\((.*)\)(?: -> (.*))?$")


def split_arguments(text: str) -> list[str]:
    """`a: x, b: f[y, z] = <E.F: 0>` at its outer commas."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        if character in "[(<{":
            depth += 1
        elif character in "])>}":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def short(type_name: str | None) -> str | None:
    """`tensorrt_bindings.tensorrt.Dims` as `Dims`."""
    return type_name and re.sub(r"\b(?:\w+\.)*tensorrt(?:_rtx)?\.", "", type_name).strip()


def overloads(name: str, doc: str | None) -> list[dict[str, Any]]:
    """The signatures in a pybind11 docstring."""
    found = []
    for line in (doc or "").splitlines():
        match = SIGNATURE.match(line.strip())
        if not match or match[1] != name or match[2].startswith("*args"):
            continue
        parameters = []
        for argument in split_arguments(match[2]):
            declaration, _, default = argument.partition("=")
            parameters.append({"name": declaration.partition(":")[0].strip(), "required": not default})
        if parameters and parameters[0]["name"] == "self":
            parameters.pop(0)
        found.append({"parameters": parameters, "returns": short(match[3])})
    return found


def describe(owner: Any, name: str, value: Any) -> dict[str, Any]:
    """One member: a property, an enum value or constant, a class, or something to call."""
    if isinstance(value, property):
        returns = re.search(
            r"-> (.+)$", (value.fget.__doc__ or "").strip().splitlines()[0] if value.fget.__doc__ else ""
        )
        return {
            "kind": "property",
            "type": short(returns[1]) if returns else None,
            "settable": value.fset is not None,
        }
    if inspect.isclass(value):
        return {"kind": "class", "overloads": overloads("__init__", value.__init__.__doc__)}
    if callable(value):
        return {"kind": "method", "overloads": overloads(name, value.__doc__)}
    return {"kind": "value", "type": type(value).__name__}


def members(owner: Any) -> dict[str, Any]:
    """The public members of a module or class."""
    return {
        name: describe(owner, name, inspect.getattr_static(owner, name))
        for name in dir(owner)
        if not name.startswith("_") and not isinstance(getattr(owner, name, None), ModuleType)
    } | ({"__version__": {"kind": "value", "type": "str"}} if isinstance(owner, ModuleType) else {})


def main(module_name: str) -> None:
    """Print the API of the module and of all its classes, nested ones by dotted name."""
    module = importlib.import_module(module_name)
    api = {"": members(module)}
    waiting = [(name, value) for name, value in vars(module).items() if inspect.isclass(value)]
    while waiting:
        name, value = waiting.pop()
        api[name] = members(value)
        waiting += [
            (f"{name}.{inner}", nested)
            for inner, nested in vars(value).items()
            if inspect.isclass(nested) and not inner.startswith("_")
        ]
    api[""]["__version__"]["value"] = module.__version__
    print(json.dumps(api))


if __name__ == "__main__":
    main(sys.argv[1])
