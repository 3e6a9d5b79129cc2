"""Other people's clients, as they are out of the box: each sends an image as a raw body and in a form, twice.

JVM clients and `curl --http2` offer to upgrade to HTTP/2 with every first request of a connection.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from running import running

from server.settings import Settings

Ask = Callable[[str, Path], list[str]]
"""Asks `/predict` of a server about an image file; the bodies of the answers."""

PNG = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def url(engine_dir: Path) -> Iterator[str]:
    with running(Settings(engine="tiny", engine_dir=engine_dir, port=0)) as it:
        yield f"{it.url}/predict"


@pytest.fixture
def photo(tmp_path: Path, encode: Callable[..., bytes]) -> Path:
    path = tmp_path / "photo.png"
    path.write_bytes(encode(1, "PNG", (640, 480)))
    return path


def _run(program: str, *arguments: object) -> str:
    if shutil.which(program) is None:
        pytest.skip(f"no {program} here")
    command = [program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def _curl(*options: str) -> Ask:
    def ask(url: str, photo: Path) -> list[str]:
        raw = ["-H", "Content-Type: image/png", "--data-binary", f"@{photo}", url]
        form = ["-F", f"file=@{photo}", url]
        out = _run(
            "curl", "-sS", "-m", 30, *options, *raw, url, "--next", "-sS", "-m", 30, *options, *form, url
        )
        return out.replace("}{", "}\n{").splitlines()

    return ask


_JAVA = """
import java.io.*;
import java.net.*;
import java.net.http.*;
import java.nio.file.*;
import java.util.*;

public class Ask {
    static void send(HttpClient client, URI uri, String type, byte[] body) throws Exception {
        HttpRequest request = HttpRequest.newBuilder(uri).header("Content-Type", type)
            .POST(HttpRequest.BodyPublishers.ofByteArray(body)).build();
        System.out.println(client.send(request, HttpResponse.BodyHandlers.ofString()).body());
    }

    public static void main(String[] arguments) throws Exception {
        URI uri = URI.create(arguments[0]);
        byte[] image = Files.readAllBytes(Path.of(arguments[1]));
        ByteArrayOutputStream form = new ByteArrayOutputStream();
        String disposition = "Content-Disposition: form-data; name=\\"file\\"; filename=\\"a.png\\"";
        form.write(("--b\\r\\n" + disposition + "\\r\\n\\r\\n").getBytes());
        form.write(image);
        form.write("\\r\\n--b--\\r\\n".getBytes());
        for (int turn = 0; turn < 2; turn++) {
            HttpClient client = HttpClient.newHttpClient();
            send(client, uri, "image/png", image);
            send(client, uri, "multipart/form-data; boundary=b", form.toByteArray());
        }
    }
}
"""


def _java(url: str, photo: Path) -> list[str]:
    program = photo.with_name("Ask.java")
    program.write_text(_JAVA)
    return _run("java", program, url, photo).splitlines()


_NODE = """
const [url, path] = process.argv.slice(2);
const image = new Blob([require("fs").readFileSync(path)]);
(async () => {
  for (let turn = 0; turn < 2; turn++) {
    const form = new FormData();
    form.append("file", image, "a.png");
    for (const body of [image, form]) console.log(await (await fetch(url, { method: "POST", body })).text());
  }
})();
"""


def _node(url: str, photo: Path) -> list[str]:
    """A Blob without a type is sent without a Content-Type."""
    program = photo.with_name("ask.js")
    program.write_text(_NODE)
    return _run("node", program, url, photo).splitlines()


def _requests(url: str, photo: Path) -> list[str]:
    requests = pytest.importorskip("requests")
    answers = []
    with requests.Session() as session:
        for _ in range(2):
            answers.append(session.post(url, data=photo.read_bytes()).text)
            answers.append(session.post(url, files={"file": photo.read_bytes()}).text)
    return answers


def _httpx(url: str, photo: Path) -> list[str]:
    with httpx.Client() as client:
        raw, form = {"content": photo.read_bytes()}, {"files": {"file": photo.read_bytes()}}
        return [client.post(url, **body).text for body in (raw, form) * 2]


def _aiohttp(url: str, photo: Path) -> list[str]:
    aiohttp = pytest.importorskip("aiohttp")

    async def ask() -> list[str]:
        answers = []
        async with aiohttp.ClientSession() as session:
            for form in (False, True) * 2:
                with photo.open("rb") as file:
                    body = {"file": file} if form else file.read()
                    async with session.post(url, data=body) as response:
                        answers.append(await response.text())
        return answers

    return asyncio.run(ask())


def _urllib(url: str, photo: Path) -> list[str]:
    """It knows no forms, and closes the connection after each request."""
    request = urllib.request.Request(url, photo.read_bytes(), PNG)
    answers = []
    for _ in range(4):
        with urllib.request.urlopen(request, timeout=30) as response:
            answers.append(response.read().decode())
    return answers


CLIENTS: dict[str, Ask] = {
    "curl": _curl(),
    "curl --http2": _curl("--http2"),
    "curl with Expect": _curl("-H", "Expect: 100-continue"),
    "the JDK's HttpClient": _java,
    "Node's fetch": _node,
    "requests": _requests,
    "httpx": _httpx,
    "aiohttp": _aiohttp,
    "urllib": _urllib,
}


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_is_answered_as_it_is(url: str, photo: Path, reference: Callable, client: str) -> None:
    answers = [json.loads(answer) for answer in CLIENTS[client](url, photo)]
    assert len(answers) == 4
    for answer in answers:
        assert answer["results"][0]["predictions"][0]["index"] == reference(photo.read_bytes()).argmax()
