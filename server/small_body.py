"""The small JSON bodies of requests that manage the server."""

from __future__ import annotations

import asyncio
from typing import Final, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from server.bodies import body_too_large
from server.problems import Problem

_MOST_BYTES: Final = 4096
_PATIENCE_S: Final = 5.0

Model = TypeVar("Model", bound=BaseModel)


async def read_small(request: Request, model: type[Model], *, empty: bytes = b"") -> Model:
    """The body of `request`, which is not read before this is called; FastAPI would not wait for a key.

    Args:
        request: whose caller has passed.
        model: what the body has to be.
        empty: the JSON that an empty body stands for.

    Raises:
        Problem: `body-timeout`, `body-too-large` or `invalid-parameter`.
    """
    try:
        body = await asyncio.wait_for(_read(request), _PATIENCE_S)
        return model.model_validate_json(body or empty)
    except asyncio.TimeoutError:  # not `TimeoutError`: Python 3.10 has two
        raise Problem("body-timeout", f"the body had not arrived after {_PATIENCE_S:g} s") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["body", *map(str, first["loc"])])
        raise Problem("invalid-parameter", f"{where}: {first['msg']}") from None


async def _read(request: Request) -> bytes:
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > _MOST_BYTES:
            raise body_too_large(_MOST_BYTES)
    return body
