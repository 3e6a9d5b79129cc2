"""mosec: worker processes behind a Rust HTTP server; the files of a batch go to one of them."""

from typing import Any

from classifier import MAX_BATCH, PORT, WORKERS, Classifier
from mosec import Server, Worker


class Classify(Worker):
    """Decodes and infers a batch; one process for each core."""

    def __init__(self) -> None:
        self.classifier = Classifier(threads=1)

    def deserialize(self, data: bytes) -> bytes:
        """The body is the file."""
        return data

    def forward(self, data: list[bytes]) -> list[dict[str, Any]]:
        """One answer a file; mosec writes it as JSON."""
        return self.classifier.classify(data)


if __name__ == "__main__":
    import sys

    sys.argv[1:] = ["--address", "127.0.0.1", "--port", str(PORT), "--log-level", "warning"]
    server = Server()
    server.append_worker(Classify, num=WORKERS, max_batch_size=MAX_BATCH, max_wait_time=1)
    server.run()
