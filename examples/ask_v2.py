"""Send an image to a running server by the Open Inference Protocol (KServe v2), as to any other.

    python examples/ask_v2.py http://127.0.0.1:8000 digits-resnet18-int8-openvino docs/images/7.png

Needs `pip install httpx`.
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import httpx


def main(url: str, engine: str, image: Path) -> None:
    """Print the three most probable classes."""
    file = base64.b64encode(image.read_bytes()).decode()
    request = {
        "inputs": [{"name": "images", "datatype": "BYTES", "shape": [1], "data": [file]}],
        "outputs": [{"name": "probabilities", "parameters": {"classification": 3}}],
    }
    response = httpx.post(f"{url}/v2/models/{engine}/infer", json=request)
    if response.is_error:
        sys.exit(f"{response.status_code}: {response.text}")
    for found in response.json()["outputs"][0]["data"]:
        probability, number, label = found.split(":", 2)
        print(f"{label:>20}  {float(probability):.1%}  (class {number})")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
