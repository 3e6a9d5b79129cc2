"""Accelerator telemetry: a Jetson's sysfs as files, since no Jetson is here."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from jetson_files import AGX_ORIN, THOR, write_files, write_orin_nano
from running import running

from runtime.devices import find_devices
from runtime.devices.base import Reading
from server.settings import Settings


@pytest.fixture
def orin(tmp_path: Path) -> Path:
    write_orin_nano(tmp_path)
    return tmp_path


def test_a_jetson_is_read_from_sysfs(orin: Path) -> None:
    (device,) = find_devices(orin)
    assert device.name == "NVIDIA Jetson Orin Nano Developer Kit"
    assert device.read() == [
        Reading("utilization_ratio", "17000000.gpu", 0.437),
        Reading("clock_hertz", "17000000.gpu", 624_750_000),
        Reading("clock_limit_hertz", "17000000.gpu", 918_000_000),
        Reading("temperature_celsius", "cpu-thermal", 48.312),
        Reading("temperature_celsius", "gpu-thermal", 47.125),
        Reading("power_watts", "VDD_IN", pytest.approx(4.95808)),
        Reading("power_watts", "VDD_CPU_GPU_CV", pytest.approx(0.648192)),
        Reading("throttling_events", "undervoltage", 0),
        Reading("throttling_events", "average overcurrent", 15),
        Reading("throttling_events", "instantaneous overcurrent", 37),
        Reading("memory_total_bytes", "", 7802676 * 1024),
        Reading("memory_used_bytes", "", (7802676 - 4121316) * 1024),
    ]


@pytest.mark.parametrize("machine", ["NVIDIA Orin Nano Developer Kit\n", None])
def test_a_container_on_a_jetson_knows_it_without_the_device_tree(orin: Path, machine: str | None) -> None:
    shutil.rmtree(orin / "proc/device-tree")
    if machine is not None:
        (orin / "sys/devices/soc0/machine").write_text(machine)
    (device,) = find_devices(orin)
    assert device.name == (machine or "NVIDIA Jetson").strip()
    assert len(device.read()) == 12
    (orin / "sys/devices/soc0/family").unlink()
    assert find_devices(orin) == []


def test_sensors_that_fail_or_vanish_are_left_out(orin: Path) -> None:
    (device,) = find_devices(orin)
    (orin / "sys/class/devfreq/17000000.gpu/device/load").write_text("not a number")
    (orin / "sys/class/hwmon/hwmon1/in1_input").unlink()
    (orin / "sys/class/hwmon/hwmon3/oc2_event_cnt").unlink()
    (orin / "proc/meminfo").unlink()
    quantities = [(reading.quantity, reading.sensor) for reading in device.read()]
    assert quantities == [
        ("clock_hertz", "17000000.gpu"),
        ("clock_limit_hertz", "17000000.gpu"),
        ("temperature_celsius", "cpu-thermal"),
        ("temperature_celsius", "gpu-thermal"),
        ("power_watts", "VDD_CPU_GPU_CV"),
        ("throttling_events", "undervoltage"),
        ("throttling_events", "instantaneous overcurrent"),
    ]


def test_an_agx_orin_has_other_rails_and_a_label_that_is_none(tmp_path: Path) -> None:
    write_files(tmp_path, AGX_ORIN)
    monitor = tmp_path / "sys/class/hwmon/hwmon3"
    for rail in (1, 2, 3):
        (monitor / f"in{rail}_input").write_text("5000\n")
        (monitor / f"curr{rail}_input").write_text(f"{rail}000\n")
    (monitor / "in7_input").write_text("6000\n")
    (device,) = find_devices(tmp_path)
    assert device.name == "NVIDIA Jetson AGX Orin Developer Kit"
    assert device.read() == [
        Reading("utilization_ratio", "17000000.gpu", 0.12),
        Reading("clock_hertz", "17000000.gpu", 1_300_500_000),
        Reading("clock_limit_hertz", "17000000.gpu", 1_300_500_000),
        Reading("temperature_celsius", "cpu-thermal", 52.968),
        Reading("temperature_celsius", "gpu-thermal", 47.625),
        Reading("power_watts", "VDD_GPU_SOC", 5.0),
        Reading("power_watts", "VDD_CPU_CV", 10.0),
        Reading("power_watts", "VIN_SYS_5V0", 15.0),
        Reading("memory_total_bytes", "", 62817 << 20),
        Reading("memory_used_bytes", "", 20642 << 20),
    ]


def test_a_thor_has_its_load_from_nvml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sysfs has clock and throttling, but no load."""
    load = Reading("utilization_ratio", "", 0.5)
    gpu = SimpleNamespace(name="0: NVIDIA Thor", read=lambda: [load])
    monkeypatch.setattr("runtime.devices.nvml.find_gpus", lambda: [gpu])
    write_files(tmp_path, THOR)
    board, nvml = find_devices(tmp_path)
    assert board.name == "NVIDIA Jetson AGX Thor Developer Kit"
    assert board.read() == [
        Reading("clock_hertz", "gpu-gpc-0", 1_575_000_000),
        Reading("clock_limit_hertz", "gpu-gpc-0", 1_575_000_000),
        Reading("temperature_celsius", "gpu-thermal", 41.5),
        Reading("throttling_events", "instantaneous overcurrent", 179),
    ]
    assert nvml.read() == [load]


def test_an_orin_asks_nvml_for_nothing(orin: Path) -> None:
    (orin / "dev").mkdir()
    (orin / "dev/nvidiactl").touch()
    assert [device.name for device in find_devices(orin)] == ["NVIDIA Jetson Orin Nano Developer Kit"]


def test_a_machine_without_accelerators_has_no_devices(tmp_path: Path) -> None:
    assert find_devices(tmp_path) == []


def test_a_driver_that_does_not_answer_is_no_device(tmp_path: Path) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has an NVIDIA driver")
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidiactl").touch()
    assert find_devices(tmp_path) == []


def test_metrics_carry_the_readings(orin: Path, engine_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.app.find_devices", lambda: find_devices(orin))
    with running(Settings(engine="tiny", engine_dir=engine_dir, port=0)) as server:
        metrics = server.client.get("/metrics").text
    device = 'device="NVIDIA Jetson Orin Nano Developer Kit"'
    assert f'trimrt_device_power_watts{{{device},sensor="VDD_IN"}} 4.95808' in metrics
    assert f'trimrt_device_temperature_celsius{{{device},sensor="gpu-thermal"}} 47.125' in metrics
    assert f'trimrt_device_utilization_ratio{{{device},sensor="17000000.gpu"}} 0.437' in metrics
