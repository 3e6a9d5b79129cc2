"""What hostile and broken clients send, as it goes over the wire."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable
from typing import Any, Final

from server.v2 import inference_pb2 as pb
from server.v2.tensors import pack_bytes


def request(
    path: str,
    body: bytes,
    content_type: str,
    *,
    method: str = "POST",
    length: int | None = None,
    **headers: str,
) -> bytes:
    """One request; `length` is what its head says of the body."""
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: localhost",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body) if length is None else length}",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


def form(images: list[bytes]) -> bytes:
    """A multipart form with the boundary `b`."""
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n%b\r\n'
    return b"".join(part % image for image in images) + b"--b--\r\n"


def png_of(width: int, height: int) -> bytes:
    """A few bytes that say they are an image of that size."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def tiff_of_one_tile(side: int) -> bytes:
    """An image of one pixel in a tile of `side` by `side`."""
    entries = [
        *((256, 1), (257, 1), (258, 8), (259, 8), (262, 1), (277, 1)),
        *((322, side), (323, side), (324, 8), (325, 8)),
    ]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IQ", 16, 0) + struct.pack("<H", len(entries)) + directory + bytes(4)


FORM: Final = "multipart/form-data; boundary=b"


def damaged(image: bytes) -> bytes:
    """Some bytes of it are others."""
    changed = bytearray(image)
    for _ in range(random.randrange(1, 20)):
        changed[random.randrange(len(changed))] = random.randrange(256)
    return bytes(changed)


def infer_message(images: list[bytes], **changes: Any) -> bytes:
    """A gRPC request with these images."""
    raw = pack_bytes(images)
    fields = {"name": "pixels", "datatype": "BYTES", "shape": [len(images)]} | changes
    tensor = pb.ModelInferRequest.InferInputTensor(**fields)
    message = pb.ModelInferRequest(model_name="tiny", inputs=[tensor], raw_input_contents=[raw])
    return message.SerializeToString()


HOSTILE_MESSAGES: Final[dict[str, Callable[[bytes], bytes]]] = {
    "grpc: damaged image": lambda image: infer_message([damaged(image)]),
    "grpc: no message": lambda _: random.randbytes(300),
    "grpc: half a message": lambda image: infer_message([image])[:-20],
    "grpc: a shape of -1": lambda image: infer_message([image], shape=[-1]),
    "grpc: a shape that overflows": lambda image: infer_message([image], shape=[2**62, 2**62]),
    "grpc: a small file, a huge tile": lambda _: infer_message([tiff_of_one_tile(30_000)] * 64),
    "grpc: a million empty elements": lambda _: infer_message([b""] * 1_000_000),
    "grpc: a million inputs": lambda image: infer_message([image]) + b"*\0" * 1_000_000,
    "grpc: too large": lambda _: infer_message([bytes(40 << 20)]),
}

HOSTILE: Final[dict[str, Callable[[bytes], bytes]]] = {
    "damaged image": lambda image: request("/predict", damaged(image), "image/png"),
    "half an image": lambda image: request("/predict", image[: len(image) // 2], "image/png"),
    "a small file, a huge PNG": lambda _: request("/predict", png_of(60_000, 60_000), "image/png"),
    "a small file, a huge tile": lambda _: request("/predict", tiff_of_one_tile(30_000), "image/tiff"),
    "64 of them": lambda _: request("/predict", form([tiff_of_one_tile(30_000)] * 64), FORM),
    "a form of 50,000 empty parts": lambda _: request("/predict", form([b""] * 50_000), FORM),
    "a million empty elements": lambda _: request(
        "/v2/models/tiny/infer",
        b'{"inputs":[{"name":"pixels","datatype":"BYTES","shape":[1000000],"data":['
        + b",".join([b'""'] * 1_000_000)
        + b"]}]}",
        "application/json",
    ),
    "nested lists": lambda _: request(
        "/v2/models/tiny/infer", b'{"inputs":' + b"[" * 5000 + b"]" * 5000 + b"}", "application/json"
    ),
    "a number of 5000 digits": lambda image: request(f"/predict?top_k={'9' * 5000}", image, "image/png"),
    "a wrong key": lambda _: request(
        "/engines/default", b'{"name":"tiny"}', "application/json", method="PUT", X_API_Key="wrong"
    ),
    "another method": lambda image: request("/predict", image, "image/png", method="BREW"),
    "no HTTP": lambda _: random.randbytes(300) + b"\r\n\r\n",
    "half a body": lambda image: request("/predict", image, "image/png", length=len(image) + 1000),
    "half a head": lambda image: request("/predict", image, "image/png")[:60],
}
