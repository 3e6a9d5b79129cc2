"""What the server tells of itself: metrics, percentiles, logs, traces."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from running import Running, running, wait_until

from server.settings import Settings
from trimrt.logs import JsonFormatter, TextFormatter

Encode = Callable[..., bytes]


@pytest.fixture
def fresh(engine_dir: Path) -> Iterator[Running]:
    with running(Settings(engine="tiny", engine_dir=engine_dir, port=0, max_body_bytes=5000)) as it:
        yield it


def _samples(server: Running) -> dict[str, dict[frozenset[tuple[str, str]], float]]:
    samples: dict[str, dict[frozenset[tuple[str, str]], float]] = {}
    for family in text_string_to_metric_families(server.client.get("/metrics").text):
        for sample in family.samples:
            samples.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return samples


def test_metrics_count_requests_stages_and_batches(fresh: Running, encode: Encode) -> None:
    for seed in range(5):
        assert fresh.predict(encode(seed)).status_code == 200
    assert fresh.predict(b"broken").status_code == 400
    assert fresh.predict(b"x" * 5001).status_code == 413
    samples = _samples(fresh)

    def requests(outcome: str, reason: str) -> float:
        labels = {"protocol": "predict", "outcome": outcome, "reason": reason}
        return samples["trimrt_requests_total"][frozenset(labels.items())]

    assert requests("ok", "") == 5
    assert requests("invalid", "image-damaged") == 1
    assert requests("invalid", "body-too-large") == 1
    engine = {"engine": "tiny", "version": "1", "precision": "fp32", "backend": "openvino"}
    for stage in ("decode", "queue", "inference", "total"):
        labels = frozenset({**engine, "stage": stage}.items())
        assert samples["trimrt_stage_duration_seconds_count"][labels] == 5
        assert 0 < samples["trimrt_stage_duration_seconds_sum"][labels] < 5
        assert samples["trimrt_stage_duration_seconds_bucket"][labels | {("le", "+Inf")}] == 5
    assert samples["trimrt_batch_size_sum"][frozenset(engine.items())] == 5
    assert samples["trimrt_queue_depth"][frozenset({("engine", "tiny")})] == 0
    assert samples["trimrt_engine_info"][frozenset({**engine, "default": "true"}.items())] == 1
    assert samples["trimrt_requests_in_flight"][frozenset()] == 0
    assert samples["process_resident_memory_bytes"][frozenset()] > 1e6
    assert next(iter(samples["trimrt_build_info"].values())) == 1


def test_metric_names_have_one_prefix_and_base_units(fresh: Running) -> None:
    families = list(text_string_to_metric_families(fresh.client.get("/metrics").text))
    names = [family.name for family in families if not family.name.startswith(("process_", "python_"))]
    assert len(names) >= 8
    assert all(name.startswith("trimrt_") for name in names)
    assert not [name for name in names if name.endswith(("_ms", "_milliseconds", "_us", "_mb"))]


def test_stats_give_percentiles_since_start_and_lately(fresh: Running, encode: Encode) -> None:
    for seed in range(20):
        fresh.predict(encode(seed))
    stats = fresh.client.get("/stats").json()
    (engine,) = stats["engines"]
    assert (engine["engine"], engine["loaded"], engine["pending"]) == ("tiny", True, 0)
    assert engine["since_start"]["images"] == engine["recent"]["images"] == 20
    total = engine["since_start"]["latency_ms"]["total"]
    assert 0 < total["p50"] <= total["p90"] <= total["p95"] <= total["p99"] <= total["p99_9"]
    assert set(engine["recent"]["latency_ms"]) == {"decode", "queue", "inference", "total"}
    assert fresh.client.get("/stats", params={"window_s": 61}).status_code == 422


def test_stats_of_an_idle_server_have_no_percentiles(fresh: Running) -> None:
    (engine,) = fresh.client.get("/stats").json()["engines"]
    assert engine["recent"]["latency_ms"]["total"]["p99"] is None


def test_the_access_log_has_the_request_id_and_no_image(
    engine_dir: Path, encode: Encode, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trimrt.access")
    image = encode(1)
    with running(Settings(engine="tiny", engine_dir=engine_dir, port=0)) as server:
        caplog.clear()
        server.predict(image, headers={"X-Request-Id": "order-17"})
        wait_until(lambda: [r for r in caplog.records if r.name == "trimrt.access"] != [])
    (record,) = (r for r in caplog.records if r.name == "trimrt.access" and r.path == "/predict")
    line = json.loads(JsonFormatter().format(record))
    assert line.pop("time").endswith("+00:00")
    assert line.pop("duration_ms") > 0
    assert line == {
        "level": "info",
        "logger": "trimrt.access",
        "message": "request",
        "request_id": "order-17",
        "method": "POST",
        "path": "/predict",
        "status": 200,
        "client": "127.0.0.1",
    }
    assert "order-17" in TextFormatter().format(record)


def test_an_exception_is_one_line_of_json() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.LogRecord("trimrt", logging.ERROR, "", 0, "failed: %s", ("why",), sys.exc_info())
    text = JsonFormatter().format(record)
    assert "\n" not in text
    line = json.loads(text)
    assert line["message"] == "failed: why"
    assert "ValueError: two\nlines" in line["exception"]


@pytest.fixture
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """An OTLP/HTTP endpoint: its address, and what it was sent."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", bodies
        server.shutdown()
        thread.join()


def test_a_request_is_traced_stage_by_stage_in_the_callers_trace(
    engine_dir: Path, encode: Encode, collector: tuple[str, list[bytes]]
) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    endpoint, bodies = collector
    trace_id, span_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    settings = Settings(engine="tiny", engine_dir=engine_dir, port=0, otlp_endpoint=endpoint)
    with running(settings) as server:
        server.predict(encode(1), headers={"traceparent": f"00-{trace_id}-{span_id}-01"})
        server.predict(b"broken")
    spans = [
        span
        for body in bodies
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    ours = [span for span in spans if span.trace_id.hex() == trace_id]
    (root,) = (span for span in ours if span.name == "predict")
    assert root.parent_span_id.hex() == span_id
    stages = [span for span in ours if span is not root]
    assert [span.name for span in stages] == [
        "queue for decoding",
        "decode",
        "queue for inference",
        "inference",
    ]
    assert all(span.parent_span_id == root.span_id for span in stages)
    times = [time for span in stages for time in (span.start_time_unix_nano, span.end_time_unix_nano)]
    assert times == sorted(times)
    assert root.start_time_unix_nano <= times[0]
    assert times[-1] <= root.end_time_unix_nano
    (failed,) = (span for span in spans if span.name == "predict" and span.trace_id.hex() != trace_id)
    assert failed.status.message == "image-damaged"
