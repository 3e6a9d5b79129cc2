"""BentoML: worker processes, each with a pool of threads for its calls."""

import os
from pathlib import Path
from typing import Annotated, Any

import bentoml
from bentoml.validators import ContentType
from classifier import PORT, WORKERS, Classifier
from PIL.Image import Image


@bentoml.service(
    workers=WORKERS,
    threads=4,
    http={"host": "127.0.0.1", "port": PORT},
    logging={"access": {"enabled": False}},
)
class Classify:
    """Decodes and infers one image a call."""

    def __init__(self) -> None:
        self.classifier = Classifier(threads=1)

    @bentoml.api
    def classify(self, image: Annotated[Image, ContentType("image/jpeg")], /) -> dict[str, Any]:
        """The body is the file, which BentoML opens with Pillow but does not decode yet."""
        image.fp.seek(0)
        return self.classifier.classify([image.fp.read()])[0]


if __name__ == "__main__":
    folder = str(Path(__file__).parent)
    os.execlp("bentoml", "bentoml", "serve", "server:Classify", "--working-dir", folder)
