"""Which plans may be loaded where: Jetsons of recorded files and stand-ins for their GPUs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from jetson_files import write_orin_nano
from recorded_machine import write_package
from recording_cuda import AGX_ORIN, DESKTOP, ORIN

from runtime.cuda import Device
from runtime.manifest import Compatibility, EngineError, read_manifest
from runtime.tensorrt.compatibility import check_machine, this_machine


@pytest.fixture
def host(tmp_path: Path) -> Compatibility:
    write_orin_nano(tmp_path / "host")
    return this_machine(ORIN, tmp_path / "host")


@pytest.fixture
def container(tmp_path: Path) -> Compatibility:
    write_orin_nano(tmp_path / "container", container=True)
    return this_machine(ORIN, tmp_path / "container")


def check(folder: Path, built: Compatibility, here: Compatibility) -> None:
    folder.mkdir(exist_ok=True)
    package = write_package(folder / "package", compatibility=built.model_dump())
    check_machine(package, read_manifest(package), here)


def refused(folder: Path, built: Compatibility, here: Compatibility, reason: str) -> None:
    with pytest.raises(EngineError, match=reason):
        check(folder, built, here)


def on(machine: Compatibility, device: Device) -> Compatibility:
    """The same Linux on another module."""
    return machine.model_copy(
        update={"multiprocessors": device.multiprocessors, "memory_mib": device.memory >> 20}
    )


def test_a_container_is_known_as_a_jetson(container: Compatibility) -> None:
    assert container.board == "NVIDIA Jetson"
    assert container.l4t is None


def test_what_the_host_built_loads_in_the_container(tmp_path, host, container) -> None:
    check(tmp_path, host, container)


def test_what_the_container_built_loads_on_the_host(tmp_path, host, container) -> None:
    check(tmp_path, container, host)


def test_a_patch_release_of_jetson_linux_makes_no_difference(tmp_path, host) -> None:
    check(tmp_path, host, host.model_copy(update={"l4t": "36.5.0"}))


def test_another_major_release_does(tmp_path, host) -> None:
    newer = host.model_copy(update={"l4t": "39.2.0"})
    refused(tmp_path, host, newer, r"for Jetson Linux 36\.4\.3; this is Jetson Linux 39\.2\.0")


@pytest.mark.parametrize("where", ["host", "container"])
def test_another_cuda_on_a_jetson_does(tmp_path, host, where, request) -> None:
    newer = request.getfixturevalue(where).model_copy(update={"cuda": "13.2"})
    refused(tmp_path, host, newer, r"for CUDA 12\.6; here is CUDA 13\.2")


def test_a_newer_driver_on_a_pc_makes_no_difference(tmp_path) -> None:
    check(tmp_path, this_machine(DESKTOP), this_machine(replace(DESKTOP, cuda="13.2")))


def test_a_plan_of_a_jetson_is_none_for_a_pc(tmp_path, container) -> None:
    here = this_machine(DESKTOP)
    refused(tmp_path, container, here, "for NVIDIA Jetson; this is no Jetson")


@pytest.mark.parametrize("where", ["host", "container"])
def test_a_plan_of_an_agx_orin_is_none_for_an_orin_nano_though_both_are_called_orin(
    tmp_path, host, where, request
) -> None:
    here = request.getfixturevalue(where)
    assert here.gpu_name == AGX_ORIN.name
    refused(tmp_path, on(host, AGX_ORIN), here, "for Orin with 16 multiprocessors; this one has 8")


def test_nor_is_one_of_an_orin_nx_with_twice_the_memory(tmp_path, host) -> None:
    larger = on(host, replace(ORIN, memory=2 * ORIN.memory))
    refused(tmp_path, larger, host, "for Orin with 15239 MiB of memory; this one has 7619")


def test_what_linux_keeps_for_itself_makes_no_difference(tmp_path, host) -> None:
    check(tmp_path, on(host, replace(ORIN, memory=ORIN.memory - (400 << 20))), host)


@pytest.mark.parametrize("where", ["host", "container"])
def test_a_plan_whose_manifest_says_less_is_judged_by_what_it_says(tmp_path, host, where, request) -> None:
    """As earlier versions of TrimRT wrote them."""
    earlier = host.model_copy(update={"board": None, "multiprocessors": None, "memory_mib": None})
    check(tmp_path / "a", earlier, request.getfixturevalue(where))
    check(tmp_path / "b", earlier.model_copy(update={"l4t": None}), request.getfixturevalue(where))


@pytest.mark.parametrize("release", ["unknown", ".", "R"])
def test_a_release_that_is_no_number_is_refused_and_no_error(tmp_path, host, release) -> None:
    refused(tmp_path, host.model_copy(update={"l4t": release}), host, "this is Jetson Linux 36")
