"""PyTriton: NVIDIA Triton's HTTP server and dynamic batcher in front of Python functions."""

import json
from typing import Any

import numpy as np
from classifier import MAX_BATCH, PORT, Classifier
from numpy.typing import NDArray
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

classifier = Classifier(threads=2, streams=2)


@batch
def classify(image: NDArray[np.object_]) -> dict[str, Any]:
    """One answer a file, as JSON text."""
    answers = classifier.classify(image[:, 0].tolist())
    return {"answer": np.array([[json.dumps(answer).encode()] for answer in answers], np.object_)}


if __name__ == "__main__":
    config = TritonConfig(http_address="127.0.0.1", http_port=PORT, allow_grpc=False, allow_metrics=False)
    with Triton(config=config) as triton:
        triton.bind(
            model_name="classify",
            infer_func=[classify, classify],
            inputs=[Tensor(name="image", dtype=bytes, shape=(1,))],
            outputs=[Tensor(name="answer", dtype=bytes, shape=(1,))],
            config=ModelConfig(
                max_batch_size=MAX_BATCH, batcher=DynamicBatcher(max_queue_delay_microseconds=0)
            ),
            strict=False,
        )
        triton.serve()
