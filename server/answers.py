"""Answers that were given before, for images that are sent again.

Of an image a hash is kept, never the image. Errors are not kept.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from models.preprocessing import Pixels
from runtime.manifest import Manifest
from server.jobs import Result

_OVERHEAD: Final = 1200  # bytes of an entry beside its numbers: its key, three arrays, three dictionaries


class _Answer(NamedTuple):
    probabilities: NDArray[np.float32]
    logits: NDArray[np.float32]
    order: NDArray[np.int64]


def _size_of(answer: _Answer) -> int:
    return _OVERHEAD + sum(numbers.nbytes for numbers in answer)


class Held(NamedTuple):
    """How many answers are kept, and the bytes that they take, of how many they may."""

    answers: int
    bytes: int
    limit: int


class AnswerCache:
    """The answers of all engines; those that were used least recently make room for new ones.

    Args:
        most_bytes: that all of them may take.
    """

    def __init__(self, most_bytes: int) -> None:
        self._answers: LRUCache[bytes, _Answer] = LRUCache(most_bytes, getsizeof=_size_of)

    def of(self, manifest: Manifest) -> EngineAnswers:
        """The answers of the engine that `manifest` describes, to the last letter and its artefact's hash."""
        return EngineAnswers(self._answers, manifest)

    @property
    def held(self) -> Held:
        """What is kept now."""
        answers = self._answers
        return Held(len(answers), int(answers.currsize), int(answers.maxsize))


class EngineAnswers:
    """One engine's answers. All but `keys` is for the event loop's thread alone."""

    def __init__(self, answers: LRUCache[bytes, _Answer], manifest: Manifest) -> None:
        self._answers = answers
        engine = hashlib.sha256(manifest.model_dump_json().encode()).digest()
        # A file and pixels of the same bytes are two images.
        self._of_file = hashlib.sha256(engine + b"file")
        self._of_pixels = hashlib.sha256(engine + b"pixels")

    def keys(self, images: Sequence[bytes | Pixels]) -> list[bytes]:
        """What the answers to `images` are kept by; from any thread."""
        return [self._key(image) for image in images]

    def _key(self, image: bytes | Pixels) -> bytes:
        digest = (self._of_file if isinstance(image, bytes) else self._of_pixels).copy()
        digest.update(image if isinstance(image, bytes) else image.data)
        return digest.digest()

    def find(self, key: bytes, top: int) -> Result | None:
        """The answer kept by `key`, if that ranks `top` classes; in no batch, and all its stages now."""
        answer = self._answers.get(key)
        if answer is None or len(answer.order) < top:
            return None
        now = time.monotonic()
        return Result(*answer, 0, now, now, now, now, now, now, {})

    def keep(self, key: bytes, result: Result) -> None:
        """Keep an answer, unless it is larger than all of them may be."""
        # Copies, for the arrays are rows of their batch's.
        answer = _Answer(result.probabilities.copy(), result.logits.copy(), result.order.copy())
        if _size_of(answer) <= self._answers.maxsize:
            self._answers[key] = answer
