"""Who may manage the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError
from running import Running, running
from wire import Wire, head

from server.auth import Caller, require_key
from server.problems import Problem
from server.settings import Settings

KEY = SecretStr("correct horse")
OPEN = Settings()  # listens on loopback, and has no key
LOCKED = Settings(api_key=KEY)
TRUSTING = Settings(api_key=KEY, trust_loopback=True, host="0.0.0.0")


def _caller(client: str = "203.0.113.9", host: str = "example.org", **headers: str | bytes) -> Caller:
    pairs = {"host": host, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return Caller.over_http(
        {
            "scheme": "http",
            "client": (client, 1234),
            "headers": [
                (name.encode(), value if isinstance(value, bytes) else value.encode())
                for name, value in pairs.items()
            ],
        }
    )


def _refused(caller: Caller, settings: Settings) -> Problem:
    with pytest.raises(Problem) as caught:
        require_key(caller, settings)
    return caught.value


@pytest.mark.parametrize("client", ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST"])
def test_programs_on_this_machine_need_no_key_where_there_is_none_or_loopback_is_trusted(
    client: str, host: str
) -> None:
    require_key(_caller(client, host), OPEN)
    require_key(_caller(client, host), TRUSTING)


def test_programs_on_this_machine_need_none_over_grpc_either() -> None:
    require_key(Caller("127.0.0.1", {}, scheme=None), OPEN)
    assert _refused(Caller("203.0.113.9", {}, scheme=None), OPEN).name == "forbidden"


def test_who_has_no_address_may_be_anyone() -> None:
    assert _refused(Caller(None, {"host": "localhost"}, "http"), OPEN).name == "forbidden"


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:8000"])
def test_once_a_key_is_set_everyone_is_asked_for_it(host: str) -> None:
    """A proxy on this machine that says nothing of its clients looks like a program on this machine."""
    assert _refused(_caller("127.0.0.1", host), LOCKED).name == "unauthorized"
    require_key(_caller("127.0.0.1", host, x_api_key="correct horse"), LOCKED)


@pytest.mark.parametrize("listens", ["0.0.0.0", "::", "192.0.2.1", "server.example"])
def test_without_a_key_a_server_that_others_can_reach_is_managed_by_nobody(listens: str) -> None:
    caller = _caller("127.0.0.1", "localhost:8000")
    assert _refused(caller, Settings(host=listens)).name == "forbidden"
    assert _refused(caller, Settings(host=listens, trust_loopback=True)).name == "forbidden"


@pytest.mark.parametrize("listens", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_without_a_key_a_server_on_loopback_is_managed_by_programs_on_its_machine(listens: str) -> None:
    require_key(_caller("127.0.0.1", "localhost:8000"), Settings(host=listens))
    assert _refused(_caller(), Settings(host=listens)).name == "forbidden"


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer correct horse"},
        {"authorization": "bearer   correct horse"},
        {"x_api_key": "correct horse"},
    ],
)
def test_the_key_lets_others_in(headers: dict[str, str]) -> None:
    require_key(_caller(**headers), LOCKED)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer"},
        {"authorization": "Basic correct horse"},
        {"x_api_key": "é"},
        {"x_api_key": ""},
        {"x_api_key": "correct hors"},
        {"x_api_key": "correct horse battery"},
    ],
)
def test_a_missing_or_wrong_key_is_unauthorized(headers: dict[str, str]) -> None:
    problem = _refused(_caller(**headers), LOCKED)
    assert problem.name == "unauthorized"
    assert problem.headers == {"WWW-Authenticate": "Bearer"}


@pytest.mark.parametrize(
    ("key", "sent"),
    [
        ("clé", "clé".encode()),
        ("clé", "clé".encode("latin-1")),
        ("ключ", "ключ".encode()),
        ("🔑", "🔑".encode()),
        ("with space", b"with space"),
        ("k" * 5000, b"k" * 5000),
        ("from a file\n", b"from a file"),
        (" spaced\t", b"spaced"),
        ("bytes \udcff", b"bytes \xff"),  # an environment variable that is no UTF-8
    ],
)
def test_a_key_may_have_any_characters(key: str, sent: bytes) -> None:
    settings = Settings(api_key=SecretStr(key))
    require_key(_caller(x_api_key=sent), settings)
    require_key(_caller(authorization=b"Bearer " + sent), settings)
    assert _refused(_caller(x_api_key=sent + b"."), settings).name == "unauthorized"


@pytest.mark.parametrize("key", ["", " ", "\n", "two\nlines", "a\0b"])
def test_a_key_that_no_header_carries_is_refused(key: str) -> None:
    with pytest.raises(ValidationError, match="api_key"):
        Settings(api_key=SecretStr(key))


_STRANGERS: dict[str, tuple[str, dict[str, str]]] = {
    "through a local proxy": ("localhost", {"x_forwarded_for": "198.51.100.1"}),
    "through one that says Via": ("localhost", {"via": "1.1 proxy"}),
    "through one that says the host": ("localhost", {"x_forwarded_host": "example.org"}),
    "through one of a content network": ("localhost", {"cf_connecting_ip": "198.51.100.1"}),
    "from another site's page": ("localhost:8000", {"origin": "https://evil.example"}),
    "from a page without a site": ("localhost:8000", {"origin": "null"}),
    "from another site's link": ("localhost:8000", {"sec_fetch_site": "cross-site"}),
    "by DNS rebinding": ("evil.example:8000", {"origin": "http://evil.example:8000"}),
    "with a name before the host": ("evil@127.0.0.1", {}),
    "with a path after the host": ("127.0.0.1/../evil", {}),
    "with half a host": ("[", {}),
    "with no host": ("", {}),
}


@pytest.mark.parametrize("name", _STRANGERS)
def test_loopback_is_no_pass_for_strangers(name: str) -> None:
    host, headers = _STRANGERS[name]
    caller = _caller("127.0.0.1", host, **headers)
    assert _refused(caller, OPEN).name == "forbidden"
    assert _refused(caller, TRUSTING).name == "unauthorized"


def test_the_servers_own_page_is_no_stranger() -> None:
    headers = {"origin": "http://localhost:8000", "sec_fetch_site": "same-origin"}
    require_key(_caller("127.0.0.1", "localhost:8000", **headers), OPEN)


@pytest.fixture(scope="module")
def protected(engine_dir: Path) -> Iterator[Running]:
    settings = Settings(engine="tiny", engine_dir=engine_dir, port=0, api_key=KEY, protect_predict=True)
    with running(settings) as it:
        yield it


def test_predict_can_be_protected_too(protected: Running, encode: Callable[..., bytes]) -> None:
    assert protected.predict(encode(0)).status_code == 401
    assert protected.predict(encode(0), headers={"X-API-Key": "correct horse"}).status_code == 200


def test_management_is_protected_and_listing_is_not(protected: Running) -> None:
    for method, path in [("POST", "/engines/tiny/load"), ("POST", "/engines/tiny/unload")]:
        assert protected.client.request(method, path).status_code == 401
    assert protected.client.put("/engines/default", json={"name": "tiny"}).status_code == 401
    assert protected.client.get("/engines").status_code == 200
    key = {"Authorization": "Bearer correct horse"}
    assert protected.client.put("/engines/default", json={"name": "tiny"}, headers=key).status_code == 200


def test_management_asks_who_calls_before_it_reads(protected: Running) -> None:
    wire = Wire(protected)
    with wire.socket:
        for method, path in [("PUT", "/engines/default"), ("POST", "/engines/tiny/load")]:
            wire.send(head(1 << 20, path=path, method=method))
            assert wire.answer()[0] == 401
            wire.send(bytes(1 << 20))


def test_a_key_in_a_trailer_comes_too_late(protected: Running) -> None:
    wire = Wire(protected)
    with wire.socket:
        wire.send(head("", "Transfer-Encoding: chunked", path="/engines/default", method="PUT"))
        wire.send(b'f\r\n{"name":"tiny"}\r\n0\r\nX-API-Key: correct horse\r\n\r\n')
        assert wire.answer()[0] == 401


def test_an_empty_key_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMRT_API_KEY", "")
    assert Settings().api_key is None


def test_the_key_is_never_shown() -> None:
    assert "correct" not in repr(LOCKED)
