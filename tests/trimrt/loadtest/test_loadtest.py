"""`trimrt loadtest` against a real server."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from gated_engine import Gate, load_gated
from processes import TRIMRT
from running import Running, running

from server.settings import Settings
from trimrt.loadtest.requests import find_images, make_bodies, reason_of
from trimrt.loadtest.results import Latencies, Point, Thresholds

Encode = Callable[..., bytes]


@pytest.fixture
def images(tmp_path: Path, encode: Encode) -> Path:
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for seed in range(9):
        (folder / f"{seed}.png").write_bytes(encode(seed))
    (folder / "more" / "a.jpg").write_bytes(encode(9, "JPEG"))
    (folder / "notes.txt").write_text("no image")
    return folder


def _loadtest(url: str, images: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        TRIMRT,
        "loadtest",
        "--url",
        url,
        "--images",
        str(images),
        "--warmup",
        "0.2",
        "--duration",
        "1",
    ]
    return subprocess.run([*command, *options], capture_output=True, text=True, timeout=60)


def _passes(outcome: subprocess.CompletedProcess[str]) -> None:
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_a_closed_loop_is_swept_and_reported(server: Running, images: Path, tmp_path: Path) -> None:
    result, page = tmp_path / "result.json", tmp_path / "report.html"
    _passes(_loadtest(server.url, images, "--load", "1,4", "--json", str(result), "--html", str(page)))
    report = json.loads(result.read_text())
    assert (report["scenario"], report["unit"], report["images"]) == ("closed-loop", "connections", 10)
    assert report["engine"] == "tiny 1 (fp32, openvino)"
    assert [point["load"] for point in report["points"]] == [1, 4]
    for point in report["points"]:
        assert point["requests"] == point["answered"] > 50
        assert point["errors"] == {}
        assert point["requests_per_s"] == pytest.approx(point["answered"] / point["duration_s"])
        latency = point["latency_ms"]
        assert 0 < latency["p50"] <= latency["p99"] <= latency["max"]
        assert set(point["stages_ms"]) == {"decode", "queue", "inference", "total"}
        assert point["stages_ms"]["total"] < latency["max"]
    text = page.read_text()
    assert text.count("<svg") == 3
    assert "http://" not in text.replace(server.url, ""), "the report must need nothing else"
    for plot in text.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + plot.partition("</svg>")[0] + "</svg>")


@pytest.mark.parametrize(
    ("scenario", "load", "per_request"), [("multi-stream", "1", 8), ("offline", "2", 16)]
)
def test_mlperf_scenarios_send_several_images_a_request(
    server: Running, images: Path, tmp_path: Path, scenario: str, load: str, per_request: int
) -> None:
    result = tmp_path / "result.json"
    _passes(_loadtest(server.url, images, "--scenario", scenario, "--load", load, "--json", str(result)))
    report = json.loads(result.read_text())
    (point,) = report["points"]
    assert report["images_per_request"] == per_request
    assert point["images_per_s"] == pytest.approx(per_request * point["requests_per_s"])
    assert point["errors"] == {}


def test_poisson_arrivals_keep_their_rate(server: Running, images: Path, tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    _passes(_loadtest(server.url, images, "--scenario", "server", "--load", "60", "--json", str(result)))
    (point,) = json.loads(result.read_text())["points"]
    assert 30 <= point["requests"] <= 95  # 60 expected; five standard deviations
    assert point["send_lag_ms"] is not None


@pytest.fixture
def stalling(engine_dir: Path) -> Iterator[tuple[Running, Gate]]:
    gate = Gate()
    with running(Settings(engine="tiny", engine_dir=engine_dir, port=0), load_gated(gate)) as server:
        yield server, gate
        gate.open()


def test_an_open_loop_does_not_hide_a_stall(
    stalling: tuple[Running, Gate], images: Path, tmp_path: Path
) -> None:
    """The server stops for most of a second; requests that would have come meanwhile must be counted."""
    server, gate = stalling
    result = tmp_path / "result.json"
    command = [TRIMRT, "loadtest", "--url", server.url, "--images", str(images), "--scenario", "server"]
    options = ["--load", "50", "--warmup", "0", "--duration", "2", "--json", str(result)]
    process = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL)
    registry = server.service.telemetry
    while sum(registry.requests.values()) < 5:
        assert process.poll() is None
    gate.close()
    gate.wait_for_arrivals(1)
    stalled = time.monotonic()
    while time.monotonic() < stalled + 0.8:  # the stall itself, so a time and not a state
        assert process.poll() is None
    gate.open()
    assert process.wait(30) == 0
    (point,) = json.loads(result.read_text())["points"]
    assert point["latency_ms"]["p90"] > 400, "a closed loop would have seen one slow request"
    assert point["latency_ms"]["max"] >= 790


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--p99-ms", "0.001"], r"p99 is [\d.]+ ms"),
        (["--min-rps", "1000000"], r"[\d.]+ requests/s, the least is 1e\+06"),
    ],
)
def test_a_missed_threshold_is_the_exit_code(
    server: Running, images: Path, options: list[str], complaint: str
) -> None:
    outcome = _loadtest(server.url, images, "--load", "2", *options)
    assert outcome.returncode == 1
    assert re.search(f"missed at load 2: {complaint}", " ".join(outcome.stdout.split()))


def test_mistakes_are_said_before_anything_is_sent(server: Running, images: Path, tmp_path: Path) -> None:
    nobody = _loadtest("http://127.0.0.1:9", images)
    assert nobody.returncode == 1
    assert "does not answer" in nobody.stderr
    assert "`trimrt serve` starts a server" in nobody.stderr
    (tmp_path / "empty").mkdir()
    assert "no images in" in _loadtest(server.url, tmp_path / "empty").stderr
    assert "404 engine-not-found" in _loadtest(server.url, images, "--engine", "nobody").stderr
    assert "is not a list of numbers" in _loadtest(server.url, images, "--load", "many").stderr


def _point(**changes: object) -> Point:
    base = {
        "load": 8,
        "duration_s": 10,
        "requests": 1000,
        "answered": 990,
        "errors": {"429 queue-full": 10},
        "requests_per_s": 99,
        "images_per_s": 99,
        "latency_ms": Latencies.of([n / 1000 for n in range(1, 101)]),
    }
    return Point.model_validate(base | changes)


def test_thresholds() -> None:
    assert _point().latency_ms.p99 == pytest.approx(99)
    assert Thresholds(p99_ms=99.1, min_rps=99, max_errors=0.01).missed([_point()]) == []
    assert len(Thresholds(p99_ms=98, min_rps=100, max_errors=0.009).missed([_point()])) == 3
    silent = _point(answered=0, latency_ms=Latencies.of([]))
    assert Thresholds(p99_ms=98).missed([silent]) == ["at load 8: nothing was answered, the limit is 98 ms"]


def test_images_are_found_and_sent_in_turn(images: Path) -> None:
    found = find_images(images)
    assert len(found) == 10
    bodies = make_bodies(found, 1)
    sent = [next(bodies) for _ in range(20)]
    assert sent[:10] == sent[10:]
    assert {body.content_type for body in sent} == {"image/png", "image/jpeg"}


def test_reasons() -> None:
    assert reason_of(429, b'{"type": "urn:trimrt:problem:queue-full"}') == "429 queue-full"
    assert reason_of(502, b"<html>") == "502"
    assert reason_of(502, b"[]") == "502"
