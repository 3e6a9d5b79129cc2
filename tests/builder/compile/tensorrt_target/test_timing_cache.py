"""The timing cache, on TensorRT-RTX's real builder, where its contents are empty but its calls work."""

from __future__ import annotations

import logging
import pwd
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
from recording_cuda import AGX_ORIN, DESKTOP, ORIN
from small_kit import small_graph

from builder.compile.targets.tensorrt import compile as compiling
from builder.compile.targets.tensorrt.compile import BuildResources, build_engine
from builder.compile.targets.tensorrt.options import TensorRTOptions
from builder.compile.targets.tensorrt.timing_cache import (
    attach_timing_cache,
    save_timing_cache,
    timing_cache_folder,
    timing_cache_path,
    usable_timing_cache,
)
from runtime.manifest import BatchSizes

# TensorRT-RTX keeps these calls for compatibility, and says so at each.
pytestmark = pytest.mark.filterwarnings("ignore:.*iming.?[cC]ache:DeprecationWarning")


@pytest.fixture
def config(rtx):
    return rtx.trt.Builder(rtx.logger).create_builder_config()


def test_each_version_and_gpu_has_its_own_file(tmp_path):
    nano = timing_cache_path(tmp_path, "10.3.0", ORIN)
    others = [
        timing_cache_path(tmp_path, "10.7.0", ORIN),
        timing_cache_path(tmp_path, "10.3.0", AGX_ORIN),
        timing_cache_path(tmp_path, "10.3.0", replace(ORIN, memory=2 * ORIN.memory)),
        timing_cache_path(tmp_path, "10.3.0", DESKTOP),
    ]
    assert nano.name == "orin-sm87-8mp-8g-tensorrt-10.3.0.timing"
    assert len({nano, *others}) == 5


def test_a_new_cache_is_saved_where_there_was_none(rtx, config, tmp_path):
    path = tmp_path / "new" / "orin.timing"
    with rtx.log.capture():
        cache = attach_timing_cache(config, path)
        save_timing_cache(config, path)
    assert path.read_bytes() == bytes(cache.serialize())
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_is_no_cache_is_replaced(rtx, config, tmp_path):
    path = tmp_path / "orin.timing"
    path.write_bytes(b"not a timing cache")
    with rtx.log.capture():
        attach_timing_cache(config, path)
        save_timing_cache(config, path)
    assert path.read_bytes() != b"not a timing cache"


# A finished engine is never lost to it


@pytest.fixture
def obstructed(tmp_path) -> Path:
    """A cache whose folder cannot be made, whoever asks: a file is in its way."""
    (tmp_path / "cache").write_text("a file")
    return tmp_path / "cache" / "timing" / "orin.timing"


def test_a_folder_that_cannot_be_written_is_known_before_the_build(obstructed, caplog):
    assert usable_timing_cache(obstructed) is None
    (warning,) = caplog.records
    assert warning.levelno == logging.WARNING
    assert f"no timing cache can be kept: {obstructed.parent}: Not a directory" in warning.message


def test_a_folder_where_the_cache_should_be_is_known_before_the_build(tmp_path, caplog):
    path = tmp_path / "orin.timing"
    path.mkdir()
    assert usable_timing_cache(path) is None
    assert f"no timing cache can be kept: {path}: Is a directory" in caplog.text


def test_a_folder_that_can_be_made_is_no_obstacle(tmp_path, caplog):
    path = tmp_path / "cache" / "timing" / "orin.timing"
    assert usable_timing_cache(path) == path
    assert caplog.records == []


def test_a_user_without_a_home_builds_without_a_cache(monkeypatch, caplog):
    def unknown(_uid):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert timing_cache_folder() is None
    assert "this user has no home folder (XDG_CACHE_HOME names another place)" in caplog.text


def test_the_user_may_name_the_place(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert timing_cache_folder() == tmp_path / "trimrt" / "timing"


@pytest.fixture
def build(rtx, tmp_path):
    """A real build with the timing cache in that file."""

    def compile_small(timing_cache: Path) -> bytes:
        onnx.save(small_graph(), tmp_path / "small.onnx")
        options = TensorRTOptions(profiles=[BatchSizes(min=1, opt=2, max=4)])
        resources = BuildResources(workspace=64 << 20, timing_cache=timing_cache)
        return build_engine(rtx, tmp_path / "small.onnx", options, resources)

    return compile_small


def timing_cache_warnings(caplog) -> list[str]:
    return [record.message for record in caplog.records if "timing cache" in record.message]


def test_a_cache_that_cannot_be_kept_after_all_costs_a_warning_and_no_engine(build, obstructed, caplog):
    assert build(obstructed).startswith(b"vtrt")
    (warning,) = timing_cache_warnings(caplog)
    assert str(obstructed) in warning


@pytest.mark.parametrize(
    "cache", [None, SimpleNamespace(serialize=lambda: None)], ids=["no cache", "no bytes"]
)
def test_a_cache_that_tensorrt_does_not_give_costs_a_warning_and_no_engine(
    build, cache, tmp_path, monkeypatch, caplog
):
    """The build is real; where it saves what it learned, a stand-in for its configuration gives nothing."""
    silent = SimpleNamespace(get_timing_cache=lambda: cache)
    monkeypatch.setattr(compiling, "save_timing_cache", lambda _config, path: save_timing_cache(silent, path))
    assert build(tmp_path / "orin.timing").startswith(b"vtrt")
    assert timing_cache_warnings(caplog) == [
        f"the timing cache {tmp_path / 'orin.timing'} was not kept: TensorRT did not give it"
    ]


def test_where_tensorrt_makes_no_cache_the_build_goes_on_without(tmp_path, caplog):
    silent = SimpleNamespace(create_timing_cache=lambda _stored: None)
    assert attach_timing_cache(silent, tmp_path / "orin.timing") is None
    assert "TensorRT made none" in caplog.text


def test_a_cache_that_cannot_be_read_is_replaced_by_an_empty_one(rtx, config, tmp_path, monkeypatch, caplog):
    path = tmp_path / "orin.timing"
    path.write_bytes(b"of another user")

    def refuse(_path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read everything
    with rtx.log.capture():
        assert attach_timing_cache(config, path) is not None
    assert caplog.messages == [f"{path} is not used: Permission denied"]
