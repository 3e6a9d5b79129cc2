"""The server behind Debian's nginx, on the configurations of docs/proxy.md and on the barest one."""

from __future__ import annotations

import re
import shlex
import signal
import ssl
import subprocess
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest
from gated_engine import Gate, load_gated
from nginx import NGINX, nginx
from pydantic import SecretStr
from running import Running, running
from streaming import stream
from websockets.exceptions import InvalidStatus
from wire import Wire, head

from server.settings import Settings

pytestmark = pytest.mark.skipif(NGINX is None, reason="no nginx here (apt-get install nginx-light)")

Encode = Callable[..., bytes]
Behind = Callable[..., tuple[Running, str]]

PAGE = (Path(__file__).parents[2] / "docs/proxy.md").read_text(encoding="utf-8")
PLAIN, WITH_TLS, BELOW_A_PREFIX = re.findall(r"^```nginx\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
KEY = "correct horse"
PNG = {"Content-Type": "image/png"}


def _bare(*directives: str) -> str:
    """`proxy_pass` and nothing else that says anything of the client."""
    inside = " ".join(["proxy_pass http://127.0.0.1:8000;", *directives])
    return f"server {{ listen 80; client_max_body_size 0; location / {{ {inside} }} }}"


_KEPT = ("proxy_http_version 1.1;", 'proxy_set_header Connection "";')
_UNBUFFERED = "proxy_request_buffering off;"
_BARE = {
    "HTTP/1.0": _bare(),
    "HTTP/1.0, unbuffered": _bare(_UNBUFFERED),
    "HTTP/1.1": _bare(*_KEPT),
    "HTTP/1.1, unbuffered": _bare(*_KEPT, _UNBUFFERED),
}


@pytest.fixture
def behind(engine_dir: Path, tmp_path: Path):
    """A server with those settings behind nginx with that configuration: both, and the proxy's URL."""
    with ExitStack() as stack:

        def behind(configuration: str, gate: Gate | None = None, **settings: object) -> tuple[Running, str]:
            configured = Settings(engine="tiny", engine_dir=engine_dir, port=0, **settings)
            server = stack.enter_context(running(configured, load_gated(gate) if gate else None))
            port = stack.enter_context(nginx(configuration, server.url, tmp_path))
            return server, f"http://127.0.0.1:{port}"

        yield behind


@pytest.mark.parametrize("configuration", [PLAIN, *_BARE.values()], ids=["the page's", *_BARE])
def test_once_a_key_is_set_the_proxys_clients_are_asked_for_it(
    behind: Behind, encode: Encode, configuration: str
) -> None:
    _, url = behind(configuration, api_key=SecretStr(KEY), protect_predict=True)
    for headers, status in [({}, 401), ({"X-API-Key": "wrong"}, 401), ({"X-API-Key": KEY}, 200)]:
        with httpx.Client(base_url=url, headers=headers, timeout=30) as client:
            asked = [
                client.post("/predict", content=encode(0), headers=PNG),
                client.post("/engines/tiny/load"),
                client.put("/engines/default", json={"name": "tiny"}),
            ]
        assert [response.status_code for response in asked] == [status] * 3


def test_without_a_key_a_proxy_that_names_its_clients_lets_nobody_manage(behind: Behind) -> None:
    _, url = behind(PLAIN)
    assert httpx.post(f"{url}/engines/tiny/load").status_code == 403


@pytest.mark.parametrize("configuration", [PLAIN, *_BARE.values()], ids=["the page's", *_BARE])
def test_refusals_before_the_body_is_read_arrive_as_such(
    behind: Behind, encode: Encode, configuration: str
) -> None:
    """Where the server closes the connection with the body unread, nginx answers 502 to most."""
    gate = Gate()
    gate.close()
    settings = {"max_body_bytes": 1 << 20, "queue_limit": 1, "api_key": SecretStr(KEY)}
    server, url = behind(configuration, gate, **settings)
    body = bytes(1 << 20)

    def statuses(method: str, path: str, body: bytes = body, count: int = 20) -> Counter[int]:
        return Counter(_ask_once(url, method, path, body) for _ in range(count))

    assert statuses("POST", "/predict?engine=none", count=100) == {404: 100}
    assert statuses("POST", "/predict", body + b"x") == {413: 20}
    assert statuses("POST", "/nowhere") == {404: 20}
    assert statuses("PUT", "/engines/default") == {401: 20}
    image = encode(0)
    wire = Wire(server)
    with wire.socket:
        wire.send(head(len(image)) + image)
        gate.wait_for_arrivals(1)
        assert statuses("POST", "/predict", count=100) == {429: 100}
        gate.open()
        assert wire.answer()[0] == 200


def _ask_once(url: str, method: str, path: str, body: bytes) -> int:
    """The status of one request on a connection of its own, sent to its end before the answer is read."""
    connection = HTTPConnection(url.removeprefix("http://"), timeout=30)
    with closing(connection):
        connection.request(method, path, body, PNG)
        return connection.getresponse().status


def test_the_page_is_served_below_a_prefix(behind: Behind, encode: Encode) -> None:
    _, url = behind(BELOW_A_PREFIX, root_path="/trimrt")
    with httpx.Client(base_url=f"{url}/trimrt/", timeout=30) as client:
        (result,) = client.post("predict", content=encode(0), headers=PNG).json()["results"]
        assert len(result["predictions"]) == 5
        for page in ("", "docs"):
            markup = client.get(page).text
            for address in re.findall(r'(?:src|href)="([^"]+)"', markup):
                assert client.get(address).status_code == 200, address
        assert "url: 'openapi.json'" in client.get("docs").text
        assert client.get("openapi.json").json()["servers"] == [{"url": "/trimrt"}]
        assert client.post("v2/models/none/infer").json()["error"]


def test_streams_pass_the_proxy(behind: Behind, encode: Encode) -> None:
    server, url = behind(PLAIN, api_key=SecretStr(KEY), protect_predict=True)
    with stream(url, headers={"X-API-Key": KEY}, origin=url) as it:
        assert [it.ask(encode(0))["frame"] for _ in range(3)] == [0, 1, 2]
        server.server.handle_exit(signal.SIGTERM, None)
        assert it.closed() == (1001, "the server stops")


def test_streams_pass_the_proxy_below_a_prefix(behind: Behind, encode: Encode) -> None:
    _, url = behind(BELOW_A_PREFIX, root_path="/trimrt")
    with stream(f"{url}/trimrt", origin=url, top_k=2) as it:
        assert len(it.ask(encode(0))["results"][0]["predictions"]) == 2


def test_a_proxy_that_passes_no_offer_on_is_told_so(behind: Behind) -> None:
    _, url = behind(_BARE["HTTP/1.1"])
    with pytest.raises(InvalidStatus) as refused, stream(url):
        pass
    assert refused.value.response.status_code == 426
    assert b"Upgrade" in refused.value.response.body


def test_tls_ends_at_the_proxy(behind: Behind, encode: Encode, tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    subprocess.run(
        shlex.split(
            "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=127.0.0.1 "
            f"-addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {certificate}"
        ),
        check=True,
        capture_output=True,
    )
    configuration = WITH_TLS.replace("/etc/ssl/certs/trimrt.pem", str(certificate))
    configuration = configuration.replace("/etc/ssl/private/trimrt.key", str(key))
    _, url = behind(configuration)
    trust = ssl.create_default_context(cafile=str(certificate))
    url = url.replace("http", "https")
    with httpx.Client(verify=trust, timeout=30) as client:
        answer = client.post(f"{url}/predict", content=encode(0), headers=PNG)
    assert answer.status_code == 200
    with stream(url, origin=url, ssl=trust) as it:
        assert it.ask(encode(0))["results"]
