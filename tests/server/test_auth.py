"""Who may manage the server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError
from running import Running, running

from server.auth import Caller, require_key
from server.problems import Problem
from server.settings import Settings

KEY = SecretStr("correct horse")


def _caller(client: str = "203.0.113.9", host: str = "example.org", **headers: str) -> Caller:
    pairs = {"host": host, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return Caller.over_http(
        {
            "scheme": "http",
            "client": (client, 1234),
            "headers": [(name.encode(), value.encode()) for name, value in pairs.items()],
        }
    )


@pytest.mark.parametrize("client", ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"])
@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1:8000", "[::1]:8000"])
def test_loopback_needs_no_key(client: str, host: str) -> None:
    require_key(_caller(client, host), None)
    require_key(_caller(client, host), KEY)


@pytest.mark.parametrize(
    "headers", [{"authorization": "Bearer correct horse"}, {"x_api_key": "correct horse"}]
)
def test_the_key_lets_others_in(headers: dict[str, str]) -> None:
    require_key(_caller(**headers), KEY)


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer wrong"}, {"authorization": "Basic correct horse"}, {"x_api_key": "é"}],
)
def test_a_missing_or_wrong_key_is_unauthorized(headers: dict[str, str]) -> None:
    with pytest.raises(Problem) as caught:
        require_key(_caller(**headers), KEY)
    assert caught.value.name == "unauthorized"
    assert caught.value.headers == {"WWW-Authenticate": "Bearer"}


def test_without_a_key_others_are_forbidden() -> None:
    with pytest.raises(Problem) as caught:
        require_key(_caller(authorization="Bearer "), None)
    assert caught.value.name == "forbidden"


@pytest.mark.parametrize(
    ("host", "headers"),
    [
        pytest.param("localhost", {"x_forwarded_for": "198.51.100.1"}, id="through a local proxy"),
        pytest.param("localhost:8000", {"origin": "https://evil.example"}, id="from another site's page"),
        pytest.param("evil.example:8000", {"origin": "http://evil.example:8000"}, id="by DNS rebinding"),
    ],
)
def test_loopback_is_no_pass_for_strangers(host: str, headers: dict[str, str]) -> None:
    with pytest.raises(Problem):
        require_key(_caller("127.0.0.1", host, **headers), None)


def test_the_servers_own_page_is_no_stranger() -> None:
    require_key(_caller("127.0.0.1", "localhost:8000", origin="http://localhost:8000"), None)


@pytest.fixture(scope="module")
def protected(engine_dir: Path) -> Iterator[Running]:
    settings = Settings(engine="tiny", engine_dir=engine_dir, port=0, api_key=KEY, protect_predict=True)
    with running(settings) as it:
        yield it


def test_predict_can_be_protected_too(protected: Running, encode: Callable[..., bytes]) -> None:
    elsewhere = {"X-Forwarded-For": "198.51.100.1"}
    assert protected.predict(encode(0)).status_code == 200
    assert protected.predict(encode(0), headers=elsewhere).status_code == 401
    assert (
        protected.predict(encode(0), headers={**elsewhere, "X-API-Key": "correct horse"}).status_code == 200
    )


def test_management_is_protected_and_listing_is_not(protected: Running) -> None:
    elsewhere = {"X-Forwarded-For": "198.51.100.1"}
    for method, path in [("POST", "/engines/tiny/load"), ("POST", "/engines/tiny/unload")]:
        assert protected.client.request(method, path, headers=elsewhere).status_code == 401
    assert (
        protected.client.put("/engines/default", json={"name": "tiny"}, headers=elsewhere).status_code == 401
    )
    assert protected.client.get("/engines", headers=elsewhere).status_code == 200


def test_an_empty_key_is_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMRT_API_KEY", "")
    assert Settings().api_key is None
    with pytest.raises(ValidationError, match="api_key"):
        Settings(api_key=SecretStr(""))


def test_the_key_is_never_shown() -> None:
    assert "correct" not in repr(Settings(api_key=KEY))
