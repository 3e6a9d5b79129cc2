"""What the accuracy gate measures, and where its limits are; no student is built for this."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_engine import LABELS, SIDE, write_package

from builder.comparison import Comparison
from builder.compile.verification import Gate, GateError, compare, engine_logits
from builder.kit import VerificationSet
from models.preprocessing import Pixels
from runtime.engine import Engine
from runtime.loading import load_engine


def comparison(right: int, engine_right: int, agreeing: int, images: int) -> Comparison:
    return Comparison(
        images=images,
        originals=images,
        reference_top1=right / images,
        engine_top1=engine_right / images,
        drop=(right - engine_right) / images,
        label_agreement=agreeing / images,
        max_logit_difference=0.0,
    )


@pytest.mark.parametrize(
    ("result", "passes"),
    [
        (comparison(990, 990, 1000, 1000), True),
        (comparison(990, 985, 980, 1000), True),  # both limits to the letter
        (comparison(990, 984, 994, 1000), False),
        (comparison(990, 990, 979, 1000), False),
        (comparison(980, 990, 990, 1000), True),  # better than the reference
    ],
)
def test_gate_is_half_a_point_and_98_percent(result: Comparison, passes: bool) -> None:
    if passes:
        Gate().check(result)
    else:
        with pytest.raises(GateError):
            Gate().check(result)


def test_gate_refuses_what_is_not_a_number() -> None:
    nan = float("nan")
    with pytest.raises(GateError):
        Gate().check(Comparison(10, 10, 1.0, nan, nan, nan, nan))


@settings(deadline=None)  # a busy machine is no failure
@given(
    images=st.integers(1, 2000),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)),
    limits=st.tuples(st.floats(0, 0.2), st.floats(0.5, 1)),
)
def test_gate_that_passes_an_engine_passes_a_better_one(
    images: int, shares: tuple[float, float, float], limits: tuple[float, float]
) -> None:
    right, engine, agreeing = (round(share * images) for share in shares)
    gate = Gate(*limits)
    try:
        gate.check(comparison(right, engine, agreeing, images))
    except GateError:
        return
    gate.check(comparison(right, min(engine + 1, images), min(agreeing + 1, images), images))


def test_the_gate_says_what_is_lost_and_what_may_be() -> None:
    with pytest.raises(GateError) as refusal:
        Gate(max_drop=0.01, min_agreement=0.9).check(comparison(180, 170, 150, 200))

    assert str(refusal.value) == (
        "top-1 falls by 5.00 points (at most 1 allowed); "
        "it agrees with FP32 on 75.00% of the labels (at least 90.00% required); measured on 200 images"
    )


@pytest.fixture(scope="module", params=[(1, 8), (4, 4)], ids=["any batch up to 8", "batches of 4 only"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    least, most = request.param
    package = write_package(tmp_path_factory.mktemp("engine"), min_batch=least, max_batch=most)
    with closing(load_engine(package)) as engine:
        yield engine


@pytest.fixture(scope="module")
def pixels() -> Pixels:
    """More images than one batch takes, and no whole number of batches."""
    return np.random.default_rng(0).integers(0, 256, (19, SIDE, SIDE, 3), dtype=np.uint8)


def test_logits_are_of_each_image_in_order(engine: Engine, pixels: Pixels) -> None:
    logits = engine_logits(engine, pixels)

    assert logits.shape == (19, len(LABELS))
    for image, row in zip(pixels, logits, strict=True):
        np.testing.assert_allclose(engine_logits(engine, image[None])[0], row, atol=1e-4)
    assert len(np.unique(logits.round(3), axis=0)) == 19


def test_shares_are_of_all_images(engine: Engine, pixels: Pixels) -> None:
    """Of 19 images the reference labels two otherwise; three true classes are others than the engine's."""
    logits = engine_logits(engine, pixels)
    labels = logits.argmax(axis=1)
    targets, reference = labels.copy(), logits.copy()
    targets[:3] = (labels[:3] + 1) % len(LABELS)
    reference[[0, 5], (labels[[0, 5]] + 1) % len(LABELS)] = logits.max() + 7

    found = compare(engine, VerificationSet("noise", pixels, targets, reference, len(pixels)))

    assert found.images == 19
    assert found.engine_top1 == pytest.approx(16 / 19)
    assert found.label_agreement == pytest.approx(17 / 19)
    assert found.reference_top1 == pytest.approx(16 / 19)  # right about image 0, wrong about 5
    assert found.max_logit_difference == pytest.approx(np.abs(reference - logits).max(), rel=1e-4)


# What an image is right about


LOGITS = np.array([[3, -1, -1], [-1, 3, -1], [-1, -1, 3], [2, 1, -3]], np.float32)


def labelled(targets: list[int], originals: int = 4) -> VerificationSet:
    pixels = np.zeros((4, 2, 2, 3), np.uint8)
    return VerificationSet("four", pixels, np.array(targets, np.int64), LOGITS, originals)


def test_top1_is_of_the_images_as_they_are_and_the_drop_of_their_copies_too() -> None:
    logits = LOGITS.copy()
    logits[3] = [-1, -1, 5]
    found = labelled([0, 1, 0, 0], originals=2).compare(logits)
    assert (found.images, found.originals) == (4, 2)
    assert (found.reference_top1, found.engine_top1) == (1, 1)
    assert found.drop == pytest.approx(1 / 4)
    assert found.label_agreement == pytest.approx(3 / 4)
    with pytest.raises(GateError, match="measured on 2 images in 2 positions"):
        Gate().check(found)


def test_any_number_of_labels_of_an_image_have_to_be_alike() -> None:
    logits = LOGITS.copy()
    logits[3] = [2, -1, -3]  # the likeliest label is the same, but the second one is not true any more
    images = labelled([0, 1, 2, 0])
    assert images.compare(logits, "softmax").label_agreement == 1
    assert images.compare(logits, "sigmoid").label_agreement == pytest.approx(3 / 4)


def test_images_without_labels_are_judged_by_agreement_alone() -> None:
    found = labelled([-1] * 4).compare(LOGITS)
    assert (found.reference_top1, found.engine_top1, found.drop) == (None, None, None)
    Gate().check(found)
    with pytest.raises(GateError, match=r"agrees with FP32 on 0\.00%"):
        Gate().check(labelled([-1] * 4).compare(-LOGITS))
