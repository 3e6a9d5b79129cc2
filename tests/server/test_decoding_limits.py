"""What decoding may take: time for a request's images, memory for all images, and which formats."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from iso_media import File, grid, picture
from PIL import Image
from pydantic import ValidationError
from running import Running, running, wait_until

from benchmarks import hostile_images as hostile
from benchmarks.hostile_images import saved
from models.preprocessing import Cost, ImageTooLargeError
from server.decoding_limits import DecodingLimits
from server.jobs import Job
from server.problems import Problem
from server.settings import Settings

Encode = Callable[..., bytes]


def job(seconds: float = 60) -> Job:
    now = time.monotonic()
    return Job(1, now, now + seconds, lambda _outcome: None, 1)


MB = 1_000_000


@pytest.fixture
def limits() -> DecodingLimits:
    return DecodingLimits(Settings(max_decoding_ms=1000, max_decoding_memory_bytes=100 * MB))


@contextmanager
def admitted(limits: DecodingLimits, cost: Cost, of: Job) -> Iterator[None]:
    limits.admit(cost, of)
    yield
    limits.release(cost)


def refusal(limits: DecodingLimits, cost: Cost, of: Job) -> str:
    with pytest.raises(ImageTooLargeError) as refused, admitted(limits, cost, of):
        pass
    return str(refused.value)


def test_memory_is_held_until_it_is_given_back(limits: DecodingLimits) -> None:
    with admitted(limits, Cost(0.1, 60 * MB), job()):
        assert limits.held == 60 * MB
    assert limits.held == 0


def test_small_images_are_not_counted(limits: DecodingLimits) -> None:
    with admitted(limits, Cost(0.1, MB), job()):
        assert limits.held == 0


def test_an_image_that_never_fits_is_refused(limits: DecodingLimits) -> None:
    assert "101,000,000 bytes of memory; the limit is 100,000,000" in refusal(
        limits, Cost(0, 101 * MB), job()
    )
    assert "1,100 ms of processor time; the limit is 1,000 ms" in refusal(limits, Cost(1.1, 1), job())


def test_the_images_of_one_request_share_its_time(limits: DecodingLimits) -> None:
    one, other = job(), job()
    for _ in range(2):
        with admitted(limits, Cost(0.4, 1), one):
            pass
    assert "send fewer in one request" in refusal(limits, Cost(0.4, 1), one)
    with admitted(limits, Cost(0.4, 1), other):
        pass


def test_an_image_waits_until_others_are_decoded(limits: DecodingLimits) -> None:
    its_turn = threading.Event()

    def wait_for_room() -> None:
        with admitted(limits, Cost(0, 50 * MB), job()):
            its_turn.set()

    with admitted(limits, Cost(0, 60 * MB), job()):
        waiting = threading.Thread(target=wait_for_room)
        waiting.start()
        wait_until(lambda: bool(limits._changed._waiters))  # type: ignore[attr-defined]
        assert not its_turn.is_set()
    assert its_turn.wait(20)
    waiting.join()
    assert limits.held == 0


def test_nobody_waits_beyond_the_deadline(limits: DecodingLimits) -> None:
    with admitted(limits, Cost(0, 60 * MB), job()):
        with pytest.raises(Problem) as refused, admitted(limits, Cost(0, 50 * MB), job(seconds=0.01)):
            pass
        assert refused.value.name == "deadline-exceeded"
        assert limits.held == 60 * MB


def test_formats_are_checked_at_the_start() -> None:
    assert DecodingLimits(Settings(formats="png, JPEG")).formats == {"PNG", "JPEG"}
    with pytest.raises(ValidationError, match="'heic' is none of jpeg, png"):
        Settings(formats="png,heic")


@pytest.fixture(scope="module")
def strict(engine_dir: Path) -> Iterator[Running]:
    settings = Settings(engine="tiny", engine_dir=engine_dir, port=0, formats="jpeg,png,webp,tiff,heif")
    with running(settings) as it:
        yield it


HOSTILE = {
    "WebP": saved(Image.new("L", (16_383, 3900)), "WEBP", lossless=True),
    "TIFF": hostile.tiled_tiff(16, 16, 32_752),
    "JPEG": hostile.progressive_jpeg(1208, 1736, 900, refining=True),  # 11 kB: two bytes for a scan
    "HEIC": File(
        [grid(40, 40, 10_240, 10_240), picture(saved(Image.new("RGB", (256, 256)), "HEIF"))],
        [(b"dimg", 1, [2] * 1600)],
    ).write(),
    "PNG": hostile.png(8, 8, before=[hostile.chunk(b"iCCP", b"a\0\0" + bytes(9))] * 300),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("count", [1, 64])
def test_a_hostile_image_is_refused_by_its_header_however_many_there_are(
    strict: Running, encode: Encode, name: str, count: int
) -> None:
    files = [("file", ("a", HOSTILE[name]))] * count
    answer = strict.client.post("/predict", files=files)
    assert (answer.status_code, answer.json()["type"]) == (413, "urn:trimrt:problem:image-too-large")
    assert strict.predict(encode(0)).status_code == 200


def test_many_images_that_are_dear_together_are_refused_in_words(strict: Running, encode: Encode) -> None:
    photograph = saved(Image.new("L", (4000, 3000)), "WEBP", method=0)
    assert strict.predict(photograph).status_code == 200
    answer = strict.client.post("/predict", files=[("file", ("a", photograph))] * 16)
    assert answer.status_code == 413
    assert "send fewer in one request" in answer.json()["detail"]


def test_a_format_that_is_turned_off_is_named(strict: Running, encode: Encode) -> None:
    answer = strict.predict(encode(0, "GIF"))
    assert answer.status_code == 415
    assert (
        answer.json()["detail"]
        == "GIF images are not accepted; convert it to one of JPEG, PNG, WEBP, TIFF, HEIF"
    )


@pytest.mark.parametrize("form", ["HEIF", "AVIF"])
def test_a_phones_photograph_is_answered_like_any_other(server: Running, form: str) -> None:
    photograph = hostile.photograph(300, 200)
    answers = [
        server.predict(saved(photograph, form, **options)).json()["results"][0]["predictions"]
        for form, options in ((form, {"quality": 95, "subsampling": "4:4:4"}), ("PNG", {}))
    ]
    assert answers[0][0]["label"] == answers[1][0]["label"]
    assert answers[0][0]["probability"] == pytest.approx(answers[1][0]["probability"], abs=0.05)


def test_a_server_without_the_extra_says_what_it_lacks(
    server: Running, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    photograph = saved(Image.new("RGB", (64, 64)), "HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    answer = server.predict(photograph)
    assert (answer.status_code, answer.json()["type"]) == (415, "urn:trimrt:problem:unsupported-media-type")
    assert "pip install 'trimrt[heif]'" in answer.json()["detail"]
    assert server.predict(encode(0)).status_code == 200
