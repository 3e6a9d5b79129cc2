"""Our use of `cuda.bindings.runtime` against its real API: JetPack 6 needs 12.x, newer systems have 13.x."""

from __future__ import annotations

import ast
import json
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from official_bindings import Bindings, BindingsUnavailableError, cuda_bindings

from runtime.cuda.bindings import LASTING

SOURCE = Path(__file__).parents[2] / "runtime/cuda/bindings.py"
PROBE = Path(__file__).with_name("probe_cuda.py")


def _installed() -> str:
    try:
        return version("cuda-bindings")
    except PackageNotFoundError:
        return "none installed"


@cache
def api(wanted: str) -> dict[str, int | None]:
    if wanted == "none installed":
        pytest.skip("cuda-bindings is not installed: pip install trimrt[rtx]")
    try:
        bindings = (
            Bindings(wanted, "cuda.bindings.runtime", folder=None, stubs=None)
            if wanted == _installed()
            else cuda_bindings(wanted)
        )
    except BindingsUnavailableError as error:
        pytest.skip(str(error))
    found: dict[str, int | None] = json.loads(bindings.run(PROBE))
    return found


def uses() -> dict[str, int | None]:
    """Dotted names below `runtime`, and the number of arguments where they are called."""
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    found: dict[str, int | None] = {}
    calls: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name, arguments = ast.unparse(node.func), node.args
            if name == "_call":
                name, arguments = ast.unparse(node.args[0]), node.args[1:]
            calls[name] = len(arguments)
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("runtime."):
            found[ast.unparse(node)] = None
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "properties":
            found[f"runtime.cudaDeviceProp.{node.attr}"] = None
    return {name.removeprefix("runtime."): calls.get(name) for name in found}


@pytest.mark.parametrize("wanted", [_installed(), "12.9.10"])
def test_every_name_exists_and_takes_what_we_pass(wanted):
    known = api(wanted)
    missing = {name for name in uses() if name not in known}
    arity = {
        name: (passed, known[name])
        for name, passed in uses().items()
        if passed is not None and name in known and known[name] != passed
    }
    assert missing == set()
    assert arity == {}


def test_cuda_has_the_errors_that_last():
    known = set().union(*map(api, (_installed(), "12.9.10")))
    assert {name for name in LASTING if f"cudaError_t.{name}" not in known} == set()


def test_after_every_error_of_which_cuda_says_so_the_gpu_is_lost():
    """From the descriptions in the bindings that are installed."""
    errors = pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed").cudaError_t
    described = {error.name for error in errors if "must be terminated and relaunched" in _text(error)}
    assert len(described) >= 10
    assert described - LASTING == set()


def _text(error) -> str:
    return " ".join((error.__doc__ or "").split())


def test_the_collection_sees_the_source():
    found = uses()
    assert found["cudaMemcpyAsync"] == 5
    assert found["cudaStreamBeginCapture"] == 2
    assert "cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal" in found
    assert {"cudaDeviceProp.integrated", "cudaDeviceProp.multiProcessorCount"} <= set(found)
    assert len(found) >= 35
