"""2000 requests each while the files of the served package change in every way, and it is loaded again.

The package is an INT8 network, of which OpenVINO uses some numbers where they lie in the blob.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

import httpx
import numpy as np
import pytest
from processes import start_process
from spoiling import SPOILS, Spoil, ask_while, mend, replace

from builder.compile.publication import write_manifest
from models.preprocessing import load_pixels
from runtime.loading import load_engine
from runtime.manifest import Precision, read_manifest

pytestmark = pytest.mark.slow

Encode = Callable[..., bytes]

REQUESTS = 2000
OPTIONS = ("--log-format", "json")
WATCH = ("--watch", "--watch-interval-s", "0.02")


@pytest.fixture(scope="module")
def images(encode: Encode) -> list[bytes]:
    return [encode(seed) for seed in range(50)]


@pytest.fixture
def versions(packages: dict[Precision, Path], tmp_path: Path) -> dict[str, Path]:
    """Packages of one name: an INT8 network, and as its version 2 the same in FP32."""
    name = read_manifest(packages["int8"]).name
    folders = {}
    for version, precision in (("1", "int8"), ("2", "fp32")):
        folders[version] = Path(shutil.copytree(packages[precision], tmp_path / version))
        manifest = read_manifest(folders[version])
        write_manifest(folders[version], manifest.model_copy(update={"name": name, "version": version}))
    return folders


def probabilities(folder: Path, images: Sequence[bytes]) -> list[np.ndarray]:
    """Straight from the engine: no server, no batch."""
    engine = load_engine(folder)
    slot = engine.open_slot()
    rows = []
    for image in images:
        slot.pixels[0] = load_pixels(image, engine.manifest.preprocessing)
        rows.append(slot.infer(1).probabilities[0].copy())
    return rows


@pytest.mark.parametrize("watch", [(), WATCH], ids=["told", "watching"])
@pytest.mark.parametrize("spoil", SPOILS)
def test_no_answer_is_wrong(
    versions: dict[str, Path], tmp_path: Path, images: list[bytes], spoil: Spoil, watch: Sequence[str]
) -> None:
    expected = {version: probabilities(folder, images) for version, folder in versions.items()}
    assert np.abs(np.subtract(expected["1"], expected["2"])).max() > 1e-3
    served = tmp_path / "engines" / "served"
    served.parent.mkdir()
    mend(served, versions["1"])
    name = read_manifest(served).name
    loads: Counter[int] = Counter()
    options = ["--engine", name, "--engine-dir", str(served.parent), *OPTIONS, *watch]
    with start_process(options, tmp_path / "log.json") as started:

        def load() -> None:
            loads[httpx.post(f"{started.url}/engines/{name}/load", timeout=30).status_code] += 1

        def disturb() -> None:
            spoil(served, versions["2"])
            load()
            mend(served, versions["1"])
            load()

        assert ask_while(started.url, images, expected, REQUESTS, disturb) == {"right": REQUESTS}
        assert started.is_ready()
    print(f"{spoil.__name__}: loads by status {dict(loads)}")
    assert loads[200] > 0
    assert set(loads) <= {200, 409}


def test_every_answer_is_that_of_the_version_it_names(
    versions: dict[str, Path], tmp_path: Path, images: list[bytes]
) -> None:
    """A newer and an older version take each other's place, noticed by the watcher."""
    expected = {version: probabilities(folder, images) for version, folder in versions.items()}
    served = tmp_path / "engines" / "served"
    served.parent.mkdir()
    mend(served, versions["1"])
    turns = cycle(reversed(versions.values()))
    with start_process(
        ["--engine-dir", str(served.parent), *OPTIONS, *WATCH], tmp_path / "log.json"
    ) as started:
        asked = ask_while(started.url, images, expected, REQUESTS, lambda: replace(served, next(turns)))
        assert asked == {"right": REQUESTS}
        assert started.is_ready()
