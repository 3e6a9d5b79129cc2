"""`GET /metrics`: what was counted, in Prometheus's text format."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from runtime.devices import Device, Reading
from server.counts import Counts
from server.telemetry import EngineKey
from server.version import VERSION

_ENGINE_LABELS = EngineKey._fields
_PROCESS_LEAST = ("process_start_time_seconds", "process_max_fds")  # of several processes; all else adds up


class _CountsCollector(Collector):
    def __init__(self, counts: Counts, readings: Sequence[tuple[str, Reading]]) -> None:
        self._counts = counts
        self._readings = readings

    def collect(self) -> Iterator[Metric]:
        yield from self._processes()
        yield from self._requests()
        yield from self._engines()
        yield from self._engine_stats()
        yield from self._predictions()
        yield from self._cache()
        yield from self._shadows()
        yield from self._device_readings()

    def _processes(self) -> Iterator[Metric]:
        """`process_*` of all processes together."""
        found: dict[str, list[Metric]] = {}
        for process in self._counts.processes:
            for metric in ProcessCollector(pid=partial(int, process), registry=None).collect():
                found.setdefault(metric.name, []).append(metric)
        for metrics in found.values():
            combine = min if metrics[0].samples[0].name in _PROCESS_LEAST else sum
            value = combine(metric.samples[0].value for metric in metrics)
            metrics[0].samples = [metrics[0].samples[0]._replace(value=value)]
            yield metrics[0]

    def _predictions(self) -> Iterator[Metric]:
        labels = CounterMetricFamily(
            "trimrt_predictions", "Images by their likeliest label.", labels=(*_ENGINE_LABELS, "label")
        )
        confidence = HistogramMetricFamily(
            "trimrt_confidence", "Probability of an image's likeliest label.", labels=_ENGINE_LABELS
        )
        drift = GaugeMetricFamily(
            "trimrt_drift",
            "Population stability index of the recent images beside the validation images.",
            labels=(*_ENGINE_LABELS, "of"),
        )
        for key, stats in self._counts.engines.items():
            if (predictions := stats.predictions) is None:
                continue
            for label, count in predictions.by_label().items():
                labels.add_metric((*key, label), count)
            confidence.add_metric(key, predictions.cumulative(), predictions.sum)
            for of, index in predictions.drift().items():
                drift.add_metric((*key, of), index)
        yield from (labels, confidence, drift)

    def _cache(self) -> Iterator[Metric]:
        if self._counts.cache is None:
            return
        images = CounterMetricFamily(
            "trimrt_cache_images",
            "Images that were looked for among the answers kept from before.",
            labels=(*_ENGINE_LABELS, "outcome"),
        )
        for key, stats in self._counts.engines.items():
            images.add_metric((*key, "hit"), stats.hits)
            images.add_metric((*key, "miss"), stats.misses)
        held = self._counts.cache
        yield images
        yield GaugeMetricFamily("trimrt_cache_bytes", "Memory of the answers kept.", held.bytes)
        yield GaugeMetricFamily("trimrt_cache_limit_bytes", "What they may take.", held.limit)

    def _shadows(self) -> Iterator[Metric]:
        images = CounterMetricFamily(
            "trimrt_shadow_images",
            "Images of a shadow engine, by what became of them.",
            labels=(*_ENGINE_LABELS, "of", "outcome"),
        )
        difference = CounterMetricFamily(
            "trimrt_shadow_difference",
            "Sum of the differences in the probability of the label that was answered.",
            labels=(*_ENGINE_LABELS, "of"),
        )
        for key, (of, _, counts) in self._counts.shadows.items():
            images.add_metric((*key, of, "agreed"), counts.agreed)
            images.add_metric((*key, of, "disagreed"), counts.compared - counts.agreed)
            images.add_metric((*key, of, "dropped"), counts.dropped)
            images.add_metric((*key, of, "failed"), counts.failed)
            difference.add_metric((*key, of), counts.difference)
        yield from (images, difference)

    def _device_readings(self) -> Iterator[Metric]:
        families: dict[str, GaugeMetricFamily] = {}
        for device, reading in self._readings:
            name = f"trimrt_device_{reading.quantity}"
            family = families.setdefault(
                name, GaugeMetricFamily(name, "As the accelerator reports it.", labels=("device", "sensor"))
            )
            family.add_metric((device, reading.sensor), reading.value)
        yield from families.values()

    def _requests(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "trimrt_requests",
            "Inference requests, by how they ended.",
            labels=("protocol", "outcome", "reason"),
        )
        for key, count in self._counts.requests.items():
            requests.add_metric(key, count)
        yield requests
        yield GaugeMetricFamily(
            "trimrt_requests_in_flight", "Inference requests now served.", self._counts.in_flight
        )
        yield GaugeMetricFamily("trimrt_workers", "Processes that serve.", len(self._counts.processes))
        yield CounterMetricFamily(
            "trimrt_workers_replaced",
            "Processes that ended unasked and were replaced.",
            self._counts.replaced,
        )
        yield CounterMetricFamily(
            "trimrt_requests_lost", "Inference requests that those had in hand.", self._counts.lost
        )
        yield InfoMetricFamily("trimrt_build", "The server's version.", {"version": VERSION})

    def _engines(self) -> Iterator[Metric]:
        info = GaugeMetricFamily(
            "trimrt_engine_info", "1 for every loaded engine.", labels=(*_ENGINE_LABELS, "default")
        )
        depth = GaugeMetricFamily(
            "trimrt_queue_depth", "Images admitted and not yet answered.", labels=("engine",)
        )
        limit = GaugeMetricFamily(
            "trimrt_queue_limit", "Most images that may have to run for a request.", labels=("engine",)
        )
        lost = GaugeMetricFamily(
            "trimrt_engine_lost", "1 if the engine fails on every batch.", labels=("engine",)
        )
        for key, queue in self._counts.queues.items():
            info.add_metric((*key, str(key.engine == self._counts.default).lower()), 1)
            depth.add_metric((key.engine,), queue.pending)
            limit.add_metric((key.engine,), queue.limit)
            lost.add_metric((key.engine,), queue.lost)
        yield from (info, depth, limit, lost)

    def _engine_stats(self) -> Iterator[Metric]:
        stages = HistogramMetricFamily(
            "trimrt_stage_duration_seconds",
            "Time of one image in each stage.",
            labels=(*_ENGINE_LABELS, "stage"),
        )
        sizes = HistogramMetricFamily("trimrt_batch_size", "Images in a batch.", labels=_ENGINE_LABELS)
        dropped = CounterMetricFamily(
            "trimrt_images_dropped",
            "Images whose request expired or was cancelled before its answer.",
            labels=(*_ENGINE_LABELS, "reason"),
        )
        failed = CounterMetricFamily(
            "trimrt_images_failed", "Images that the engine failed on.", labels=_ENGINE_LABELS
        )
        for key, stats in self._counts.engines.items():
            failed.add_metric(key, stats.failed)
            for stage, distribution in stats.stages.items():
                total = distribution.total
                buckets = [(f"{bound:.4g}", float(count)) for bound, count in total.cumulative()]
                stages.add_metric((*key, stage), [*buckets, ("+Inf", total.count)], total.sum)
            sizes.add_metric(key, *_size_buckets(stats.batches))
            for reason, count in stats.dropped.items():
                dropped.add_metric((*key, reason), count)
        yield from (stages, sizes, dropped, failed)


def _size_buckets(batches: dict[int, int]) -> tuple[list[tuple[str, float]], float]:
    bounds = [1 << i for i in range(9)]
    buckets = [
        (f"{bound}.0", float(sum(n for size, n in batches.items() if size <= bound))) for bound in bounds
    ]
    buckets.append(("+Inf", float(sum(batches.values()))))
    return buckets, float(sum(size * n for size, n in batches.items()))


class Metrics:
    """Renders metrics, with what the machine's devices report."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self._devices = devices

    async def render(self, counts: Counts) -> bytes:
        """The text exposition."""
        # Reading sensors may block, on I2C for milliseconds.
        readings = await asyncio.to_thread(_read, self._devices) if self._devices else []
        collectors = CollectorRegistry()
        PlatformCollector(registry=collectors)
        collectors.register(_CountsCollector(counts, readings))
        return generate_latest(collectors)


def _read(devices: Sequence[Device]) -> list[tuple[str, Reading]]:
    return [(device.name, reading) for device in devices for reading in device.read()]
