"""Errors a client sees: `application/problem+json` (RFC 9457) with stable types.

`type` is `urn:trimrt:problem:` and the name below; programs should tell errors apart by it. `detail`
is for people and may change.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import orjson
from starlette.responses import Response

from models.preprocessing import ImageError

MEDIA_TYPE: Final = "application/problem+json"
_TYPE_PREFIX: Final = "urn:trimrt:problem:"

# name: (HTTP status, title)
PROBLEMS: Final[Mapping[str, tuple[int, str]]] = {
    "image-damaged": (400, "Not an image, or a damaged one"),
    "malformed-request": (400, "The request cannot be parsed"),
    "unauthorized": (401, "The API key is missing or wrong"),
    "forbidden": (403, "Not allowed from here"),
    "not-found": (404, "No such resource"),
    "engine-not-found": (404, "No such engine"),
    "method-not-allowed": (405, "The method is not allowed here"),
    "body-timeout": (408, "The body did not arrive in time"),
    "engine-refused": (409, "The engine package is refused"),
    "engine-in-use": (409, "The engine is in use"),
    "engine-not-proven": (409, "The engine has not proved itself"),
    "body-too-large": (413, "The body is too large"),
    "image-too-large": (413, "The image is too large"),
    "too-many-images": (413, "Too many images in one request"),
    "unsupported-media-type": (415, "This type of content is not accepted"),
    "invalid-parameter": (422, "A parameter is missing or out of range"),
    "upgrade-required": (426, "A WebSocket is wanted here"),
    "queue-full": (429, "The queue is full"),
    "rate-limited": (429, "Too many images a second"),
    "head-too-large": (431, "The head is too large"),
    "internal-error": (500, "The server failed"),
    "inference-failed": (500, "The engine failed"),
    "coding-not-supported": (501, "The transfer coding is not supported"),
    "not-supported": (501, "Not supported"),
    "not-ready": (503, "The server is not ready"),
    "deadline-exceeded": (504, "The deadline passed"),
    "version-not-supported": (505, "The HTTP version is not supported"),
}


class Problem(Exception):  # noqa: N818 - RFC 9457's word
    """An error answer.

    Args:
        name: a key of `PROBLEMS`.
        detail: what happened and what to do, safe to show a client.
        headers: further response headers.
        extra: further members of the problem object.
    """

    def __init__(
        self,
        name: str,
        detail: str,
        *,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(detail)
        self.name = name
        self.status, self.title = PROBLEMS[name]
        self.detail = detail
        self.headers = dict(headers or {})
        self.extra = dict(extra or {})

    def __reduce__(self) -> tuple[Any, ...]:  # an exception's arguments by name are lost on pickle
        return partial(Problem, headers=self.headers, extra=self.extra), (self.name, self.detail)

    def body(self) -> bytes:
        """The problem object, in JSON."""
        said = {"title": self.title, "status": self.status, "detail": self.detail}
        return orjson.dumps({"type": _TYPE_PREFIX + self.name, **said, **self.extra})

    def response(self) -> Response:
        """This problem as an HTTP response."""
        return Response(self.body(), self.status, self.headers, MEDIA_TYPE)


def internal_error() -> Problem:
    """The problem that a mistake of the server's is."""
    return Problem("internal-error", "the server failed; its log says why")


def image_problem(error: ImageError, index: int) -> Problem:
    """The problem that image number `index` of a request is."""
    return Problem(error.problem, str(error), extra={"image": index})


PROBLEM_SCHEMA: Final[dict[str, Any]] = {
    "type": "object",
    "description": "RFC 9457 problem details",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string", "enum": [_TYPE_PREFIX + name for name in PROBLEMS]},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
    },
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI `responses` for the problems that answer with one of `statuses`."""
    return {
        status: {
            "description": "; ".join(title for code, title in PROBLEMS.values() if code == status),
            "content": {MEDIA_TYPE: {"schema": PROBLEM_SCHEMA}},
        }
        for status in statuses
    }
