"""The `README.md` of an exported model: how to serve it, and how to ask it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from runtime.manifest import Manifest
from trimrt.export_triton.config import MAX_QUEUE, TIMEOUT_MS, Backend, forms_batches

_README: Final = """\
# {name}

{precision} classifier of {classes} classes, exported from a TrimRT engine package (version {version}, see
`manifest.json`). Exporting it again replaces this folder.

## Serve it

    {command}

in this folder; Triton gets the one it is in, the model repository.

{backend}

{batching}

## Ask it

Triton takes pixels, not image files: preprocessing cannot ride in a compiled engine. An image is decoded,
turned as its EXIF orientation says, converted to RGB, resized (antialiased) until its shorter side has
{resize} pixels, and cropped from the centre to {height} rows and {width} columns, `uint8` in NHWC order.
Cast and normalisation are inside the engine. TrimRT's own preprocessing is what the network was trained and
measured with; another's resize costs accuracy. In this folder:

```python
from pathlib import Path

import tritonclient.http as triton  # pip install tritonclient[http]

from models.preprocessing import load_pixels  # these two come with TrimRT
from runtime.manifest import read_manifest

manifest = read_manifest(Path("."))
pixels = load_pixels(Path("image.jpg").read_bytes(), manifest.preprocessing)[None]

images = triton.InferInput({input}, pixels.shape, "UINT8")
images.set_data_from_numpy(pixels)
top = triton.InferRequestedOutput({output}, class_count={top})
client = triton.InferenceServerClient("localhost:8000")
answer = client.infer("{name}", [images], outputs=[top])
for line in answer.as_numpy({output}).ravel():
    print(line.decode())  # probability:index:label
```
"""

_BACKENDS: Final[Mapping[Backend, str]] = {
    "tensorrt": """\
`RELEASE` is the Triton release that has TensorRT {version}, by NVIDIA's support matrix; for Jetson the images
end in `-py3-igpu`. The plan loads on what it was built for: {gpu}.""",
    "openvino": """\
Triton compiles the graph when it loads it. On processors with BF16 its OpenVINO backend computes FP32 graphs
in BF16, and has no setting for it; TrimRT computes them in FP32, which is what was measured.""",
    "onnxruntime": """\
Triton runs the graph with ONNX Runtime. TrimRT measured it with OpenVINO, so expect a slightly different
accuracy and another speed.""",
}

_BATCHING: Final = """\
Triton batches up to {max} images. While `max_queue_delay_microseconds` is 0 it waits for nothing; more of it
buys throughput with latency. A request that finds {queue} others waiting, or has waited {timeout:g} s, is
rejected."""

_NO_BATCHING: Final = """\
Triton forms no batches of this model. It runs what a client sends, {sizes} in a request; with several,
`class_count` cannot be used."""


def write_readme(manifest: Manifest, backend: Backend) -> str:
    """The text, in Markdown."""
    batch, machine, spec = manifest.batch, manifest.compatibility, manifest.preprocessing
    batching = _BATCHING if forms_batches(manifest, backend) else _NO_BATCHING
    return _README.format(
        name=manifest.name,
        version=manifest.version,
        precision=manifest.precision.upper(),
        classes=len(manifest.labels),
        command=_command(manifest, backend),
        backend=_BACKENDS[backend].format(
            version=manifest.backend_version, gpu=machine.gpu_name or "the builder's GPU"
        ),
        batching=batching.format(
            max=batch.max,
            queue=MAX_QUEUE,
            timeout=TIMEOUT_MS / 1000,
            sizes=f"{batch.max} images" if batch.min == batch.max else f"{batch.min} to {batch.max} images",
        ),
        resize=spec.resize,
        height=spec.height,
        width=spec.width,
        input=json.dumps(manifest.input.name),
        output=json.dumps(manifest.outputs[-1].name),
        top=min(3, len(manifest.labels)),
    )


def _command(manifest: Manifest, backend: Backend) -> str:
    gpu, release = (" --gpus all", "RELEASE") if backend == "tensorrt" else ("", "YY.MM")
    command = f'docker run --rm{gpu} -p 8000:8000 -v "$PWD/..:/models:ro"'
    command += f" nvcr.io/nvidia/tritonserver:{release}-py3 tritonserver --model-repository=/models"
    if manifest.compatibility.version_compatible:  # it carries code for the CPU
        command += " --backend-config=tensorrt,version-compatible=true"
    return command
