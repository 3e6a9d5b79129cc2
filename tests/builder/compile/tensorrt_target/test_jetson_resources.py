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

    def ask(device: Device, *, container: bool = False, artefact: bool = False, meminfo: bool = True):
        cuda, given = RecordingCuda(device), []
        cuda.memory = lambda: (316260 * 1024, 7802676 * 1024)  # CUDA leaves the page cache out
        root = tmp_path / "root"
        if device.integrated:
            write_orin_nano(root, container=container)
        if not meminfo:
            (root / "proc/meminfo").unlink()
        monkeypatch.setattr(targets, "load_tensorrt", lambda _backend: replace(rtx, backend="tensorrt"))
        monkeypatch.setattr(targets, "open_cuda", lambda: cuda)
        monkeypatch.setattr(targets, "available_memory", lambda: available_memory(root))
        monkeypatch.setattr(targets, "this_machine", lambda device: this_machine(device, root))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

        def build_engine(_library, _graph, _options, resources: BuildResources, _listener) -> bytes:
            given.append(resources)
            return b"plan"

        monkeypatch.setattr(targets, "build_engine", build_engine)
        target = targets.TensorRTTarget("tensorrt", TensorRTOptions())
        batch = BatchSizes(min=1, opt=8, max=32)
        made = target.compile(tmp_path / "graph.onnx", tmp_path, batch, lambda _step: None)
        return made if artefact else given[0]

    return ask


def test_the_workspace_is_a_quarter_of_what_can_be_had_not_of_what_cuda_calls_free(resources) -> None:
    assert resources(ORIN).workspace == 4121316 * 1024 // 4


def test_where_linux_does_not_say_what_can_be_had_cudas_figure_is_taken(resources) -> None:
    assert resources(ORIN, meminfo=False).workspace == 316260 * 1024 // 4


def test_a_graphics_card_has_its_own_memory(resources) -> None:
    assert resources(DESKTOP).workspace == 316260 * 1024 // 2


@pytest.mark.parametrize("container", [False, True], ids=["host", "container"])
def test_a_jetson_is_known_as_one_in_a_container_too(resources, rtx, container) -> None:
    found = resources(ORIN, container=container)
    assert found.jetson
    options = TensorRTOptions(hardware_compatibility="ampere+")
    with pytest.raises(UnsupportedOptionError, match="not supported on Jetson"):
        refuse_unsupported(replace(rtx, backend="tensorrt"), options, jetson=found.jetson)


def test_a_lone_image_gets_kernels_of_its_own() -> None:
    """By default; `--profile` says otherwise."""
    sizes = targets.default_profiles(BatchSizes(min=1, opt=8, max=32))
    assert sizes == [BatchSizes(min=1, opt=1, max=1), BatchSizes(min=2, opt=8, max=32)]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 8, 16), (8, 8, 8)])
def test_where_there_is_no_lone_image_or_nothing_else_one_profile_is_enough(sizes) -> None:
    batch = BatchSizes(min=sizes[0], opt=sizes[1], max=sizes[2])
    assert targets.default_profiles(batch) == [batch]


def test_the_best_size_of_a_package_is_the_one_asked_for_not_that_of_its_first_profile(resources) -> None:
    artefact = resources(ORIN, artefact=True)
    assert artefact.batch == BatchSizes(min=1, opt=8, max=32)
    assert [profile.opt for profile in artefact.profiles] == [1, 8]


def test_the_timing_cache_is_of_this_model(resources, tmp_path) -> None:
    cache = resources(ORIN).timing_cache
    assert cache is not None
    assert cache.parent == tmp_path / "cache" / "trimrt" / "timing"
    assert cache.name.startswith("orin-sm87-8mp-8g-")


def test_where_no_timing_cache_can_be_kept_the_build_goes_on_without(resources, tmp_path, caplog) -> None:
    (tmp_path / "cache").write_text("a file is in the way")
    assert resources(ORIN).timing_cache is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
