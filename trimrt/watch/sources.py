"""Where frames come from: every one of a file, the newest of what is live."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import cv2

from models.errors import TrimRTError
from models.images.process import silence_opencv
from models.naming import nothing_at

_JPEG_QUALITY: Final = 95


class VideoError(TrimRTError):
    """There is no video at the source."""


class Frame(NamedTuple):
    """One frame.

    Attributes:
        image: a JPEG file.
        left_out: frames that came since the one before it, and gave way to it.
    """

    image: bytes
    left_out: int


@contextmanager
def open_source(source: str) -> Iterator[Iterator[Frame]]:
    """The frames of a device's number, an address or a file, until there are no more.

    Of a file every frame is given; of what is live the newest one, whenever the next is asked for.

    Raises:
        VideoError: nothing is there, or no video.
    """
    path = Path(source)
    is_device = source.isascii() and source.isdecimal()
    is_film = not is_device and "://" not in source and (path.is_file() or not path.exists())
    if is_film and not path.exists():
        raise VideoError(nothing_at(path))
    silence_opencv()  # what is wrong is told below
    capture = cv2.VideoCapture(int(source) if is_device else source)
    try:
        if not capture.isOpened():
            raise VideoError(f"{source} cannot be opened as video")
        if is_film:
            yield _every(capture)
        else:
            with _newest(capture) as frames:
                yield frames
    finally:
        capture.release()


def _every(capture: cv2.VideoCapture) -> Iterator[Frame]:
    while True:
        there, picture = capture.read()
        if not there:
            return
        yield Frame(_encoded(picture), 0)


@contextmanager
def _newest(capture: cv2.VideoCapture) -> Iterator[Iterator[Frame]]:
    """Frames of what goes on whether they are taken or not: a thread reads them all."""
    changed = threading.Condition()
    pictures: list[cv2.typing.MatLike] = []  # since the last one was taken, only the newest kept
    came, ended, closed = 0, False, False

    def read() -> None:
        nonlocal came, ended
        while not closed:
            there, picture = capture.read()
            with changed:
                if there:
                    pictures[:] = [picture]
                    came += 1
                ended = not there
                changed.notify()
            if not there:
                return

    def frames() -> Iterator[Frame]:
        nonlocal came
        while True:
            with changed:
                changed.wait_for(lambda: pictures or ended)
                if not pictures:
                    return
                picture, left_out, came = pictures.pop(), came - 1, 0
            yield Frame(_encoded(picture), left_out)

    reader = threading.Thread(target=read, name="camera")
    reader.start()
    try:
        yield frames()
    finally:
        closed = True
        reader.join()


def _encoded(picture: cv2.typing.MatLike) -> bytes:
    """As a JPEG file: an engine here sees what one behind a server does."""
    return cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])[1].tobytes()
