"""Tables fit a terminal of 80 columns, whatever the names and however large the numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from rich.console import Console
from tiny_engine import write_package

from builder.compile.packages import Package
from models.card import Card, read_card
from models.pretrained import DIGITS_STUDENT
from runtime.manifest import MANIFEST_NAME, Evidence, Manifest, read_manifest
from runtime.profiling import Layer
from trimrt.bench.command import EngineReport, Report, _print
from trimrt.bench.timing import PERCENTILES, Timing
from trimrt.compress import _print_table
from trimrt.display import Display
from trimrt.loadtest.command import _print as print_loads
from trimrt.loadtest.results import Latencies, Point
from trimrt.loadtest.results import Report as LoadReport

LONG = "photographs-of-the-garden-in-all-seasons-efficientnet_v2_l"
SLOW, FAST = 98765.4321, 1234567.8


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")


def fits(text: str) -> str:
    """`text`, once its lines are known to be short and to have lost nothing."""
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert "…" not in text
    return text


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    evidence = Evidence(
        image_set=f"{LONG}-validation",
        images=123456,
        reference_top1=1.0,
        engine_top1=1.0,
        label_agreement=1.0,
        max_logit_difference=SLOW,
        latency_ms=SLOW,
        throughput=FAST,
        weights_bytes=1_234_567_890,
    )
    manifest = read_manifest(write_package(tmp_path))
    provenance = manifest.provenance.model_copy(update={"int8_share": 1.0})
    return manifest.model_copy(
        update={
            "name": f"{LONG}-int8-dynamic-openvino",
            "precision": "int8-dynamic",
            "evidence": evidence,
            "provenance": provenance,
            "labels": [f"label {number}" for number in range(1000)],
        }
    )


def test_of_a_build(manifest: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    display._packages.append(Package(Path(LONG), manifest, (), None))
    display.note_evidence()
    said = fits(capsys.readouterr().err)
    assert "int8-dynamic" in said
    assert "1,234,568" in said


def test_of_inspect(manifest: Manifest, tmp_path: Path, trimrt: Callable[..., Result]) -> None:
    package = tmp_path / "tiny-v1"
    (package / MANIFEST_NAME).write_text(manifest.model_dump_json())
    said = fits(trimrt("inspect", package).output)
    assert "1,000: label 0, label 1, label 2, ... label 999" in said
    everything = fits(trimrt("inspect", package, "--labels").output)
    assert "label 500" in " ".join(everything.split())


def test_of_bench(capsys: pytest.CaptureFixture[str]) -> None:
    timing = Timing(
        batch=1024,
        runs=1,
        throughput=FAST,
        mean_ms=SLOW,
        min_ms=SLOW,
        max_ms=SLOW,
        percentiles_ms={f"p{share}": SLOW for share in PERCENTILES},
        device_ms={"copy in": SLOW, "compute": SLOW, "copy out": SLOW},
    )
    layers = [
        Layer(
            name=f"network/node_Conv_2{number}/WithoutBiases",
            kind="Convolution",
            kernel="brgconv_avx512_amx_1x1_I8",
            mean_ms=SLOW,
        )
        for number in range(2)
    ]
    engine = EngineReport(
        engine=LONG, name=LONG, backend="tensorrt", precision="fp16", slots=1, timings=[timing], layers=layers
    )
    _print(Report(seconds=1, engines=[engine, engine]), Console())
    said = fits(capsys.readouterr().out)
    assert "1234567.8" in said
    assert "node_Conv_20" in said


def test_of_a_load_test(capsys: pytest.CaptureFixture[str]) -> None:
    points = [
        Point(
            load=load,
            duration_s=1,
            requests=1,
            answered=12_345_678,
            errors={"429": 123_456},
            requests_per_s=123456.7,
            images_per_s=123456.7,
            latency_ms=Latencies.of([SLOW / 1000]),
        )
        for load in (1, 4096)
    ]
    print_loads(
        LoadReport(
            scenario="closed-loop",
            unit="connections",
            url="http://127.0.0.1:8000",
            engine="tiny",
            images=1,
            images_per_request=1,
            started_at="",
            points=points,
        )
    )
    assert "12345678" in fits(capsys.readouterr().out)


def test_of_a_compression(capsys: pytest.CaptureFixture[str]) -> None:
    class Run:
        folder = Path("runs")
        checkpoint = folder / "pruned"

        @property
        def cards(self) -> Iterator[Card]:
            card = read_card(DIGITS_STUDENT)
            metrics = card.metrics.model_copy(update={"parameters": 632_045_800, "macs": 167_295_000_000})
            card = card.model_copy(update={"name": LONG, "metrics": metrics})
            roles = ("teacher", "student", "pruned")
            return [card.model_copy(update={"role": role}) for role in roles]  # type: ignore[return-value]

    _print_table(Console(), Run())  # type: ignore[arg-type]
    assert "632.046 M" in fits(capsys.readouterr().out)
