"""What Linux says of a Jetson, on the host and in a container: recorded files, since no Jetson is here."""

from __future__ import annotations

from pathlib import Path

import pytest
from jetson_files import AGX_ORIN, write_files, write_orin_nano

from runtime.jetson import Power, available_memory, jetson_linux, jetson_model, power


@pytest.fixture
def host(tmp_path: Path) -> Path:
    write_orin_nano(tmp_path / "host")
    return tmp_path / "host"


@pytest.fixture
def container(tmp_path: Path) -> Path:
    write_orin_nano(tmp_path / "container", container=True)
    return tmp_path / "container"


def test_the_host_says_all(host: Path) -> None:
    assert jetson_model(host) == "NVIDIA Jetson Orin Nano Developer Kit"
    assert jetson_linux(host) == "36.4.3"
    assert available_memory(host) == 4121316 * 1024
    found = power(host)
    assert found == Power(
        mode="25W", gpu_max_hz=918_000_000, gpu_fixed=False, cpu_max_hz=1_344_000_000, cores=6
    )
    assert str(found) == (
        "mode 25W; GPU up to 918 MHz, not held there (`sudo jetson_clocks` does that); "
        "CPU up to 1344 MHz; 6 cores on"
    )


def test_an_agx_orin_says_all(tmp_path: Path) -> None:
    write_files(tmp_path, AGX_ORIN)
    assert jetson_model(tmp_path) == "NVIDIA Jetson AGX Orin Developer Kit"
    assert jetson_linux(tmp_path) == "36.4.0"
    assert available_memory(tmp_path) == (62817 - 20642) << 20
    assert power(tmp_path) == Power(
        mode="MAXN", gpu_max_hz=1_300_500_000, gpu_fixed=False, cpu_max_hz=2_201_600_000, cores=12
    )


def test_the_device_tree_alone_tells_a_jetson(host: Path) -> None:
    (host / "sys/devices/soc0/family").unlink()
    assert jetson_model(host) == "NVIDIA Jetson Orin Nano Developer Kit"


def test_a_container_knows_that_it_is_on_a_jetson_and_what_clocks_it_may_have(container: Path) -> None:
    assert jetson_model(container) == "NVIDIA Jetson"
    assert jetson_linux(container) is None
    found = power(container)
    assert found is not None
    assert found.mode is None
    assert (found.gpu_max_hz, found.cpu_max_hz) == (918_000_000, 1_344_000_000)


def test_jetson_clocks_holds_the_clock_at_its_most(host: Path) -> None:
    (host / "sys/class/devfreq/17000000.gpu/min_freq").write_text("918000000\n")
    found = power(host)
    assert found is not None
    assert found.gpu_fixed
    assert "GPU up to 918 MHz, held there" in str(found)


def test_a_mode_without_a_name_has_its_number(host: Path) -> None:
    (host / "etc/nvpmodel.conf").unlink()
    found = power(host)
    assert found is not None
    assert found.mode == "1"


def test_a_mode_whose_name_ends_at_the_bracket_is_named_without_it(host: Path) -> None:
    (host / "etc/nvpmodel.conf").write_text("< POWER_MODEL ID=1 NAME=MODE_30W>\n")
    found = power(host)
    assert found is not None
    assert found.mode == "MODE_30W"


@pytest.mark.parametrize(("online", "cores"), [("0-3,6", 5), ("0", 1), ("0-11", 12), ("", None)])
def test_cores_that_are_on_are_counted(host: Path, online: str, cores: int | None) -> None:
    (host / "sys/devices/system/cpu/online").write_text(online)
    found = power(host)
    assert found is not None
    assert found.cores == cores


@pytest.mark.parametrize("model", [b"", b"\0", b" \n\0"])
def test_a_board_without_a_name_is_called_what_the_kernel_calls_it(host: Path, model: bytes) -> None:
    (host / "proc/device-tree/model").write_bytes(model)
    assert jetson_model(host) == "NVIDIA Jetson"
    (host / "sys/devices/soc0/machine").write_text("NVIDIA Jetson Orin NX\n")
    assert jetson_model(host) == "NVIDIA Jetson Orin NX"


def test_a_name_that_is_no_text_is_still_a_name(host: Path) -> None:
    (host / "proc/device-tree/model").write_bytes(b"Orin \xff\0")
    assert jetson_model(host) == "Orin \N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("name", ["proc/device-tree/model", "proc/meminfo", "etc/nv_tegra_release"])
def test_a_folder_in_a_files_place_is_no_error(host: Path, name: str) -> None:
    (host / name).unlink()
    (host / name).mkdir()
    assert jetson_model(host) is not None
    assert power(host) is not None
    assert (jetson_linux(host) is None) is (name == "etc/nv_tegra_release")
    assert (available_memory(host) is None) is (name == "proc/meminfo")


@pytest.mark.parametrize(
    "compatible",
    ["raspberrypi,5-model-b\0brcm,bcm2712\0", "amlogic,g12a\0", ""],
    ids=["pi", "amlogic", "empty"],
)
def test_another_makers_arm_board_is_no_jetson(tmp_path: Path, compatible: str) -> None:
    write_files(
        tmp_path, {"proc/device-tree/compatible": compatible, "proc/device-tree/model": "Some Board\0"}
    )
    write_files(tmp_path, {"sys/devices/soc0/family": "Amlogic\n"})
    assert jetson_model(tmp_path) is None


def test_a_pc_is_no_jetson(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 16 kB\nMemAvailable:    8 kB\n")
    assert jetson_model(tmp_path) is None
    assert jetson_linux(tmp_path) is None
    assert power(tmp_path) is None
    assert available_memory(tmp_path) == 8192
