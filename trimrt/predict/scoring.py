"""An engine at work on batch after batch: decoding threads run ahead of its slots."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.preprocessing import ImageError, Pixels, Preprocessing, load_pixels
from runtime.engine import Engine, Options, Slot
from runtime.finite import NOT_FINITE, finite_rows
from runtime.loading import load_engine
from runtime.ranking import ranked
from runtime.signatures import ANYONE, Trust
from runtime.threads import start_in_engine_thread
from trimrt.predict.sources import Item

_AT_ONCE: Final = 8  # images for a decoding thread; to hand over one takes as long as to decode a small one
_SMALL_BYTES: Final = 4096  # a file, on average: up to here Python takes longer than the decoder (a guess)
_TURN_SECONDS: Final = 0.005  # to wait for a turn; to read and decode eight small files takes a tenth
_READ_BYTES: Final = 1 << 16  # at once


@dataclass(frozen=True)
class Workload:
    """How to score.

    Attributes:
        engine: folder of the engine package.
        top_k: labels to give for each image.
        batch_size: images in a batch, at most the engine's.
        decode_threads: threads that read and decode.
        slots: batches that run at once; None: the engine's choice.
        threads: CPU threads that a CPU engine computes with; None: all.
        trust: whose packages are used.
    """

    engine: Path
    top_k: int
    batch_size: int
    decode_threads: int
    slots: int | None = None
    threads: int | None = None
    trust: Trust = ANYONE


class Rows(NamedTuple):
    """The results of one batch, in its order.

    Attributes:
        paths: what the images are called.
        indices: `int32` of shape `(count, top_k)`: classes, likeliest first; -1 where there is no result.
        probabilities: `float32` of the same shape.
        errors: why there is no result, or None.
    """

    paths: list[str]
    indices: NDArray[np.int32]
    probabilities: NDArray[np.float32]
    errors: list[str | None]


class _Decoded(NamedTuple):
    """Some images of a batch.

    Attributes:
        pixels: `uint8` of shape `(good, height, width, 3)`, of those that could be decoded.
        errors: why an image could not, or None.
    """

    pixels: Pixels
    errors: list[str | None]


class _Batch(NamedTuple):
    items: Sequence[Item]
    decoding: list[Future[_Decoded]]
    rows: Future[Rows]


@contextmanager
def open_scorer(workload: Workload) -> Iterator[Scorer]:
    """A scorer, with its engine loaded and its slots open until the block ends.

    Raises:
        EngineError: the package is refused, or no slot can be opened.
    """
    options = Options(slots=workload.slots, threads=workload.threads, trust=workload.trust)
    engine = load_engine(workload.engine, options)
    decoders = ThreadPoolExecutor(workload.decode_threads, "trimrt-decode")
    scorer = Scorer(workload, engine, decoders)
    opened: list[Future[None]] = [Future() for _ in range(engine.slots)]
    slots = [start_in_engine_thread(partial(scorer.run_slot, future)) for future in opened]
    try:
        for future in opened:
            future.result()
        yield scorer
    finally:
        decoders.shutdown(cancel_futures=True)  # so that slots skip the remaining batches
        for _ in slots:
            scorer.batches.put(None)
        for slot in slots:
            slot.result()
        engine.close()


class Scorer:
    """An engine, threads that decode for it, and the batches on their way to its slots."""

    def __init__(self, workload: Workload, engine: Engine, decoders: ThreadPoolExecutor) -> None:
        self.batches: SimpleQueue[_Batch | None] = SimpleQueue()
        self._turns = Lock()
        self._top_k = workload.top_k
        self._engine = engine
        self._decoders = decoders

    def score(self, batches: Iterable[Sequence[Item]]) -> Iterator[Rows]:
        """The results of `batches`, in their order; a few more are read and decoded ahead.

        Args:
            batches: of at most the workload's size.

        Raises:
            EngineError: the engine failed.
        """
        ahead: deque[Future[Rows]] = deque()
        for items in batches:
            decoding = [
                self._decoders.submit(self._decode, items[start : start + _AT_ONCE])
                for start in range(0, len(items), _AT_ONCE)
            ]
            batch = _Batch(items, decoding, Future())
            self.batches.put(batch)
            ahead.append(batch.rows)
            if len(ahead) > self._engine.slots + 1:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _decode(self, items: Sequence[Item]) -> _Decoded:
        """Read and decode some images.

        That is nearly all Python's work if they are small. Threads that did it at the same time would wake
        each other for the interpreter's lock at every system call, so they take turns.
        """
        with _turn(self._turns):
            files = [_content(item) for item in items]
            if sum(map(len, files)) <= _SMALL_BYTES * len(files):
                return self._decode_files(files)
        return self._decode_files(files)

    def _decode_files(self, files: Sequence[bytes | str]) -> _Decoded:
        spec = self._engine.manifest.preprocessing
        pixels = np.empty((len(files), spec.height, spec.width, 3), np.uint8)
        errors = [_load(file, spec, row) for file, row in zip(files, pixels, strict=True)]
        good = [error is None for error in errors]
        return _Decoded(pixels if all(good) else pixels[good], errors)

    def run_slot(self, opened: Future[None]) -> None:
        """Open a slot and run batches in it until there is a None among them."""
        try:
            slot = self._engine.open_slot()
        except BaseException as error:
            opened.set_exception(error)
            return
        opened.set_result(None)
        try:
            while batch := self.batches.get():
                try:
                    batch.rows.set_result(
                        self._run(slot, batch.items, [future.result() for future in batch.decoding])
                    )
                except BaseException as error:  # raised where the rows are waited for
                    batch.rows.set_exception(error)
        finally:
            slot.close()

    def _run(self, slot: Slot, items: Sequence[Item], decoded: Sequence[_Decoded]) -> Rows:
        errors = [error for part in decoded for error in part.errors]
        good = [number for number, error in enumerate(errors) if error is None]
        indices = np.full((len(items), self._top_k), -1, np.int32)
        probabilities = np.zeros(indices.shape, np.float32)
        if good:
            np.concatenate([part.pixels for part in decoded], out=slot.pixels[: len(good)])
            # A plan may have a least batch size; what lies in the rows beyond is ignored.
            outputs = slot.infer(max(len(good), self._engine.manifest.batch.min))
            logits, shares = outputs.logits[: len(good)], outputs.probabilities[: len(good)]
            finite = finite_rows(logits, shares)
            for number, is_finite in zip(good, finite, strict=True):
                errors[number] = None if is_finite else NOT_FINITE
            order = ranked(logits[finite], self._top_k)
            scored = np.array(good)[finite]
            indices[scored] = order
            probabilities[scored] = np.take_along_axis(shares[finite], order, axis=1)
        return Rows([item.path for item in items], indices, probabilities, errors)


@contextmanager
def _turn(turns: Lock) -> Iterator[None]:
    """Hold `turns` in the block, unless it takes long to get: somebody may wait for a pipe or a disk."""
    held = turns.acquire(timeout=_TURN_SECONDS)
    try:
        yield
    finally:
        if held:
            turns.release()


def _content(item: Item) -> bytes | str:
    """The encoded image, or why there is none."""
    if item.image is None:
        return "there is no image"
    if isinstance(item.image, bytes):
        return item.image
    try:
        return _read(item.image)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except Exception as error:  # a name with a null character, say
        return f"cannot be decoded: {error}"


def _read(path: str) -> bytes:
    """The content of a file, in half the time that `open` takes for a small one."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return b"".join(iter(partial(os.read, descriptor, _READ_BYTES), b""))
    finally:
        os.close(descriptor)


def _load(file: bytes | str, spec: Preprocessing, out: Pixels) -> str | None:
    """Write the image's pixels to `out`; why there are none, or None."""
    if isinstance(file, str):
        return file
    try:
        load_pixels(file, spec, out=out)
    except ImageError as error:
        return str(error)
    except Exception as error:  # one image is no reason to give up the others
        return f"cannot be decoded: {error}"
    return None
