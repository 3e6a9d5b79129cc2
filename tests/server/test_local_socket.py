"""`--uds`: programs on this machine ask over a Unix socket, under the rules of loopback."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from processes import start_process
from running import Running, running

from runtime.manifest import EngineError
from server.settings import Settings
from trimrt.cli import main
from trimrt.serve.listening import CannotListenError, listen_locally

Encode = Callable[..., bytes]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trimrt.sock"


@contextmanager
def client_of(path: Path, **options: object) -> Iterator[httpx.Client]:
    transport = httpx.HTTPTransport(uds=str(path))
    with httpx.Client(transport=transport, base_url="http://localhost", **options) as client:  # type: ignore[arg-type]
        yield client


@pytest.fixture
def served(engine_dir: Path, path: Path) -> Iterator[Running]:
    with running(Settings(engine="tiny", engine_dir=engine_dir, port=0, uds=path)) as it:
        yield it


def ask(client: httpx.Client, image: bytes) -> list[float]:
    answer = client.post(
        "/predict", params={"top_k": 10}, content=image, headers={"Content-Type": "image/png"}
    )
    assert answer.status_code == 200, answer.text
    (result,) = answer.json()["results"]
    by_label = sorted((row["label"], row["probability"]) for row in result["predictions"])
    return [probability for _, probability in by_label]


def test_the_answers_are_those_of_the_port(served: Running, path: Path, encode: Encode) -> None:
    with client_of(path) as client:
        assert client.get("/health/ready").json()["engine"] == "tiny"
        for seed in range(5):
            image = encode(seed)
            np.testing.assert_allclose(ask(client, image), ask(served.client, image))


def test_many_connections_and_forms_of_many_images_are_answered(
    served: Running, path: Path, encode: Encode
) -> None:
    def ask_often(seed: int) -> set[int]:
        with client_of(path) as client:
            form = [("file", (f"{number}.png", encode(seed + number))) for number in range(8)]
            return {client.post("/predict", files=form).status_code for _ in range(5)}

    with ThreadPoolExecutor(8) as pool:
        assert set().union(*pool.map(ask_often, range(8))) == {200}


def test_a_slow_reader_gets_the_whole_answer(served: Running, path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = b""
        while piece := client.recv(100):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head.lower()


def test_its_owner_and_group_may_connect_and_nobody_else(served: Running, path: Path) -> None:
    assert stat.S_IMODE(path.lstat().st_mode) == 0o660


def test_it_is_gone_with_the_server(engine_dir: Path, path: Path) -> None:
    with running(Settings(engine="tiny", engine_dir=engine_dir, port=0, uds=path)):
        assert path.is_socket()
    assert list(path.parent.iterdir()) == []


def test_it_is_gone_when_the_server_cannot_begin(engine_dir: Path, path: Path) -> None:
    broken = Path(shutil.copytree(engine_dir / "tiny-v1", path.parent / "broken"))
    (broken / "engine.blob").write_bytes(b"")
    with pytest.raises(EngineError), running(Settings(engine=str(broken), port=0, uds=path)):
        pass
    assert list(path.parent.iterdir()) == [broken]


# --- who may manage -----------------------------------------------------------------------------------------


def test_managing_needs_no_key_where_none_is_set(served: Running, path: Path) -> None:
    with client_of(path) as client:
        assert client.post("/engines/other/load").json()["state"] == "loaded"


@pytest.mark.parametrize(
    "headers", [{"X-Forwarded-For": "192.0.2.1"}, {"Origin": "http://evil.example"}, {"Host": "evil.example"}]
)
def test_a_proxys_client_or_a_web_page_is_no_program_on_this_machine(
    headers: dict[str, str], served: Running, path: Path
) -> None:
    with client_of(path, headers=headers) as client:
        assert client.post("/engines/other/load").status_code == 403


def test_a_key_is_asked_of_everyone(engine_dir: Path, path: Path) -> None:
    settings = Settings.model_validate(
        {"engine": "tiny", "engine_dir": engine_dir, "port": 0, "uds": path, "api_key": "secret"}
    )
    with running(settings), client_of(path) as client:
        assert client.post("/engines/other/load").status_code == 401
        allowed = client.post("/engines/other/load", headers={"X-API-Key": "secret"})
        assert allowed.json()["state"] == "loaded"


def test_where_the_network_can_ask_a_key_is_needed_for_managing(engine_dir: Path, path: Path) -> None:
    settings = Settings(engine="tiny", engine_dir=engine_dir, host="0.0.0.0", port=0, uds=path)
    with running(settings), client_of(path) as client:
        assert client.post("/engines/other/load").status_code == 403


# --- what is at the path ------------------------------------------------------------------------------------


def test_what_a_killed_server_left_is_replaced(engine_dir: Path, path: Path, tmp_path: Path) -> None:
    options = [
        "--engine-dir",
        str(engine_dir),
        "--engine",
        "tiny",
        "--uds",
        str(path),
        "--log-format",
        "json",
    ]
    with start_process(options, tmp_path / "log") as started:
        started.process.kill()
        started.process.wait()
        assert path.is_socket()
    with start_process(options, tmp_path / "log"), client_of(path) as client:
        assert client.get("/health/live").status_code == 200


def refusal(path: Path) -> str:
    with pytest.raises(CannotListenError) as error, listen_locally(path):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


def test_another_server_is_not_pushed_aside(served: Running, path: Path) -> None:
    assert refusal(path) == f"another server listens on {path}; choose another with --uds"
    with client_of(path) as client:
        assert client.get("/health/live").status_code == 200


def test_a_server_that_does_not_listen_yet_is_not_pushed_aside(path: Path) -> None:
    with listen_locally(path):
        assert "another server listens on" in refusal(path)
        assert path.is_socket()


def test_another_programs_socket_is_not_pushed_aside(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        assert "another server listens on" in refusal(path)
    with listen_locally(path):  # nobody listens there any more
        pass
    assert not path.exists()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_no_socket_is_left_alone(kind: str, path: Path) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("elsewhere")
    else:
        path.write_text("mine")
    before = path.lstat()
    assert refusal(path) == f"{path} exists and is no socket; choose another with --uds"
    assert os.path.samestat(before, path.lstat())


def test_what_came_in_its_place_is_left_alone(path: Path) -> None:
    with listen_locally(path):
        path.unlink()
        path.write_text("mine")
    assert path.read_text() == "mine"


def test_a_path_that_is_too_long_is_refused_in_one_line(tmp_path: Path) -> None:
    assert "path too long; choose another with --uds" in refusal(tmp_path / ("n" * 150))


def test_the_command_says_so_in_one_line(engine_dir: Path, path: Path) -> None:
    path.write_text("mine")
    command = [
        "serve",
        "--engine-dir",
        str(engine_dir),
        "--engine",
        "tiny",
        "--port",
        "0",
        "--uds",
        str(path),
    ]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert f"Error: {path} exists and is no socket; choose another with --uds" in result.output


# --- several processes --------------------------------------------------------------------------------------


def test_several_workers_answer_over_it_until_all_end(
    engine_dir: Path, path: Path, tmp_path: Path, encode: Encode
) -> None:
    options = ["--engine-dir", str(engine_dir), "--engine", "tiny", "--uds", str(path), "--workers", "2"]
    with start_process([*options, "--log-format", "json"], tmp_path / "log") as started:
        assert started.said("uds") == str(path)
        assert stat.S_IMODE(path.lstat().st_mode) == 0o660
        barrier = threading.Barrier(4)

        def ask_beside_others(seed: int) -> list[float]:
            with client_of(path) as client:
                client.get("/health/live")
                barrier.wait()  # so many connections at once are shared among the workers
                return ask(client, encode(seed))

        with ThreadPoolExecutor(4) as pool, httpx.Client(base_url=started.url) as port:
            for seed, answer in enumerate(pool.map(ask_beside_others, range(4))):
                np.testing.assert_allclose(answer, ask(port, encode(seed)))
        with client_of(path) as client:
            assert client.post("/engines/other/load").json()["state"] == "loaded"
            assert client.get("/stats").json()["workers"]["running"] == 2
        started.process.send_signal(signal.SIGTERM)
        assert started.process.wait(timeout=30) == 0
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert not path.exists()
