"""Who labels the frames: an engine in this process, or a server's `/stream`."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias
from urllib.parse import urlencode

import orjson

from models.errors import TrimRTError
from models.preprocessing import load_pixels
from runtime.engine import Options
from runtime.loading import load_engine
from runtime.ranking import ranked
from runtime.signatures import Trust
from server.stream.handshake import KEY_PREFIX, PROTOCOL

_ANSWER_S: Final = 60.0  # longer than a server's own limit
_ANSWER_BYTES: Final = 32 << 20  # more than an answer of all classes


class StreamError(TrimRTError):
    """The server cannot be reached, or ended the stream."""


class Labelled(NamedTuple):
    """One label of a frame."""

    label: str
    probability: float


Ask: TypeAlias = "Callable[[bytes], list[Labelled] | str]"
"""Takes an image file: its labels, likeliest first, or why there are none. Raises `StreamError`."""


@contextmanager
def open_engine(folder: Path, top_k: int, trust: Trust) -> Iterator[Ask]:
    """Ask the engine package in `folder`, loaded here.

    Raises:
        EngineError: it is refused.
    """
    with (
        closing(load_engine(folder, Options(slots=1, trust=trust))) as engine,
        closing(engine.open_slot()) as slot,
    ):
        manifest = engine.manifest
        count = min(top_k, len(manifest.labels))

        def ask(image: bytes) -> list[Labelled]:
            slot.pixels[0] = load_pixels(image, manifest.preprocessing)
            outputs = slot.infer(max(1, manifest.batch.min), alone=True)
            order = ranked(outputs.logits[:1], count)[0]
            return [Labelled(manifest.labels[it], float(outputs.probabilities[0, it])) for it in order]

        yield ask


@contextmanager
def open_server(url: str, engine: str | None, top_k: int | None, key: str | None) -> Iterator[Ask]:
    """Ask the server at `url`, an HTTP address; `engine` and `top_k` are the server's defaults if None.

    Raises:
        StreamError: it cannot be reached, or refuses.
    """
    from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
    from websockets.sync.client import connect

    scheme, separator, place = url.rstrip("/").partition("://")
    if scheme not in ("http", "https") or not separator:
        raise StreamError(f"{url!r} is no server's address; give one like http://127.0.0.1:8000")
    query = {name: value for name, value in (("engine", engine), ("top_k", top_k)) if value is not None}
    address = f"{scheme.replace('http', 'ws')}://{place}/stream?{urlencode(query)}"
    try:
        socket = connect(address, subprotocols=_offered(key), compression=None, max_size=_ANSWER_BYTES)
    except InvalidStatus as refused:
        raise StreamError(f"{url}: {_told(refused.response.body)}") from None
    except (OSError, ValueError, WebSocketException) as error:  # the second: no such port, no such IPv6
        raise StreamError(f"no stream from {url}: {error}") from error

    def ask(image: bytes) -> list[Labelled] | str:
        try:
            socket.send(image)
            answer = socket.recv(timeout=_ANSWER_S)
        except ConnectionClosed as end:
            told = end.rcvd or end.sent
            raise StreamError(
                f"{url} has ended the stream: {_plain(told.reason) if told else 'without a word'}"
            ) from None
        except TimeoutError:
            raise StreamError(f"{url} did not answer for {_ANSWER_S:g} s") from None
        try:
            return _labels(orjson.loads(answer))
        except (KeyError, IndexError, TypeError, ValueError):
            raise StreamError(f"{url} does not answer as a TrimRT server does: {answer[:100]!r}") from None

    with socket:
        yield ask


def _labels(answer: dict[str, Any]) -> list[Labelled] | str:
    if "results" not in answer:
        return _plain(f"{answer['title']}: {answer['detail']}")
    best, *others = answer["results"][0]["predictions"]
    return [Labelled(_plain(it["label"]), float(it["probability"])) for it in (best, *others)]


def _told(body: bytes | bytearray | None) -> str:
    """What a refusal says: a problem object, or whatever a proxy says."""
    try:
        return _plain(orjson.loads(body or b"")["detail"])
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return _plain((body or b"no reason given")[:200].decode(errors="replace"))


def _plain(text: str) -> str:
    """`text` without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _offered(key: str | None) -> list[Any] | None:
    """The subprotocols that stand for the key: versions of websockets encode headers differently."""
    if key is None:
        return None
    encoded = base64.urlsafe_b64encode(key.encode()).decode().rstrip("=")
    return [PROTOCOL, KEY_PREFIX + encoded]
