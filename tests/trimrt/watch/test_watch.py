"""`trimrt watch`, on films and on what plays like a camera, with engines here and on servers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner, Result
from pydantic import SecretStr
from running import Running, running
from serving import encoded
from websockets.sync.server import ServerConnection, serve

from server.settings import Settings
from trimrt.cli import main

SCENES = (1, 3)  # seeds of what the film shows
LENGTH = 20  # frames of each scene

Watch = Callable[..., Result]


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("film") / "film.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25, (320, 240))
    for seed in SCENES:
        picture = cv2.imdecode(np.frombuffer(encoded(seed, "PNG", (320, 240)), np.uint8), cv2.IMREAD_COLOR)
        for _ in range(LENGTH):
            writer.write(picture)
    writer.release()
    return path


@pytest.fixture
def watch(engine_dir: Path) -> Watch:
    def watch(*arguments: object, **environment: str) -> Result:
        words = ["watch", *map(str, arguments), "--engine-dir", str(engine_dir)]
        return CliRunner().invoke(main, words, env=environment)

    return watch


def lines(result: Result) -> list[dict]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_every_frame_of_a_film_is_labelled_alike_here_and_by_a_server(
    watch: Watch, film: Path, server: Running
) -> None:
    here = lines(watch(film, "--engine", "other", "--top-k", 2, "--json"))
    there = lines(watch(film, "--engine", "other", "--top-k", 2, "--json", "--url", server.url))
    assert [it["frame"] for it in here] == list(range(2 * LENGTH))
    for one, other in zip(here, there, strict=True):
        assert len(one["predictions"]) == 2
        for mine, theirs in zip(one["predictions"], other["predictions"], strict=True):
            assert mine["label"] == theirs["label"]
            assert mine["probability"] == pytest.approx(theirs["probability"], abs=1e-4)
        assert one["latency_ms"] > 0
        assert one["left_out"] == 0
    scenes = [{it["predictions"][0]["label"] for it in half} for half in (here[:LENGTH], here[LENGTH:])]
    assert [len(labels) for labels in scenes] == [1, 1]
    assert scenes[0] != scenes[1]


def test_a_line_is_printed_when_the_label_changes(watch: Watch, film: Path, server: Running) -> None:
    result = watch(film, "--url", server.url)
    assert result.exit_code == 0, result.output
    best = [
        server.predict(encoded(seed, "PNG", (320, 240))).json()["results"][0]["predictions"][0]["label"]
        for seed in SCENES
    ]
    assert [line.split()[2] for line in result.stdout.splitlines()] == best
    assert result.stderr.startswith(f"{2 * LENGTH} frames, ")
    assert ", 0 left out; median " in result.stderr


def test_it_ends_after_as_many_frames_as_were_asked_for(watch: Watch, film: Path) -> None:
    assert len(lines(watch(film, "--engine", "tiny", "--frames", 3, "--json"))) == 3


def test_of_what_is_live_the_newest_frame_is_labelled(watch: Watch, film: Path, server: Running) -> None:
    """A named address is live to it; here it leads to a file, which comes as fast as it is read."""
    result = watch(f"file://{film}", "--url", server.url, "--json")
    frames = lines(result)
    assert sum(1 + it["left_out"] for it in frames) == 2 * LENGTH
    assert sum(it["left_out"] for it in frames) > 0


def test_the_key_is_sent(watch: Watch, film: Path, engine_dir: Path) -> None:
    settings = Settings(
        engine="tiny", engine_dir=engine_dir, port=0, api_key=SecretStr("clé"), protect_predict=True
    )
    with running(settings) as locked:
        assert watch(film, "--url", locked.url, "--api-key", "clé").exit_code == 0
        assert watch(film, "--url", locked.url, TRIMRT_API_KEY="clé").exit_code == 0
        refused = watch(film, "--url", locked.url, "--api-key", "wrong")
        assert refused.exit_code == 1
        assert "The API key is missing or wrong: send the API key" in refused.stderr
        assert (
            refused.stderr.rstrip()
            .splitlines()[-1]
            .startswith(f"Error: {locked.url} has ended the stream: unauthorized: send the API key")
        )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{film}"], "who is to label the frames? Give --engine, or a server's --url"),
        (["{film}x", "--engine", "tiny"], "(did you mean film.avi?)"),
        (["{text}", "--engine", "tiny"], "text.mp4 cannot be opened as video"),
        (["77", "--engine", "tiny"], "77 cannot be opened as video"),
        (["{film}", "--engine", "tinny"], "(did you mean tiny?)"),
        (["{film}", "--url", "127.0.0.1:8000"], "give one like http://127.0.0.1:8000"),
        (["{film}", "--url", "http://127.0.0.1:1"], "no stream from http://127.0.0.1:1"),
        (["{film}", "--url", "http://127.0.0.1:99999"], "no stream from http://127.0.0.1:99999"),
        (["{film}", "--url", "http://[::1"], "no stream from http://[::1"),
        (["{film}", "--url", "{url}", "--engine", "tinny"], "engine-not-found: no engine 'tinny' is loaded"),
        (["{film}", "--url", "{url}/docs"], "{url}/docs: "),
    ],
)
def test_what_is_wrong_is_said(
    watch: Watch, film: Path, server: Running, tmp_path: Path, arguments: list[str], says: str
) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("no film")
    result = watch(*(it.format(film=film, text=text, url=server.url) for it in arguments))
    assert result.exit_code != 0
    assert says.format(url=server.url) in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    "answer",
    [
        *("no JSON", b"\xff", "[]", "null", "{}", '{"results":[]}', '{"results":[{"predictions":[]}]}'),
        '{"results":[{"predictions":[{"label":1,"probability":0.5}]}]}',
        '{"results":[{"predictions":[{"label":"a","probability":"much"}]}]}',
    ],
)
def test_what_answers_but_is_no_server_of_ours_is_told_apart(
    watch: Watch, film: Path, answer: str | bytes
) -> None:
    with stranger(answer) as url:
        result = watch(film, "--url", url)
    assert result.exit_code == 1
    assert f"{url} does not answer as a TrimRT server does" in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


def test_a_server_cannot_send_commands_to_the_terminal(watch: Watch, film: Path) -> None:
    label = json.dumps({"results": [{"predictions": [{"label": "\x1b]0;a\x07\x9bb", "probability": 1}]}]})
    problem = json.dumps({"title": "\x1b[2J", "detail": "no"})
    for answer in (label, problem):
        with stranger(answer) as url:
            printed = watch(film, "--url", url, "--frames", 1).output
        assert not [letter for letter in printed if not letter.isprintable() and letter != "\n"]


def test_a_server_that_sends_without_end_is_left(watch: Watch, film: Path) -> None:
    with stranger("x" * (33 << 20)) as url:
        result = watch(film, "--url", url)
    assert result.exit_code == 1
    assert f"{url} has ended the stream" in " ".join(result.stderr.split())


@contextmanager
def stranger(answer: str | bytes) -> Iterator[str]:
    """A WebSocket's server that gives one answer to everything."""

    def handle(connection: ServerConnection) -> None:
        for _ in connection:
            connection.send(answer)

    with serve(handle, "127.0.0.1", 0, max_size=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join()
