"""The requests that are sent: images from a folder, in turn, as raw bodies or several to a form."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import orjson

from models.errors import TrimRTError

MEDIA_TYPES: Final = {
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".png": "image/png",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".bmp": "image/bmp",
    ".tif": "image/tiff",
    ".tiff": "image/tiff",
    ".heic": "image/heic",
    ".avif": "image/avif",
}


class LoadTestError(TrimRTError):
    """The test cannot be run; the message says why and what to do."""


@dataclass(frozen=True)
class Body:
    """One request's body."""

    data: bytes
    content_type: str


def find_images(folder: Path, most: int = 1000) -> list[Path]:
    """The images under `folder`, or `folder` itself if it is one; at most so many of them.

    Raises:
        LoadTestError: there are none.
    """
    files = [folder] if folder.is_file() else sorted(folder.rglob("*"))
    images = [file for file in files if file.suffix.lower() in MEDIA_TYPES]
    if not images:
        raise LoadTestError(f"no images in {folder} ({', '.join(MEDIA_TYPES)})")
    return images[:most]


def make_bodies(images: list[Path], images_per_request: int) -> Iterator[Body]:
    """Requests without end, with the images in turn."""
    if images_per_request == 1:
        bodies = [Body(path.read_bytes(), MEDIA_TYPES[path.suffix.lower()]) for path in images]
    else:
        count = max(1, len(images) // images_per_request)
        turn = itertools.cycle(images)
        bodies = [_form([next(turn) for _ in range(images_per_request)]) for _ in range(count)]
    return itertools.cycle(bodies)


def _form(images: list[Path]) -> Body:
    files = [
        ("file", (f"{number}{path.suffix}", path.read_bytes(), MEDIA_TYPES[path.suffix.lower()]))
        for number, path in enumerate(images)
    ]
    request = httpx.Request("POST", "http://server/predict", files=files)
    return Body(request.read(), request.headers["Content-Type"])


def reason_of(status: int, body: bytes) -> str:
    """Why a request was not answered: its problem's name, or its status."""
    try:
        return f"{status} {orjson.loads(body)['type'].rpartition(':')[2]}"
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        return str(status)
