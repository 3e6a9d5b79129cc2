"""Hard cases: which images are kept, with what, and what the folder never does."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from processes import TRIMRT
from running import running, wait_until
from tiny_engine import SIDE

from models.files import locked
from server.settings import Settings

Encode = Callable[..., bytes]


def _settings(engine_dir: Path, folder: Path, **options: Any) -> Settings:
    chosen = {"keep_below": 1, "keep_share": 1, **options}
    return Settings(engine="tiny", engine_dir=engine_dir, port=0, keep=folder, **chosen)


def _cases(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "cases.jsonl").read_text("utf-8").splitlines()]


def test_images_are_kept_with_labels_and_scores(engine_dir: Path, tmp_path: Path, encode: Encode) -> None:
    images = {
        suffix: encode(1, form) for suffix, form in (("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"))
    }
    with running(_settings(engine_dir, tmp_path)) as it:
        said = [it.predict(image).json()["results"][0]["predictions"] for image in images.values()]
    cases = _cases(tmp_path)
    assert [(tmp_path / case["file"]).read_bytes() for case in cases] == list(images.values())
    assert [Path(case["file"]).suffix for case in cases] == [f".{suffix}" for suffix in images]
    for case, predictions in zip(cases, said, strict=True):
        assert (case["engine"], case["version"]) == ("tiny", "1")
        assert [it["label"] for it in case["predictions"]] == [it["label"] for it in predictions]
        for kept, told in zip(case["predictions"], predictions, strict=True):
            assert kept["probability"] == pytest.approx(told["probability"])


def test_pixels_are_kept_as_an_image(engine_dir: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 3), np.uint8)
    tensor = {"name": "pixels", "shape": [1, SIDE, SIDE, 3], "datatype": "UINT8", "data": pixels.tolist()}
    with running(_settings(engine_dir, tmp_path)) as it:
        assert it.client.post("/v2/models/tiny/infer", json={"inputs": [tensor]}).status_code == 200
    (case,) = _cases(tmp_path)
    kept = Image.open(io.BytesIO((tmp_path / case["file"]).read_bytes()))
    np.testing.assert_array_equal(np.array(kept), pixels[0])


def test_only_images_of_which_the_engine_was_unsure_are_kept(
    engine_dir: Path, tmp_path: Path, encode: Encode, reference: Callable[..., np.ndarray]
) -> None:
    images = [encode(seed) for seed in range(20)]
    confidences = [float(reference(image).max()) for image in images]
    below = sorted(confidences)[8] + 1e-6
    with running(_settings(engine_dir, tmp_path, keep_below=below)) as it:
        for image in images:
            it.predict(image)
    kept = {(tmp_path / case["file"]).read_bytes() for case in _cases(tmp_path)}
    assert kept == {image for image, sure in zip(images, confidences, strict=True) if sure < below}


def test_a_share_of_them_is_kept(engine_dir: Path, tmp_path: Path, encode: Encode) -> None:
    with running(_settings(engine_dir, tmp_path, keep_share=0.5)) as it:
        for seed in range(60):
            it.predict(encode(seed))
    assert 10 < len(_cases(tmp_path)) < 50  # beyond which it is once in ten million


def test_an_image_is_kept_once(engine_dir: Path, tmp_path: Path, encode: Encode) -> None:
    for _ in range(2):
        with running(_settings(engine_dir, tmp_path)) as it:
            it.predict(encode(1))
            it.predict(encode(1))
    assert len(_cases(tmp_path)) == len(list((tmp_path / "images").iterdir())) == 1


def test_images_that_were_refused_are_not_kept(engine_dir: Path, tmp_path: Path) -> None:
    with running(_settings(engine_dir, tmp_path)) as it:
        assert it.predict(b"broken").status_code == 400
    assert _cases(tmp_path) == []


def test_a_full_folder_keeps_nothing_more_and_removes_nothing(
    engine_dir: Path, tmp_path: Path, encode: Encode, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/of-before").write_bytes(bytes((1 << 20) - 10))
    with running(_settings(engine_dir, tmp_path, keep_mib=1)) as it:
        assert it.predict(encode(1)).status_code == 200
        wait_until(lambda: any("hard cases is full" in record.message for record in caplog.records))
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["of-before"]
    assert _cases(tmp_path) == []


def test_a_disk_that_is_full_costs_the_case_and_nothing_else(
    engine_dir: Path, tmp_path: Path, encode: Encode, caplog: pytest.LogCaptureFixture
) -> None:
    with running(_settings(engine_dir, tmp_path)) as it:
        (tmp_path / "cases.jsonl").unlink()
        (tmp_path / "cases.jsonl").symlink_to("/dev/full")
        assert it.predict(encode(1)).status_code == 200
        wait_until(lambda: any("No space left" in record.message for record in caplog.records))
        assert it.predict(encode(2)).status_code == 200
    assert list((tmp_path / "images").iterdir()) == []  # none that no line describes


def test_a_folder_that_was_removed_costs_no_answer(
    engine_dir: Path, tmp_path: Path, encode: Encode, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "kept"
    with running(_settings(engine_dir, folder)) as it:
        shutil.rmtree(folder)
        folder.write_text("a file")
        assert it.predict(encode(1)).status_code == 200
        wait_until(lambda: any("could not be kept" in record.message for record in caplog.records))
        assert it.predict(encode(2)).status_code == 200


def test_a_folder_that_cannot_be_made_is_told_before_anything_is_served(
    engine_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    command = [TRIMRT, "serve", "--engine-dir", str(engine_dir), "--engine", "tiny", "--port", "0"]
    done = subprocess.run(
        [*command, "--keep", str(tmp_path / "file/kept")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Not a directory" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_line_that_was_not_finished_is_removed(engine_dir: Path, tmp_path: Path, encode: Encode) -> None:
    (tmp_path / "cases.jsonl").write_bytes(b'{"file": "images/of-before.png"}\n{"file": "images/ab')
    with running(_settings(engine_dir, tmp_path)) as it:
        it.predict(encode(1))
    before, case = _cases(tmp_path)
    assert before == {"file": "images/of-before.png"}
    assert case["engine"] == "tiny"


def test_images_that_wait_to_be_written_are_bounded(
    engine_dir: Path, tmp_path: Path, encode: Encode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.keeping._MOST_WAITING", 3)
    with running(_settings(engine_dir, tmp_path)) as it, locked(tmp_path / "cases.jsonl"):  # none is written
        for seed in range(10):
            assert it.predict(encode(seed)).status_code == 200
    assert len(_cases(tmp_path)) == 3


def test_the_folder_is_for_the_servers_user_alone(engine_dir: Path, tmp_path: Path, encode: Encode) -> None:
    folder = tmp_path / "new/folder"
    with running(_settings(engine_dir, folder)) as it:
        it.predict(encode(1))
    (case,) = _cases(folder)
    for path in (folder / "cases.jsonl", folder / case["file"]):
        assert path.stat().st_mode & 0o077 == 0


def test_without_the_setting_no_image_is_stored(engine_dir: Path, tmp_path: Path, encode: Encode) -> None:
    with running(Settings(engine="tiny", engine_dir=engine_dir, port=0)) as it:
        it.predict(encode(1))
        assert it.service.telemetry.observers == []
