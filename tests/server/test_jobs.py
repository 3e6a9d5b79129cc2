"""What a request and its images are."""

from __future__ import annotations

import numpy as np
import pytest

from server.jobs import Image, Job, Result


@pytest.fixture
def job() -> Job:
    return Job(count=2, admitted=10.0, deadline=20.0, done=lambda _outcome: None, top=1)


def test_an_image_is_dead_from_its_deadline_on(job: Job) -> None:
    image = Image(job, 0, b"")
    assert not image.is_dead(19.9)
    assert image.is_dead(20.0)


def test_an_image_is_dead_once_its_job_is_over(job: Job) -> None:
    image = Image(job, 0, b"")
    job.over = True
    assert image.is_dead(10.0)


def test_each_image_has_its_turn_a_round_after_the_one_before() -> None:
    job = Job(count=2, admitted=10.0, deadline=20.0, done=lambda _outcome: None, top=1, turn=7)
    assert [Image(job, index, b"").turn for index in range(2)] == [7, 8]


def test_a_new_image_has_waited_for_nothing_yet(job: Job) -> None:
    image = Image(job, 1, b"")
    assert image.decoding == image.decoded == image.ready_at == job.admitted
    assert job.remaining == len(job.results) == 2


def test_the_stages_of_a_result_make_up_its_total() -> None:
    empty = np.empty(0, np.float32)
    result = Result(
        probabilities=empty,
        logits=empty,
        order=np.empty(0, np.int64),
        batch_size=1,
        admitted=1.0,
        decoding=2.0,
        decoded=4.0,
        running=8.0,
        computed=16.0,
        delivered=16.5,
        device={},
    )
    assert (result.decode, result.queue, result.inference, result.total) == (2.0, 5.0, 8.0, 15.5)
    assert result.stages() == [
        ("queue for decoding", 1.0, 2.0),
        ("decode", 2.0, 4.0),
        ("queue for inference", 4.0, 8.0),
        ("inference", 8.0, 16.0),
    ]
