"""`/stream` for those who do not ask for a WebSocket, and its description; see `server.stream`."""

from __future__ import annotations

from fastapi import APIRouter

from server.problems import Problem, documented
from server.routes.predict import PARAMETERS

router = APIRouter(tags=["inference"])


@router.get(
    "/stream",
    status_code=101,
    responses={101: {"description": "the WebSocket is open"}, **documented(403, 426)},
    openapi_extra={"parameters": PARAMETERS},
)
async def stream() -> None:
    """Classify live video over a WebSocket.

    A binary message is a frame: an image file, as for `/predict`. Each is answered by a text message, in the
    order of the frames: `/predict`'s answer, or a problem object, with two members more: `frame`, its number
    from 0, and `dropped`, how many frames before it were left out because newer ones came.
    """
    raise Problem(
        "upgrade-required",
        "this is for WebSockets (RFC 6455, version 13), straight from the HTTP/1.1 parser of `trimrt serve`; "
        "a proxy in between has to pass on the headers Upgrade and Connection",
        headers={"Upgrade": "websocket", "Sec-WebSocket-Version": "13"},
    )
