"""Our source against the real Python API of every TensorRT that we say we support.

JetPack 6 has TensorRT 10.3, JetPack 7.2 has 10.16, 11.4 is the newest; TensorRT-RTX is installed
here. The three first are NVIDIA's official bindings, imported without their libraries.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
from api_uses import Use, merge, problem, uses_in, uses_in_source
from official_bindings import Bindings, BindingsUnavailableError, official_bindings

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*ROOT.glob("builder/compile/targets/tensorrt/*.py"), *ROOT.glob("runtime/tensorrt/*.py")])
RTX = "1.7.1.116"
VERSIONS = ["10.3.0", "10.16.1.11", "11.4.0.106", RTX]


@cache
def bindings(version: str) -> Bindings:
    if version == RTX:
        pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install trimrt[rtx]")
        return Bindings(RTX, "tensorrt_rtx", folder=None, stubs=None)
    try:
        return official_bindings(version)
    except BindingsUnavailableError as error:
        pytest.skip(str(error))


@cache
def api(version: str):
    return bindings(version).api()


@cache
def every_api():
    return merge(api(version) for version in VERSIONS)


@cache
def our_uses() -> list[Use]:
    return [use for path in SOURCES for use in uses_in(path, every_api())[0]]


@pytest.mark.parametrize("version", VERSIONS)
def test_these_are_the_versions_they_claim_to_be(version):
    assert api(version)[""]["__version__"]["value"] == version


@pytest.mark.parametrize("version", VERSIONS)
def test_every_name_we_use_exists_and_takes_what_we_pass(version):
    wrong = {
        f"{use.place} {use.name}": found
        for use in our_uses()
        if not use.guarded and (found := problem(use, api(version))) is not None
    }
    assert wrong == {}


def test_what_is_guarded_is_missing_somewhere():
    """A guard that every version passes is dead code."""
    guarded = {use.name: use for use in our_uses() if use.guarded}
    needless = [
        name
        for name, use in guarded.items()
        if all(problem(use, api(version)) is None for version in VERSIONS)
        and all(use.owner in api(version) for version in VERSIONS)
    ]
    assert needless == []
    assert guarded, "the options that only some versions have are guarded"


def test_nothing_of_tensorrt_escapes_the_collection():
    assert [found for path in SOURCES for found in uses_in(path, every_api())[1]] == []
    assert len({use.name for use in our_uses()}) >= 60


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        (
            "def f(trt, config: trt.IBuilderConfig): config.set_flag(trt.BuilderFlag.FP16)",
            "BuilderFlag has no FP16",
        ),
        ("def f(trt, config: trt.IBuilderConfig): config.int8_calibrator = None", "has no int8_calibrator"),
        ("def f(trt, logger): trt.Builder(logger).platform_has_fast_int8", "has no platform_has_fast_int8"),
        ("def f(trt, logger): trt.Builder(logger).create_network(1, 2)", "does not take 2 arguments"),
        ("def f(trt, engine: trt.ICudaEngine): engine.create_execution_context(plan=1)", "['plan']"),
        ("def f(trt, engine: trt.ICudaEngine): engine.num_layers = 1", "cannot be set"),
        ("def f(trt, engine: trt.ICudaEngine): engine.device_memory_size", "has no device_memory_size"),
        (
            "def f(trt):\n class M(trt.IProgressMonitor):\n  def phase_start(self, name): pass",
            "is called with other arguments",
        ),
    ],
)
def test_what_tensorrt_11_removed_or_never_had_would_be_found(code, complaint):
    uses, untyped = uses_in_source(code, every_api(), "example.py")
    problems = [problem(use, api("11.4.0.106")) or "" for use in uses]
    assert any(complaint in found for found in problems), (uses, untyped, problems)


def test_an_object_of_unknown_type_would_be_found():
    _, untyped = uses_in_source("def f(x): x.set_tensor_address('a', 1)", every_api(), "example.py")
    assert untyped == ["example.py:1: x.set_tensor_address"]


REFUSED = {
    "10.3.0": {"compute capability 8.6", "compute capability 8.7", "same compute capability", "dla"},
    "10.16.1.11": {"compute capability 8.6", "compute capability 8.7", "dla"},
    "11.4.0.106": {"compute capability 8.6", "compute capability 8.7", "dla"},
    RTX: {"compute capability 8.7", "ampere+", "same compute capability", "version compatible", "dla"},
}


@pytest.mark.parametrize("version", VERSIONS)
def test_options_are_refused_by_the_version_that_lacks_them_and_by_no_other(version):
    said = json.loads(bindings(version).run(Path(__file__).with_name("refusals.py")))
    assert said.pop("version") == version
    refused = {option: message for option, message in said.items() if message is not None}
    assert refused.keys() == REFUSED[version]
    assert all(version in message for message in refused.values()), "the message names the version at hand"


@pytest.mark.parametrize("version", [version for version in VERSIONS if version != RTX])
def test_where_tensorrt_makes_no_builder_and_no_runtime_it_is_said_in_words(version):
    """The stub libraries return null, of which the bindings make a TypeError about a factory function."""
    said = json.loads(bindings(version).run(Path(__file__).with_name("nothing_made.py"), "graph.onnx"))
    assert said == {
        "builder": f"tensorrt {version} did not build the engine:\nTensorRT gave no reason",
        "runtime": None,
    }
