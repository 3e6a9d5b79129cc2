"""Plain FastAPI: no batching, a thread of the pool for each request."""

from typing import Any

import uvicorn
from classifier import PORT, Classifier
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool

app = FastAPI()
classifier = Classifier(threads=2, streams=2)


@app.post("/classify")
async def classify(request: Request) -> dict[str, Any]:
    """The body is the file."""
    return (await run_in_threadpool(classifier.classify, [await request.body()]))[0]


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=PORT, log_level="warning", access_log=False)
