"""The servers that are compared: pinned, complete, and fed alike."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from running import running
from tiny_engine import write_package

import benchmarks.contenders
from benchmarks.answers import ask
from benchmarks.contenders import DIGITS, PEERS, TRIMRT, WAYS, Contender
from benchmarks.contenders.classifier import pillow_tensor
from benchmarks.photos import photographs
from builder.kit import INPUT
from models.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing, load_pixels
from runtime.manifest import MANIFEST_NAME
from server.settings import Settings

FOLDER = Path(benchmarks.contenders.__file__).parent


@pytest.fixture(scope="module")
def digits_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Where an engine of the digits' name is served."""
    package = write_package(tmp_path_factory.mktemp("engines"), DIGITS)
    path = package / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    manifest["input"]["name"] = INPUT  # as the builder calls it
    path.write_text(json.dumps(manifest))
    with running(Settings(engine=str(package), port=0)) as server:
        port = httpx.URL(server.url).port
        assert port is not None
        yield port


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


def test_a_peer_in_several_processes_is_another_one() -> None:
    peer = PEERS[0].with_workers(3)

    assert (peer.name, peer.title) == (PEERS[0].name, f"{PEERS[0].title}, 3 processes")
    assert peer.variables("trimrt", FOLDER, 0)["BENCHMARK_WORKERS"] == "3"
    assert "BENCHMARK_WORKERS" not in PEERS[0].variables("trimrt", FOLDER, 0)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_trimrt_answers_alike_whichever_way_it_is_asked(way: str, digits_port: int) -> None:
    file = photographs(0.05)[0]

    answer = ask(WAYS[way], digits_port, file)

    assert len(answer) == 5
    assert answer == ask(TRIMRT, digits_port, file)


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
