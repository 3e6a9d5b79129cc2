"""A shadow at share 1 beside an engine under full load, and the same load without it, in turns."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import pytest
from PIL import Image
from processes import TRIMRT, start_process

from builder.compile.packages import build_package
from builder.compile.targets.openvino.target import OpenVINOTarget
from builder.compile.verification import Gate
from builder.kit import open_kit
from runtime.manifest import BatchSizes, Precision

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ROUNDS = 6  # with the shadow; as many without
SECONDS = 5
CONNECTIONS = 32


def _build(directory: Path, precision: Precision) -> str:
    """The name of an engine that reads digits."""
    kit = open_kit(ROOT / "trimrt/selftest/kit")
    built = build_package(
        kit,
        OpenVINOTarget(),
        precision,
        directory,
        batch=BatchSizes(min=1, opt=8, max=16),
        gate=Gate(),
        command="trimrt build",
        report=lambda _line: None,
    )
    return built.folder.name


def test_a_shadow_costs_a_loaded_engine_neither_throughput_nor_latency(tmp_path: Path) -> None:
    engines, image, result = tmp_path / "engines", tmp_path / "image.png", tmp_path / "result.json"
    of, candidate = _build(engines, "fp16"), _build(engines, "int8")
    pixels = open_kit(ROOT / "trimrt/selftest/kit").verification.pixels
    Image.fromarray(pixels[0]).save(image)
    with (
        start_process(
            ["--engine-dir", str(engines), "--engine", f"{of},{candidate}"], tmp_path / "log"
        ) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        shadow = f"/engines/{candidate}/shadow"
        command = [TRIMRT, "loadtest", "--url", server.url, "--images", str(image), "--json", str(result)]
        load = ["--load", str(CONNECTIONS), "--warmup", "1", "--duration", str(SECONDS)]

        def round_of_load() -> dict[str, Any]:
            subprocess.run([*command, *load], check=True, stdout=subprocess.DEVNULL)
            (point,) = json.loads(result.read_text())["points"]
            assert point["errors"] == {}
            return point  # type: ignore[no-any-return]

        def round_beside_the_shadow() -> dict[str, Any]:
            before = _answered(client)
            client.put(shadow, json={"of": of, "share": 1}).raise_for_status()
            point = round_of_load()
            (told,) = (it["shadow"] for it in client.get("/stats").json()["engines"] if it["shadow"])
            fates = {fate: told[fate] for fate in ("images", "dropped", "failed", "waiting")}
            assert sum(fates.values()) == _answered(client) - before
            assert told["failed"] == 0
            client.delete(shadow).raise_for_status()
            print(fates, f"agreement {told['agreement']}, {point['requests_per_s']:.0f}/s")
            return point

        alone: list[dict[str, Any]] = []
        beside: list[dict[str, Any]] = []
        turns = [(round_of_load, alone), (round_beside_the_shadow, beside)]
        for _ in range(ROUNDS):
            for turn, points in turns:
                points.append(turn())
            turns.reverse()
    throughput = [median(point["requests_per_s"] for point in points) for points in (alone, beside)]
    p99 = [median(point["latency_ms"]["p99"] for point in points) for points in (alone, beside)]
    for what, (without, beside_it) in {"throughput, 1/s": throughput, "p99, ms": p99}.items():
        print(f"{what}: {without:.2f} without, {beside_it:.2f} with ({beside_it / without - 1:+.1%})")
    assert throughput[1] >= 0.95 * throughput[0]
    assert p99[1] <= 1.05 * p99[0]


def _answered(client: httpx.Client) -> int:
    requests = client.get("/stats").json()["requests"]
    return sum(it["count"] for it in requests if it["outcome"] == "ok")
