"""Clients that send nonsense, stop half-way, or vanish: no 5xx, no leak, and right answers afterwards."""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import httpx
import pytest
from processes import Started, start_process

pytestmark = pytest.mark.slow

Encode = Callable[..., bytes]


@pytest.fixture
def served(engine_dir: Path, tmp_path: Path) -> Iterator[Started]:
    options = ["--engine-dir", str(engine_dir), "--engine", "tiny,other", "--timeout-ms", "2000"]
    with start_process(options, tmp_path / "log") as it:
        yield it


def _answers_correctly(served: Started, image: bytes, expected: int) -> None:
    response = httpx.post(f"{served.url}/predict", content=image, headers={"Content-Type": "image/png"})
    assert response.status_code == 200
    assert response.json()["results"][0]["predictions"][0]["index"] == expected


_PATHS = [
    "/predict",
    "/predict?top_k=0",
    "/predict?engine=%00",
    f"/predict?top_k={'9' * 50}",
    "/v2/models/tiny/infer",
    "/v2/models/tiny/versions/9/infer",
    "/engines/x/load",
    "/page/../../etc/passwd",
    "/%ff%fe",
    "/",
]
_CONTENT_TYPES = [
    "image/png",
    "image/jpeg",
    "multipart/form-data",
    "multipart/form-data; boundary=b",
    "application/json",
    "x",
]


def _head(length: int) -> bytes:
    lines = ("POST /predict HTTP/1.1", "Host: x", "Content-Type: image/png", f"Content-Length: {length}")
    return "\r\n".join([*lines, "", ""]).encode()


def _garbage(random: random.Random, image: bytes) -> bytes:
    """One request that is wrong in some way, as it goes over the wire."""
    noise = random.randbytes(random.randrange(0, 3000))
    damaged = bytearray(image)
    for _ in range(random.randrange(1, 20)):
        damaged[random.randrange(len(damaged))] = random.randrange(256)
    body = random.choice([noise, bytes(damaged), image[: random.randrange(len(image))], b"", image + noise])
    path, content_type = random.choice(_PATHS), random.choice(_CONTENT_TYPES)
    if content_type.endswith("=b"):
        body = b'--b\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + body
        body += random.choice([b"", b"\r\n--b", b"\r\n--b--\r\n"])
    head = f"{random.choice(['POST', 'POST', 'POST', 'PUT', 'GET', 'BREW'])} {path} HTTP/1.1\r\nHost: x\r\n"
    head += f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
    if random.random() < 0.1:
        head += f"Inference-Header-Content-Length: {random.choice(['5', '-1', 'x', '99999999'])}\r\n"
    if random.random() < 0.1:
        head += "X-Request-Timeout-Ms: 0.001\r\n"
    if random.random() < 0.05:
        return random.randbytes(300)  # not even HTTP
    return head.encode() + b"\r\n" + body


async def _send(host: str, port: int, request: bytes, patience: float) -> int | None:
    """The status of the answer; None if the connection ended without one."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(request)
        line = await asyncio.wait_for(reader.readline(), patience)
        return int(line.split()[1]) if line.startswith(b"HTTP/1.1 ") else None
    except (ConnectionError, asyncio.TimeoutError):
        return None
    finally:
        writer.close()


def _send_all(url: str, requests: list[bytes], patience: float = 10) -> Counter[int | None]:
    address = httpx.URL(url)

    async def run() -> Counter[int | None]:
        room = asyncio.Semaphore(32)

        async def one(request: bytes) -> int | None:
            async with room:
                return await _send(address.host, address.port or 80, request, patience)

        return Counter(await asyncio.gather(*(one(request) for request in requests)))

    return asyncio.run(run())


def test_ten_thousand_garbage_requests(
    served: Started, encode: Encode, reference: Callable[..., object]
) -> None:
    chance, image = random.Random(0), encode(1)
    warm = _send_all(served.url, [_garbage(chance, image) for _ in range(2000)])
    before = served.resident_mib()
    outcomes = _send_all(served.url, [_garbage(chance, image) for _ in range(10_000)])
    after = served.resident_mib()
    print(f"answers: {dict(sorted((outcomes + warm).items(), key=str))}; {before:.0f} MiB, then {after:.0f}")
    gateway = {504}  # the deadline of a microsecond that some of them ask for
    assert [
        status for status in outcomes if status is not None and status >= 500 and status not in gateway
    ] == []
    assert after < before * 1.05
    _answers_correctly(served, image, int(reference(image).argmax()))
    assert "Traceback" not in served.log.read_text()


def test_clients_that_vanish(served: Started, encode: Encode, reference: Callable[..., object]) -> None:
    """After the head, inside the body, and before the answer."""
    image = encode(1)
    head = _head(len(image))
    whole = head + image
    cuts = [len(head) // 2, len(head), len(head) + len(image) // 2, len(whole)]
    requests = [whole[:cut] for cut in cuts] * 500
    _send_all(served.url, requests, patience=0.001)
    before = served.resident_mib()
    _send_all(served.url, requests * 2, patience=0.001)
    after = served.resident_mib()
    stats = httpx.get(f"{served.url}/stats").json()
    print(f"{before:.0f} MiB, then {after:.0f}; requests {stats['requests']}")
    assert after < before * 1.05
    assert not [row for row in stats["requests"] if row["outcome"] == "failed"]
    _answers_correctly(served, image, int(reference(image).argmax()))
    assert httpx.get(f"{served.url}/stats").json()["in_flight"] == 0
    assert "Traceback" not in served.log.read_text()


def test_slow_bodies_cost_no_one_else_anything(
    served: Started, encode: Encode, reference: Callable[..., object]
) -> None:
    """Two hundred bodies that never end; meanwhile others are served, and then the slow are told."""
    image = encode(1)
    slow = _head(9999) + b"begin"
    outcomes: list[Counter[int | None]] = []
    thread = threading.Thread(
        target=lambda: outcomes.append(_send_all(served.url, [slow] * 200, patience=20))
    )
    thread.start()
    for _ in range(50):
        _answers_correctly(served, image, int(reference(image).argmax()))
    thread.join()
    assert outcomes == [Counter({408: 200})]


def test_schemathesis_finds_no_server_error_and_no_undocumented_answer(
    served: Started, tmp_path: Path
) -> None:
    settings = tmp_path / "schemathesis.toml"
    # What is turned off, or not supported, is refused with 501.
    settings.write_text('[checks]\nnot_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", 501]\n')
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    program = [str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(settings)]
    command = [*program, "run", f"{served.url}/openapi.json"]
    options = [
        "--checks",
        checks,
        "--max-examples",
        "40",
        "--seed",
        "1",
        "--phases",
        "examples,coverage,fuzzing",
    ]
    outcome = subprocess.run([*command, *options], capture_output=True, text=True, timeout=280)
    print(outcome.stdout[-3000:])
    assert outcome.returncode == 0, outcome.stdout


def test_kill_while_an_engine_loads_leaves_nothing_behind(
    engine_dir: Path, tmp_path: Path, encode: Encode, reference: Callable[..., object]
) -> None:
    directory = Path(shutil.copytree(engine_dir, tmp_path / "engines"))

    def contents() -> dict[str, str]:
        files = sorted(file for file in directory.rglob("*") if file.is_file())
        return {str(file): sha256(file.read_bytes()).hexdigest() for file in files}

    before = contents()
    options = ["--engine-dir", str(directory), "--engine", "tiny"]
    for attempt in range(5):
        with start_process(options, tmp_path / f"log{attempt}") as served:
            load = threading.Thread(target=_load_and_ignore, args=(served.url,))
            load.start()
            threading.Event().wait(0.01 * attempt)
            served.process.kill()
            served.process.wait()
            load.join()
        assert contents() == before
    with start_process(options, tmp_path / "log") as served:
        assert httpx.post(f"{served.url}/engines/other/load").status_code == 200
        _answers_correctly(served, encode(1), int(reference(encode(1)).argmax()))


def _load_and_ignore(url: str) -> None:
    try:
        httpx.post(f"{url}/engines/other/load")
    except httpx.TransportError:
        return
