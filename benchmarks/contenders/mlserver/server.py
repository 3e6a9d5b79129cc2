"""MLServer: adaptive batching in front of `predict`, on the event loop's own threads."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

from classifier import MAX_BATCH, PORT, Classifier
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import StringCodec
from mlserver.context import model_context
from mlserver.handlers.custom import custom_handler
from mlserver.types import InferenceRequest, InferenceResponse, RequestInput
from starlette.requests import Request
from starlette.responses import Response


class Classify(MLModel):
    """A runtime with a route that takes the file as it is."""

    async def load(self) -> bool:
        """Called once, on start."""
        self.classifier = Classifier(threads=2)
        self.decoders = ThreadPoolExecutor(2)
        return True

    @custom_handler(rest_path="/classify")
    async def classify(self, request: Request) -> Response:
        """The body is the file."""
        file = RequestInput(name="image", shape=[1, 1], datatype="BYTES", data=[await request.body()])
        with model_context(self.settings):
            response = await self.predict(InferenceRequest(inputs=[file]))
        return Response(StringCodec.decode_output(response.outputs[0])[0], media_type="application/json")

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """One answer a file of the batch."""
        answers = await asyncio.to_thread(self._classify, list(payload.inputs[0].data))
        output = StringCodec.encode_output("answer", answers)
        return InferenceResponse(model_name=self.name, outputs=[output])

    def _classify(self, files: list[bytes]) -> list[str]:
        images = list(self.decoders.map(self.classifier.preprocess, files))
        return [json.dumps(answer) for answer in self.classifier.infer(images)]


if __name__ == "__main__":
    settings = Settings(
        host="127.0.0.1",
        http_port=PORT,
        grpc_port=0,  # any that is free
        metrics_endpoint=None,
        parallel_workers=0,
        debug=False,
    )
    model = ModelSettings(
        name="classify", implementation=Classify, max_batch_size=MAX_BATCH, max_batch_time=0.001
    )
    asyncio.run(MLServer(settings).start([model]))
