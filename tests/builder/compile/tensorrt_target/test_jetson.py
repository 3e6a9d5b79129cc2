"""What the builder is given on a Jetson: a recorded one, with a stand-in for its GPU, and no build."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from jetson_files import write_orin_nano
from recording_cuda import DESKTOP, ORIN, RecordingCuda

from builder.compile.targets.tensorrt import target as targets
from builder.compile.targets.tensorrt.compile import BuildResources
from builder.compile.targets.tensorrt.options import (
    TensorRTOptions,
    UnsupportedOptionError,
    refuse_unsupported,
)
from runtime.cuda import Device
from runtime.jetson import available_memory
from runtime.manifest import BatchSizes
from runtime.tensorrt.compatibility import this_machine

MIB = 1 << 20


@pytest.fixture
def resources(rtx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a build would get on a machine with that device, which `tmp_path/root` describes."""

    def ask(device: Device, *, container: bool = False) -> BuildResources:
        cuda, given = RecordingCuda(device), []
        cuda.memory = lambda: (316260 * 1024, 7802676 * 1024)  # CUDA leaves the page cache out
        root = tmp_path / "root"
        if device.integrated:
            write_orin_nano(root, container=container)
        monkeypatch.setattr(targets, "load_tensorrt", lambda _backend: replace(rtx, backend="tensorrt"))
        monkeypatch.setattr(targets, "open_cuda", lambda: cuda)
        monkeypatch.setattr(targets, "available_memory", lambda: available_memory(root))
        monkeypatch.setattr(targets, "this_machine", lambda device: this_machine(device, root))
        monkeypatch.setattr(targets, "CACHE", tmp_path / "cache")
        monkeypatch.setattr(
            targets,
            "build_engine",
            lambda _library, _graph, _options, given_, _listener: given.append(given_) or b"plan",
        )
        target = targets.TensorRTTarget("tensorrt", TensorRTOptions())
        target.compile(
            tmp_path / "graph.onnx", tmp_path, BatchSizes(min=1, opt=8, max=32), lambda _step: None
        )
        return given[0]

    return ask


def test_the_workspace_is_a_quarter_of_what_can_be_had_not_of_what_cuda_calls_free(resources) -> None:
    assert resources(ORIN).workspace == 4121316 * 1024 // 4


def test_a_graphics_card_has_its_own_memory(resources) -> None:
    assert resources(DESKTOP).workspace == 316260 * 1024 // 2


@pytest.mark.parametrize("container", [False, True], ids=["host", "container"])
def test_a_jetson_is_known_as_one_in_a_container_too(resources, rtx, container) -> None:
    found = resources(ORIN, container=container)
    assert found.jetson
    options = TensorRTOptions(hardware_compatibility="ampere+")
    with pytest.raises(UnsupportedOptionError, match="not supported on Jetson"):
        refuse_unsupported(replace(rtx, backend="tensorrt"), options, jetson=found.jetson)


def test_the_timing_cache_is_of_this_model(resources, tmp_path) -> None:
    cache = resources(ORIN).timing_cache
    assert cache is not None
    assert cache.parent == tmp_path / "cache"
    assert cache.name.startswith("orin-sm87-8mp-8g-")


def test_where_no_timing_cache_can_be_kept_the_build_goes_on_without(resources, tmp_path, caplog) -> None:
    (tmp_path / "cache").write_text("a file is in the way")
    assert resources(ORIN).timing_cache is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
