"""When an engine is given up, by what its batches say."""

from __future__ import annotations

import pytest

from runtime.cuda import CudaError, DeviceLostError
from runtime.health import EngineLostError, Health
from runtime.manifest import EngineError


@pytest.fixture
def told() -> list[EngineLostError]:
    return []


@pytest.fixture
def health(told: list[EngineLostError]) -> Health:
    return Health("digits", 3, told.append)


def test_a_few_failures_are_borne(health: Health) -> None:
    health.failed(EngineError("once"))
    health.failed(CudaError("twice"))
    assert health.lost is None


def test_failures_between_successes_are_borne_for_ever(
    health: Health, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(10):
        health.failed(EngineError("now and then"))
        health.failed(EngineError("now and then"))
        health.succeeded()
    assert health.lost is None
    assert caplog.text == ""


def test_several_in_a_row_are_too_many(health: Health, told: list[EngineLostError]) -> None:
    for reason in ("first", "second", "third", "fourth"):
        health.failed(EngineError(reason))
    assert health.lost == "digits failed on 3 batches in a row, at last: third"
    assert [str(error) for error in told] == [health.lost]


def test_an_engine_that_works_again_is_back(health: Health) -> None:
    for _ in range(3):
        health.failed(EngineError("for a while"))
    health.succeeded()
    assert health.lost is None
    health.failed(EngineError("again"))
    health.failed(EngineError("and again"))
    assert health.lost is None
    health.failed(EngineError("a third time"))
    assert health.lost == "digits failed on 3 batches in a row, at last: a third time"


def test_a_lost_gpu_is_lost_at_once_and_for_good(health: Health, told: list[EngineLostError]) -> None:
    health.failed(DeviceLostError("cudaErrorIllegalAddress"))
    health.succeeded()
    assert health.lost is not None
    assert "only a restart of the server gets back: cudaErrorIllegalAddress" in health.lost
    assert len(told) == 1
