"""Send an image to a running server (`trimrt serve`) and print its labels and where the time went.

    python examples/post_image.py http://127.0.0.1:8000 docs/images/7.png

Needs `pip install httpx`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import httpx


def main(url: str, image: Path) -> None:
    """Print the answer, or the server's reason for refusing."""
    with image.open("rb") as file:
        response = httpx.post(f"{url}/predict", files={"file": file})  # `?top_k=1` asks for fewer labels
    if response.is_error:
        problem = response.json()  # RFC 9457: `type` for programs, `detail` for people
        sys.exit(f"{response.status_code} {problem['type']}: {problem['detail']}")
    result = response.json()["results"][0]
    for prediction in result["predictions"]:
        print(f"{prediction['label']:>20}  {prediction['probability']:.1%}")
    print(", ".join(f"{stage} {ms} ms" for stage, ms in result["latency_ms"].items()))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
