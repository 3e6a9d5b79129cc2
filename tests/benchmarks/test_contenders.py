"""The servers that are compared: pinned, complete, and fed alike."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import benchmarks.contenders
from benchmarks.contenders import PEERS, TRIMRT, Contender
from benchmarks.contenders.classifier import pillow_tensor
from benchmarks.photos import photographs
from models.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, load_pixels

FOLDER = Path(benchmarks.contenders.__file__).parent


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_every_package_of_a_peer_is_pinned(peer: Contender) -> None:
    lines = (FOLDER / peer.name / "requirements.txt").read_text().splitlines()

    assert lines
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9A-Za-z.]+", line) for line in lines)


def test_all_peers_run_the_same_openvino_as_trimrt() -> None:
    files = [FOLDER / peer.name / "requirements.txt" for peer in PEERS]
    files.append(FOLDER.parents[1] / "constraints.txt")

    versions = {re.findall(r"^openvino==(.+)$", file.read_text(), re.MULTILINE)[0] for file in files}

    assert len(versions) == 1


def test_peers_are_measured_in_both_forms_and_trimrt_in_its_own() -> None:
    assert {peer.forms for peer in PEERS} == {("usual", "trimrt")}
    assert TRIMRT.forms == ("trimrt",)


def test_the_usual_preprocessing_sees_what_trimrts_sees() -> None:
    """Else the contenders would not do the same work."""
    file = photographs()[0]
    ours = load_pixels(file, Preprocessing(resize=256, height=224, width=224))

    theirs = pillow_tensor(file)

    assert theirs.shape == (3, 224, 224)
    assert theirs.dtype == np.float32
    levels = 255 * (theirs.transpose(1, 2, 0) * IMAGENET_STD + IMAGENET_MEAN)
    # Another filter and another rounding of the crop, but the same part of the same photograph.
    shifts = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    differences = [np.abs(np.roll(levels, shift, (0, 1)) - ours).mean() for shift in shifts]
    assert shifts[int(np.argmin(differences))] == (0, 0)
    assert min(differences) < 8  # grey levels of 255
