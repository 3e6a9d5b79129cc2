"""What a replica tells Ray's metrics: the series of `/metrics` that requests make, named the same.

Ray exports them from every node, with `ray_` before the name and with the labels `application`,
`deployment` and `replica`.
"""

from __future__ import annotations

from typing import Final

from ray.serve.metrics import Counter, Histogram

from server.telemetry import Ended, EngineKey

_SECONDS: Final = [1e-4 * 2**power for power in range(17)]  # 0.1 ms to 6.6 s
_SIZES: Final = [1 << power for power in range(9)]


class ReplicaMetrics:
    """A `RequestObserver` that counts into Ray's metrics."""

    def __init__(self) -> None:
        engine = EngineKey._fields
        self._requests = Counter(
            "trimrt_requests",
            "Inference requests, by how they ended.",
            tag_keys=("protocol", "outcome", "reason"),
        )
        self._stages = Histogram(
            "trimrt_stage_duration_seconds",
            "Time of one image in each stage.",
            boundaries=_SECONDS,
            tag_keys=(*engine, "stage"),
        )
        self._sizes = Histogram(
            "trimrt_image_batch_size",
            "Images in the batch that an image rode in.",
            boundaries=_SIZES,
            tag_keys=engine,
        )

    def record(self, request: Ended) -> None:
        """See `RequestObserver`."""
        self._requests.inc(tags=request.key._asdict())
        if request.manifest is None:
            return
        engine = EngineKey.of(request.manifest)._asdict()
        for result in request.results:
            for stage in ("decode", "queue", "inference", "total"):
                self._stages.observe(getattr(result, stage), {**engine, "stage": stage})
            for stage, seconds in result.device.items():
                self._stages.observe(seconds, {**engine, "stage": stage})
            self._sizes.observe(result.batch_size, engine)

    def close(self) -> None:
        """See `RequestObserver`."""
