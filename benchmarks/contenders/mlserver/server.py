"""MLServer: the event loop decodes in threads; adaptive batching in front of `predict`."""

import asyncio
from typing import Any

import numpy as np
from classifier import MAX_BATCH, PORT, Classifier
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.handlers.custom import custom_handler
from mlserver.types import InferenceRequest, InferenceResponse
from starlette.requests import Request
from starlette.responses import Response
import orjson


class Classify(MLModel):
    """A runtime with a route that takes the file as it is."""

    async def load(self) -> bool:
        self.classifier = Classifier(threads=2, streams=2)
        return True

    @custom_handler(rest_path="/classify")
    async def classify(self, request: Request) -> Response:
        """The body is the file."""
        image = await asyncio.to_thread(self.classifier.preprocess, await request.body())
        tensor = NumpyCodec.encode_input("image", image[None])
        answer = (await self.predict(InferenceRequest(inputs=[tensor]))).outputs[0]
        return Response(StringCodec.decode_output(answer)[0], media_type="application/json")

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """One answer an image of the batch."""
        images = NumpyCodec.decode_input(payload.inputs[0])
        answers = await asyncio.to_thread(self.classifier.infer, list(images))
        output = StringCodec.encode_output("answer", [orjson.dumps(answer).decode() for answer in answers])
        return InferenceResponse(model_name=self.name, outputs=[output])


if __name__ == "__main__":
    settings = Settings(
        host="127.0.0.1",
        http_port=PORT,
        grpc_port=PORT + 1,
        metrics_endpoint=None,
        parallel_workers=0,
        debug=False,
    )
    model = ModelSettings(
        name="classify", implementation=Classify, max_batch_size=MAX_BATCH, max_batch_time=0.001
    )
    asyncio.run(MLServer(settings).start([model]))
