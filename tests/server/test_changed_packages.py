"""Whatever becomes of a served package's files, the answers stay right. tests/load has the long form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from processes import Started, start_process
from spoiling import SPOILS, Spoil, ask_while, mend

Encode = Callable[..., bytes]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine directory with a copy of the session's package, which the tests spoil."""
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def started(engine_dir: Path, directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """A process of its own: a file that is mapped and then truncated ends the process that reads it."""
    mend(directory / "tiny-v1", engine_dir / "tiny-v1")
    log = tmp_path_factory.mktemp("log") / "log.json"
    with start_process(
        ["--engine", "tiny", "--engine-dir", str(directory), "--log-format", "json"], log
    ) as it:
        yield it


@pytest.mark.parametrize("spoil", SPOILS)
def test_no_answer_changes_with_the_files(
    started: Started,
    engine_dir: Path,
    directory: Path,
    encode: Encode,
    reference: Callable[..., np.ndarray],
    spoil: Spoil,
) -> None:
    images = [encode(seed) for seed in range(10)]
    folder, original = directory / "tiny-v1", engine_dir / "tiny-v1"

    def disturb() -> None:
        spoil(folder, engine_dir / "other-v1")
        mend(folder, original)

    assert httpx.post(f"{started.url}/engines/tiny/load").status_code == 200  # from the files that change
    expected = {"1": [reference(image) for image in images]}
    assert ask_while(started.url, images, expected, 100, disturb) == {"right": 100}
    assert started.process.poll() is None
    assert started.is_ready()
