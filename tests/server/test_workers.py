"""One slot's thread: batches in, outcomes out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
from gated_engine import Gate, load_gated
from running import wait_until

from models.preprocessing import Pixels
from runtime.engine import Engine
from runtime.manifest import EngineError
from runtime.threads import start_in_engine_thread
from server.backlog import Backlog
from server.decoding import Decoder
from server.decoding_limits import DecodingLimits
from server.jobs import Computed, Failed, Image, Job, Outcome
from server.settings import Settings
from server.workers import Worker

Encode = Callable[..., bytes]


class Inbox:
    """Where a test finds outcomes, and how each was handed over."""

    def __init__(self) -> None:
        self._outcomes: SimpleQueue[Outcome] = SimpleQueue()
        self.on_this_core: list[bool] = []

    def leave(self, outcome: Outcome, *, on_this_core: bool = False) -> None:
        self.on_this_core.append(on_this_core)
        self._outcomes.put(outcome)

    def next(self) -> Outcome:
        return self._outcomes.get(timeout=20)


def images(*files: bytes | Pixels, top: int = 1) -> list[Image]:
    """As requests of one image each."""
    now = time.monotonic()
    return [Image(Job(1, now, now + 60, lambda _outcome: None, top), 0, file) for file in files]


@contextmanager
def working(engine: Engine, backlog: Backlog, outcomes: Inbox) -> Iterator[list[Future[None]]]:
    """A worker for each slot of the engine; in the end each has ended by itself."""
    decoder = Decoder(engine.manifest.preprocessing, DecodingLimits(Settings()))
    workers = [Worker(engine, backlog, outcomes, decoder, gives_way=False) for _ in range(engine.slots)]
    runs = [start_in_engine_thread(worker.run) for worker in workers]
    try:
        yield [worker.opened for worker in workers]
    finally:
        backlog.close()
        for run in runs:
            run.result(timeout=20)
        engine.close()


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def engine(engine_dir: Path, gate: Gate) -> Engine:
    return load_gated(gate, on_cpu=True)(engine_dir / "tiny-v1")


def test_each_image_gets_its_own_row(
    engine: Engine, encode: Encode, reference: Callable[[bytes], np.ndarray]
) -> None:
    backlog, outcomes = Backlog(slots=1, most=4), Inbox()
    files = [encode(seed) for seed in range(3)]
    put = images(*files, top=2)
    backlog.put(put)
    with working(engine, backlog, outcomes):
        batch = outcomes.next()
    assert isinstance(batch, Computed)
    assert batch.images == put
    for row, file in enumerate(files):
        np.testing.assert_allclose(batch.probabilities[row], reference(file), atol=1e-5)
        assert batch.order[row].tolist() == reference(file).argsort()[::-1][:2].tolist()
    for image in put:
        assert image.job.admitted < image.decoding < image.decoded < batch.started < batch.finished


def test_as_many_classes_are_ranked_as_any_image_of_the_batch_needs(engine: Engine, encode: Encode) -> None:
    backlog, outcomes = Backlog(slots=1, most=4), Inbox()
    backlog.put([*images(encode(0), top=1), *images(encode(1), top=3)])
    with working(engine, backlog, outcomes):
        batch = outcomes.next()
    assert isinstance(batch, Computed)
    assert batch.order.shape == (2, 3)


def test_a_slot_is_alone_only_if_nothing_waits(engine: Engine, gate: Gate, encode: Encode) -> None:
    backlog, outcomes = Backlog(slots=1, most=1), Inbox()
    gate.close()
    gate.allow(2)
    backlog.put(images(encode(0), encode(1)))
    with working(engine, backlog, outcomes):
        outcomes.next(), outcomes.next()
    assert gate.alone == [False, True]


def test_pixels_are_not_decoded(engine: Engine, encode: Encode) -> None:
    backlog, outcomes = Backlog(slots=1, most=4), Inbox()
    file = encode(0)
    decoder = Decoder(engine.manifest.preprocessing, DecodingLimits(Settings()))
    (encoded,) = images(file)
    (ready,) = images(decoder.decode(encoded))
    backlog.put([encoded, ready])
    with working(engine, backlog, outcomes):
        batch = outcomes.next()
    assert isinstance(batch, Computed)
    np.testing.assert_array_equal(batch.logits[0], batch.logits[1])
    assert ready.decoding == ready.decoded == ready.job.admitted


def test_an_image_that_cannot_be_decoded_fails_alone(engine: Engine, encode: Encode) -> None:
    backlog, outcomes = Backlog(slots=1, most=4), Inbox()
    good, damaged, other = images(encode(0), encode(1)[:60], encode(2))
    backlog.put([good, damaged, other])
    with working(engine, backlog, outcomes):
        failed, computed = outcomes.next(), outcomes.next()
    assert isinstance(failed, Failed)
    assert (failed.images, failed.problem.name) == ([damaged], "image-damaged")
    assert isinstance(computed, Computed)
    assert computed.images == [good, other]


def test_a_batch_that_fails_is_handed_over_whole_and_the_next_one_runs(
    engine: Engine, gate: Gate, encode: Encode
) -> None:
    backlog, outcomes = Backlog(slots=1, most=2), Inbox()
    gate.close()
    gate.fail_next = True
    gate.allow(2)
    put = images(encode(0), encode(1), encode(2))
    backlog.put(put)
    with working(engine, backlog, outcomes):
        failed, computed = outcomes.next(), outcomes.next()
    assert isinstance(failed, Failed)
    assert (failed.images, failed.problem.name) == (put[:2], "inference-failed")
    assert isinstance(computed, Computed)
    assert computed.images == put[2:]


def test_a_slot_has_its_next_batch_before_the_event_loop_answers_the_last(
    engine: Engine, gate: Gate, encode: Encode
) -> None:
    backlog, left = Backlog(slots=1, most=1), []

    class Watching(Inbox):
        def leave(self, outcome: Outcome, *, on_this_core: bool = False) -> None:
            left.append(backlog.waiting)
            super().leave(outcome, on_this_core=on_this_core)

    outcomes = Watching()
    backlog.put(images(encode(0), encode(1)))
    with working(engine, backlog, outcomes):
        outcomes.next(), outcomes.next()
    assert left == [0, 0]


def test_the_event_loop_is_woken_on_the_core_of_a_slot_while_other_slots_compute(
    engine_dir: Path, gate: Gate, encode: Encode
) -> None:
    backlog, outcomes = Backlog(slots=2, most=1), Inbox()
    with working(load_gated(gate, slots=2, on_cpu=True)(engine_dir / "tiny-v1"), backlog, outcomes):
        wait_until(lambda: backlog.sleeping == 2)
        gate.close()
        backlog.put(images(encode(0), encode(1)))
        gate.wait_for_arrivals(2)
        gate.allow(1)
        outcomes.next()
        assert outcomes.on_this_core == [True]
        wait_until(lambda: backlog.sleeping == 1)
        gate.open()
        outcomes.next()
        assert outcomes.on_this_core == [True, False]


def test_a_slot_that_cannot_be_opened_is_an_error_and_ends_its_worker(engine: Engine) -> None:
    class Full:
        slots = 1
        manifest = engine.manifest
        close = engine.close

        def open_slot(self) -> None:
            raise EngineError("out of memory")

    with (
        working(Full(), Backlog(slots=1, most=1), Inbox()) as (opened,),
        pytest.raises(EngineError, match="out of memory"),
    ):
        opened.result(timeout=20)


def test_a_slot_is_used_and_closed_by_the_thread_that_opened_it(engine: Engine, encode: Encode) -> None:
    threads: list[tuple[str, int]] = []
    open_slot = engine.open_slot

    def opened():
        slot = open_slot()
        for name in ("infer", "close"):
            method = getattr(slot, name)

            def noted(*args, name=name, method=method, **options):
                threads.append((name, threading.get_ident()))
                return method(*args, **options)

            setattr(slot, name, noted)
        threads.append(("open", threading.get_ident()))
        return slot

    engine.open_slot = opened
    backlog, outcomes = Backlog(slots=1, most=1), Inbox()
    backlog.put(images(encode(0)))
    with working(engine, backlog, outcomes):
        outcomes.next()
    assert [name for name, _ in threads] == ["open", "infer", "close"]
    assert len({thread for _, thread in threads}) == 1
