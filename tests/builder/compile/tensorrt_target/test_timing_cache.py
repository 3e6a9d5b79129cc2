"""The timing cache, on TensorRT-RTX's real builder, where its contents are empty but its calls work."""

from __future__ import annotations

import pytest

from builder.compile.targets.tensorrt.timing_cache import (
    attach_timing_cache,
    save_timing_cache,
    timing_cache_path,
)

# TensorRT-RTX keeps these calls for compatibility, and says so at each.
pytestmark = pytest.mark.filterwarnings("ignore:.*iming.?[cC]ache:DeprecationWarning")


@pytest.fixture
def config(rtx):
    return rtx.trt.Builder(rtx.logger).create_builder_config()


def test_each_version_and_gpu_has_its_own_file(tmp_path):
    def path(version, gpu, capability):
        return timing_cache_path(tmp_path, version, gpu, capability)

    assert path("10.3.0", "Orin (nvgpu)", "8.7").name == "orin-nvgpu-sm87-tensorrt-10.3.0.timing"
    assert path("10.3.0", "Orin (nvgpu)", "8.7") != path("10.7.0", "Orin (nvgpu)", "8.7")
    assert path("10.3.0", "NVIDIA A2", "8.6") != path("10.3.0", "NVIDIA A10", "8.6")


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
