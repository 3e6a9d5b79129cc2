"""LitServe: uvicorn in front, worker processes that batch from a queue."""

from typing import Annotated, Any

import litserve
from classifier import MAX_BATCH, PORT, WORKERS, Classifier
from fastapi import Body


class Classify(litserve.LitAPI):
    """Decodes in `decode_request`, which LitServe runs in the worker, then infers the batch."""

    def setup(self, device: str) -> None:
        """Called once in each worker."""
        self.classifier = Classifier(threads=1)

    def decode_request(self, request: Annotated[bytes, Body(media_type="image/jpeg")]) -> Any:
        """The body is the file."""
        return self.classifier.preprocess(request)

    def batch(self, inputs: list[Any]) -> list[Any]:
        """The classifier stacks by itself."""
        return inputs

    def predict(self, x: list[Any]) -> list[dict[str, Any]]:
        """One answer an image."""
        return self.classifier.infer(x)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Already a list."""
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """LitServe writes it as JSON."""
        return output


if __name__ == "__main__":
    server = litserve.LitServer(
        Classify(max_batch_size=MAX_BATCH, batch_timeout=0.001),
        accelerator="cpu",
        workers_per_device=WORKERS,
    )
    server.run(host="127.0.0.1", port=PORT, generate_client_file=False, log_level="warning", access_log=False)
