"""Plain FastAPI: no batching, a thread of the pool for each request; one process unless told otherwise."""

import os
from pathlib import Path
from typing import Any

import uvicorn
from classifier import PORT, WORKERS, Classifier
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool

PROCESSES = WORKERS if "BENCHMARK_WORKERS" in os.environ else 1
STREAMS = max(1, (os.cpu_count() or 1) // PROCESSES)

app = FastAPI()
classifier = Classifier(threads=STREAMS, streams=STREAMS)


@app.post("/classify")
async def classify(request: Request) -> dict[str, Any]:
    """The body is the file."""
    return (await run_in_threadpool(classifier.classify, [await request.body()]))[0]


if __name__ == "__main__":
    uvicorn.run(
        "server:app" if PROCESSES > 1 else app,
        app_dir=str(Path(__file__).parent),
        workers=PROCESSES,
        host="127.0.0.1",
        port=PORT,
        log_level="warning",
        access_log=False,
    )
