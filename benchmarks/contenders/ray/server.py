"""Ray Serve: a proxy in front of replicas, each with `serve.batch`."""

import asyncio
import signal
from typing import Any

import ray
from classifier import MAX_BATCH, PORT, WORKERS, Classifier
from ray import serve
from starlette.requests import Request


@serve.deployment(num_replicas=WORKERS, max_ongoing_requests=64, ray_actor_options={"num_cpus": 1})
class Classify:
    """Decodes and infers whole batches; one replica for each core."""

    def __init__(self) -> None:
        self.classifier = Classifier(threads=1)

    @serve.batch(max_batch_size=MAX_BATCH, batch_wait_timeout_s=0.001)
    async def classify(self, files: list[bytes]) -> list[dict[str, Any]]:
        """One answer a file."""
        return await asyncio.to_thread(self.classifier.classify, files)

    async def __call__(self, request: Request) -> dict[str, Any]:
        """The body is the file."""
        return await self.classify(await request.body())


if __name__ == "__main__":
    ray.init(num_cpus=WORKERS, include_dashboard=False, logging_level="WARNING", log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(Classify.bind())
    signal.pause()
