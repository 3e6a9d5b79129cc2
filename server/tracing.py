"""OpenTelemetry traces: one span a request, one a stage, in the caller's W3C trace.

Only imported when an endpoint is configured; needs the extra `otel`.
"""

from __future__ import annotations

import time

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.telemetry import Ended, Sampling
from server.version import VERSION


class Tracer:
    """Exports spans over OTLP/HTTP, from a thread of its own.

    Args:
        endpoint: the collector's address.
        sampling: which requests leave a trace.
    """

    def __init__(self, endpoint: str, sampling: Sampling) -> None:
        self._sampling = sampling
        exporter = OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces")
        resource = Resource.create({"service.name": "trimrt", "service.version": VERSION})
        self._provider = TracerProvider(resource=resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("trimrt", VERSION)
        self._propagator = TraceContextTextMapPropagator()

    def record(self, request: Ended) -> None:
        """Export a span of the request, in its `traceparent`'s trace if any, and one for each image's stages.

        See `RequestObserver`.
        """
        if not self._sampling.takes():
            return
        epoch = time.time_ns() - int(time.monotonic() * 1e9)

        def at(seconds: float) -> int:
            return epoch + int(seconds * 1e9)

        context = self._propagator.extract(request.caller().headers)
        span = self._tracer.start_span(
            request.key.protocol, context, trace.SpanKind.SERVER, start_time=at(request.began)
        )
        span.set_attribute("trimrt.images", len(request.results))
        manifest = request.manifest
        if manifest is not None:
            span.set_attributes({"trimrt.engine": manifest.name, "trimrt.precision": manifest.precision})
        if request.key.reason:
            span.set_status(trace.StatusCode.ERROR, request.key.reason)
        inside = trace.set_span_in_context(span)
        for number, result in enumerate(request.results):
            for stage, begin, end in result.stages():
                child = self._tracer.start_span(stage, inside, start_time=at(begin))
                child.set_attributes({"trimrt.image": number, "trimrt.batch_size": result.batch_size})
                child.end(at(end))
        span.end(at(time.monotonic()))

    def close(self) -> None:
        """Export what is left."""
        self._provider.shutdown()
