"""`trimrt predict`: many images at once, and again after an interruption."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image
from processes import TRIMRT
from running import wait_until
from tiny_engine import LABELS, write_graph_that_fails_on_white, write_package

from runtime.finite import NOT_FINITE
from runtime.manifest import MANIFEST_NAME, read_manifest
from trimrt.cli import main
from trimrt.predict.parts import Parts

Encode = Callable[..., bytes]
Reference = Callable[..., np.ndarray]

IMAGES = 30


@pytest.fixture
def tiny(engine_dir: Path) -> Path:
    return engine_dir / "tiny-v1"


@pytest.fixture
def photos(tmp_path: Path, encode: Encode) -> Path:
    folder = tmp_path / "photos"
    for number in range(IMAGES):
        path = folder / f"{number % 3}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(number))
    return folder


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, ["predict", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def refusal(*arguments: object) -> str:
    result = CliRunner().invoke(main, ["predict", *map(str, arguments)])
    assert result.exit_code in (1, 2), result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def rows(path: Path) -> list[dict[str, object]]:
    return pq.read_table(path).to_pylist()


# --- what comes out ---------------------------------------------------------------------------------


def test_every_image_gets_the_row_that_the_engine_gives_it(
    photos: Path, tiny: Path, reference: Reference, tmp_path: Path
) -> None:
    said = run(photos, "--engine", tiny, "--out", tmp_path / "out.parquet")

    table = rows(tmp_path / "out.parquet")
    paths = sorted(str(path) for path in photos.rglob("*.png"))
    assert [row["path"] for row in table] == paths
    for row in table:
        expected = reference(Path(str(row["path"])).read_bytes())
        order = np.argsort(-expected)[:3]
        assert row["top_labels"] == [LABELS[index] for index in order]
        np.testing.assert_allclose(row["top_probabilities"], expected[order], atol=1e-6)
        assert (row["label"], row["index"]) == (LABELS[order[0]], order[0])
        assert row["probability"] == row["top_probabilities"][0]  # type: ignore[index]
        assert row["error"] is None
        assert row["engine"] == "tiny"
        assert row["engine_sha256"] == read_manifest(tiny).provenance.artefact_sha256
    assert f"{IMAGES} images by tiny" in said
    assert not (tmp_path / "out.parquet.parts").exists()


def test_images_that_cannot_be_decoded_get_a_row_that_says_why(
    photos: Path, tiny: Path, encode: Encode, tmp_path: Path
) -> None:
    (photos / "0/damaged.jpg").write_bytes(encode(1, "JPEG")[:100])
    (photos / "0/text.png").write_text("no image")
    (photos / "0/gone.png").symlink_to("nowhere.png")
    (photos / "0/.hidden.png").write_text("left out")
    (photos / "0/notes.txt").write_text("left out")

    said = run(photos, "--engine", tiny, "--out", tmp_path / "out.parquet", "--batch-size", 2)

    failed = {Path(str(row["path"])).name: row for row in rows(tmp_path / "out.parquet") if row["error"]}
    assert sorted(failed) == ["damaged.jpg", "gone.png", "text.png"]
    assert "damaged JPEG" in str(failed["damaged.jpg"]["error"])
    assert "not an image" in str(failed["text.png"]["error"])
    assert "No such file" in str(failed["gone.png"]["error"])
    for row in failed.values():
        assert row["label"] is row["index"] is row["probability"] is row["top_labels"] is None
    assert len(rows(tmp_path / "out.parquet")) == IMAGES + 3
    assert "3 could not be scored" in said
    assert "text.png: not an image" in said


def test_every_other_image_of_a_large_batch_with_a_damaged_one_gets_its_own_row(
    photos: Path, reference: Reference, tmp_path: Path
) -> None:
    engine = write_package(tmp_path, max_batch=IMAGES)
    damaged = sorted(photos.rglob("*.png"))[12]
    damaged.write_text("no image")

    run(photos, "--engine", engine, "--out", tmp_path / "out.parquet")

    table = {Path(str(row["path"])): row for row in rows(tmp_path / "out.parquet")}
    assert "not an image" in str(table.pop(damaged)["error"])
    for path, row in table.items():
        expected = reference(path.read_bytes())
        assert (row["index"], row["error"]) == (np.argmax(expected), None)
        assert row["probability"] == pytest.approx(expected.max(), abs=1e-6)


def test_an_image_of_which_the_engine_computes_no_number_gets_a_row_that_says_so(tmp_path: Path) -> None:
    engine = write_package(tmp_path, write_graph=write_graph_that_fails_on_white)
    images = [tmp_path / f"{grey}.png" for grey in (10, 120, 255, 240)]
    for image in images:
        Image.new("L", (48, 40), int(image.stem)).save(image)

    said = run(*images, "--engine", engine, "--out", tmp_path / "out.parquet")

    table = rows(tmp_path / "out.parquet")
    assert [row["error"] for row in table] == [None, None, NOT_FINITE, None]
    assert table[2]["label"] is table[2]["probability"] is table[2]["top_labels"] is None
    assert all(np.isfinite(table[place]["top_probabilities"]).all() for place in (0, 1, 3))  # type: ignore[arg-type]
    assert "1 could not be scored" in said


def test_the_engines_batches_and_parts_leave_no_trace_in_the_rows(
    photos: Path, tiny: Path, tmp_path: Path
) -> None:
    tables = []
    for number, (batch, part) in enumerate([(1, 1), (8, 7), (8, 1000)]):
        path = tmp_path / f"{number}.parquet"
        run(photos, "--engine", tiny, "--out", path, "--batch-size", batch, "--part-size", part)
        tables.append(rows(path))
    for table in tables[1:]:
        assert [row["top_labels"] for row in table] == [row["top_labels"] for row in tables[0]]
        np.testing.assert_allclose(
            [row["probability"] for row in table], [row["probability"] for row in tables[0]], atol=1e-6
        )


def test_fewer_images_than_the_engines_least_batch(photos: Path, tiny: Path, tmp_path: Path) -> None:
    at_least_4 = Path(shutil.copytree(tiny, tmp_path / "at-least-4"))
    manifest = json.loads((at_least_4 / MANIFEST_NAME).read_text())
    manifest["batch"]["min"] = 4
    (at_least_4 / MANIFEST_NAME).write_text(json.dumps(manifest))
    one = next(photos.rglob("*.png"))

    run(one, "--engine", at_least_4, "--out", tmp_path / "a.parquet")
    run(one, "--engine", tiny, "--out", tmp_path / "b.parquet")

    (few,), (alone,) = rows(tmp_path / "a.parquet"), rows(tmp_path / "b.parquet")
    assert few["top_labels"] == alone["top_labels"]


def test_files_are_scored_once_in_the_order_they_are_named(photos: Path, tiny: Path, tmp_path: Path) -> None:
    named = [photos / "2/05.png", photos / "0/03.png", photos / "2/05.png"]
    run(*named, photos / "0", "--engine", tiny, "--out", tmp_path / "out.parquet")

    paths = [Path(str(row["path"])) for row in rows(tmp_path / "out.parquet")]
    assert paths[:2] == named[:2]
    assert sorted(paths[1:]) == sorted(photos.glob("0/*.png"))


def test_a_pipe_that_nobody_writes_yet_does_not_keep_another_thread_from_reading(
    tiny: Path, encode: Encode, tmp_path: Path
) -> None:
    late, soon = tmp_path / "late.png", tmp_path / "soon.png"
    os.mkfifo(late)
    os.mkfifo(soon)
    command = [TRIMRT, "predict", str(late), str(soon), "--engine", str(tiny), "--batch-size", "1"]
    command += ["--decode-threads", "2", "--out", str(tmp_path / "out.parquet")]
    writer = threading.Thread(target=soon.write_bytes, args=(encode(1),), daemon=True)
    with subprocess.Popen(command) as process:
        writer.start()
        writer.join(60)  # until somebody reads
        if writer.is_alive():
            process.kill()
        else:
            late.write_bytes(encode(2))

    assert process.returncode == 0
    assert [row["error"] for row in rows(tmp_path / "out.parquet")] == [None, None]


def test_an_engine_is_found_by_its_name(photos: Path, engine_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    run(photos, "--engine", "other", "--engine-dir", engine_dir, "--out", out, "--top-k", 10)
    assert {row["engine"] for row in rows(out)} == {"other"}
    assert all(sorted(row["top_labels"]) == sorted(LABELS) for row in rows(out))  # type: ignore[type-var]


def test_csv_says_the_same_with_lists_as_json(photos: Path, tiny: Path, tmp_path: Path) -> None:
    (photos / '0/a,"b".png').write_text("no image")
    run(photos, "--engine", tiny, "--out", tmp_path / "out.csv")
    run(photos, "--engine", tiny, "--out", tmp_path / "out.parquet")

    with (tmp_path / "out.csv").open(newline="") as file:
        for line, row in zip(csv.DictReader(file), rows(tmp_path / "out.parquet"), strict=True):
            assert list(line) == list(row)
            assert line["path"] == row["path"]
            assert line["label"] == (row["label"] or "")
            assert line["error"] == (row["error"] or "")
            assert json.loads(line["top_labels"] or "null") == row["top_labels"]
            assert json.loads(line["top_probabilities"] or "null") == row["top_probabilities"]


# --- Parquet in -------------------------------------------------------------------------------------


def write_parquet(path: Path, columns: dict[str, list[object]], row_group: int = 1000) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=row_group)
    return path


@pytest.mark.parametrize("row_group", [1000, 7])
def test_a_column_of_images(
    tiny: Path, encode: Encode, reference: Reference, tmp_path: Path, row_group: int
) -> None:
    images = [encode(seed) for seed in range(20)]
    file = write_parquet(
        tmp_path / "in.parquet", {"image": [*images, None, b"x"], "number": list(range(22))}, row_group
    )
    out = tmp_path / "out.parquet"

    run(file, "--engine", tiny, "--out", out, "--part-size", 8)
    table = rows(out)
    assert [row["path"] for row in table] == [f"{file}#{number}" for number in range(22)]
    assert [row["index"] for row in table[:20]] == [reference(image).argmax() for image in images]
    assert table[20]["error"] == "there is no image"
    assert "not an image" in str(table[21]["error"])

    run(file, "--engine", tiny, "--out", out, "--id-column", "number", "--restart")
    assert [row["path"] for row in rows(out)] == [str(number) for number in range(22)]


def test_a_column_of_structs_as_hugging_face_writes_them(
    tiny: Path, encode: Encode, reference: Reference, tmp_path: Path
) -> None:
    images = [{"bytes": encode(seed), "path": f"{seed}.png"} for seed in range(3)]
    file = write_parquet(tmp_path / "in.parquet", {"image": images, "label": [0, 1, 2]})
    run(file, "--engine", tiny, "--out", tmp_path / "out.parquet")
    assert [row["index"] for row in rows(tmp_path / "out.parquet")] == [
        reference(encode(seed)).argmax() for seed in range(3)
    ]


def test_a_column_of_paths_beside_the_file(photos: Path, tiny: Path, tmp_path: Path) -> None:
    file = write_parquet(photos / "in.parquet", {"where": ["1/01.png", "2/gone.png"]})
    run(file, "--column", "where", "--engine", tiny, "--out", tmp_path / "out.parquet")
    found, gone = rows(tmp_path / "out.parquet")
    assert found["path"] == "1/01.png"
    assert found["error"] is None
    assert "No such file" in str(gone["error"])


# --- interrupted ------------------------------------------------------------------------------------


@pytest.fixture
def interrupt_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ctrl-C once so many parts are written; 0: no more."""
    write = Parts.write

    def interrupt_after(parts: int) -> None:
        def interrupted(self: Parts, part: int, table: pa.Table) -> None:
            write(self, part, table)
            if part + 1 == parts:
                raise KeyboardInterrupt

        monkeypatch.setattr(Parts, "write", interrupted)

    return interrupt_after


@pytest.fixture
def begun(photos: Path, tiny: Path, tmp_path: Path, interrupt_after: Callable[[int], None]) -> list[object]:
    """The arguments of a run that was interrupted after three of its eight parts."""
    arguments = [
        photos,
        "--engine",
        tiny,
        "--out",
        tmp_path / "out.parquet",
        "--part-size",
        4,
        "--batch-size",
        4,
    ]
    interrupt_after(3)
    result = CliRunner().invoke(main, ["predict", *map(str, arguments)])
    interrupt_after(0)
    assert result.exit_code == 130
    assert f"interrupted: 12 of {IMAGES} images are scored" in result.output
    return arguments


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    parts = folder.glob("part-*.parquet")
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in parts}


def test_the_same_command_goes_on_and_writes_what_one_run_would_have(
    begun: list[object], photos: Path, tiny: Path, tmp_path: Path
) -> None:
    said = run(*begun)
    assert f"{IMAGES - 12} now" in said
    assert "12 before an interruption" in said
    at_once = tmp_path / "at-once.parquet"
    run(photos, "--engine", tiny, "--out", at_once, "--part-size", 4, "--batch-size", 4)
    assert (tmp_path / "out.parquet").read_bytes() == at_once.read_bytes()


@pytest.mark.parametrize("harm", ["truncated", "one byte", "another part's"])
def test_a_part_that_is_not_whole_is_scored_again(begun: list[object], tmp_path: Path, harm: str) -> None:
    part = tmp_path / "out.parquet.parts/part-000001.parquet"
    data = bytearray(part.read_bytes())
    if harm == "truncated":
        part.write_bytes(data[: len(data) // 2])
    elif harm == "one byte":
        data[40] ^= 1
        part.write_bytes(data)
    else:
        shutil.copy(part.with_name("part-000000.parquet"), part)

    assert "8 before an interruption" in run(*begun)
    assert len({row["path"] for row in rows(tmp_path / "out.parquet")}) == IMAGES


def test_a_changed_engine_is_said_with_what_to_do(begun: list[object], engine_dir: Path) -> None:
    said = refusal(*begun, "--engine", engine_dir / "other-v1")
    assert "since then the engine changed" in said
    assert "--restart" in said


def test_changed_images_are_said_with_what_to_do(begun: list[object], photos: Path) -> None:
    os.utime(photos / "1/01.png", ns=(1, 1))
    assert "since then the images changed" in refusal(*begun)
    (photos / "1/01.png").unlink()
    assert "since then the images and --top-k changed" in refusal(*begun, "--top-k", 4)


def test_restart_forgets_what_was_done(begun: list[object], engine_dir: Path, tmp_path: Path) -> None:
    assert f"{IMAGES} now" in run(*begun, "--engine", engine_dir / "other-v1", "--restart")
    assert {row["engine"] for row in rows(tmp_path / "out.parquet")} == {"other"}


def test_an_output_that_is_there_is_kept_unless_told_otherwise(begun: list[object], tmp_path: Path) -> None:
    run(*begun)
    before = (tmp_path / "out.parquet").read_bytes()
    assert "is there already" in refusal(*begun)
    assert (tmp_path / "out.parquet").read_bytes() == before
    run(*begun, "--restart")
    assert (tmp_path / "out.parquet").read_bytes() == before


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_is_stopped_loses_no_part_and_scores_none_twice(
    photos: Path, tiny: Path, encode: Encode, tmp_path: Path, stop: signal.Signals
) -> None:
    # One image is a pipe. Whoever reads it waits until it is written: there the process is stopped.
    pipe, untouched = photos / "1/pipe.png", (0, 0)
    os.mkfifo(pipe)
    os.utime(pipe, ns=untouched)

    def write() -> None:
        pipe.write_bytes(encode(99))  # once somebody reads
        os.utime(pipe, ns=untouched)

    def start(out: Path) -> subprocess.Popen[str]:
        command = [TRIMRT, "predict", str(photos), "--engine", str(tiny), "--out", str(out)]
        command += ["--part-size", "4", "--batch-size", "4"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    out = tmp_path / "out.parquet"
    parts = tmp_path / "out.parquet.parts"
    with start(out) as process:
        wait_until(lambda: len(stamps(parts)) == 5, timeout=60)  # the pipe lies in the sixth
        process.send_signal(stop)
        if stop == signal.SIGINT:
            write()  # what is being decoded is waited for
            _, said = process.communicate(timeout=60)
            assert process.returncode == 130
            assert "interrupted: 20 of 31 images are scored" in said
    assert not out.exists()
    done = stamps(parts)
    assert len(done) == 5

    with start(out) as process, pipe.open("wb") as file:  # it reads: the parts are verified
        assert stamps(parts) == done
        file.write(encode(99))
        file.close()
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "11 now" in said
    assert "20 before an interruption" in said

    os.utime(pipe, ns=untouched)
    writer = threading.Thread(target=write)
    writer.start()
    at_once = tmp_path / "at-once.parquet"
    run(photos, "--engine", tiny, "--out", at_once, "--part-size", 4, "--batch-size", 4)
    writer.join()
    assert out.read_bytes() == at_once.read_bytes()


_INTERRUPTED_IN_A_LOCK = """
import signal, sys, threading
from trimrt.cli import main

entries = int(sys.argv.pop(1))

def watch(frame, event, argument):
    global entries
    if frame.f_code is threading.Condition.__enter__.__code__ and event == "return":
        entries -= 1
        if entries == 0:
            signal.raise_signal(signal.SIGINT)
    return watch

def start_watching(*arguments):
    sys.settrace(watch)
    return score_parts(*arguments)

import trimrt.predict.runs as runs
score_parts, runs.score_parts = runs.score_parts, start_watching
main(sys.argv[1:])
"""
"""Ctrl-C when the main thread has just acquired a condition's lock: the n-th time while it scores."""


@pytest.mark.parametrize("entry", [1, 2, 9])
def test_ctrl_c_in_the_moment_that_a_lock_is_acquired_does_not_leave_it_locked(
    photos: Path, tiny: Path, tmp_path: Path, entry: int
) -> None:
    command = [sys.executable, "-c", _INTERRUPTED_IN_A_LOCK, str(entry), "predict", str(photos)]
    command += ["--engine", str(tiny), "--out", str(tmp_path / "out.parquet"), "--batch-size", "4"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 130
    assert "images are scored" in result.stderr


# --- two at once, and a full disk -------------------------------------------------------------------


def test_a_second_run_on_the_same_output_is_refused_and_disturbs_nothing(
    photos: Path, tiny: Path, encode: Encode, tmp_path: Path
) -> None:
    os.mkfifo(pipe := photos / "1/pipe.png")
    arguments = [str(photos), "--engine", str(tiny), "--out", str(tmp_path / "out.parquet")]
    with (
        subprocess.Popen([TRIMRT, "predict", *arguments], stdout=subprocess.PIPE, text=True) as first,
        pipe.open("wb") as file,  # somebody reads it: the first run is at work
    ):
        for restart in ([], ["--restart"]):
            said = refusal(*arguments, *restart)
            assert "another process is writing" in said
            assert "name another --out" in said
        file.write(encode(99))
        file.close()
        first.communicate(timeout=60)
    assert first.returncode == 0
    assert len(rows(tmp_path / "out.parquet")) == IMAGES + 1
    assert [path.name for path in tmp_path.glob("*out*")] == ["out.parquet"]


@pytest.mark.parametrize(("largest_file", "scored"), [(2, 0), (8, IMAGES)], ids=["a part", "the output"])
def test_a_full_disk_is_one_line_and_loses_nothing(
    photos: Path, tiny: Path, tmp_path: Path, largest_file: int, scored: int
) -> None:
    out = tmp_path / "out.parquet"
    arguments = [
        str(photos),
        "--engine",
        str(tiny),
        "--out",
        str(out),
        "--part-size",
        "4",
        "--batch-size",
        "4",
    ]
    # The largest file that the process may write, KiB: beyond it a write fails as on a full disk.
    limited = ["bash", "-c", f'ulimit -f {largest_file}; exec "$0" "$@"', TRIMRT, "predict", *arguments]
    result = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.strip() == (
        f"Error: File too large: {scored} of {IMAGES} images are scored; "
        "the same command, without --restart, continues"
    )
    assert not out.exists()
    assert f"{IMAGES - scored} now" in run(*arguments)
    at_once = tmp_path / "at-once.parquet"
    run(photos, "--engine", tiny, "--out", at_once, "--part-size", 4, "--batch-size", 4)
    assert out.read_bytes() == at_once.read_bytes()


# --- what is refused --------------------------------------------------------------------------------


def test_inputs_that_do_not_go_together_are_refused(photos: Path, tiny: Path, tmp_path: Path) -> None:
    rest = ("--engine", tiny, "--out", tmp_path / "out.parquet")
    (tmp_path / "empty").mkdir()
    file = write_parquet(tmp_path / "in.parquet", {"a": [b"x"], "b": [b"x"], "n": [1]})
    assert "no images (.avif, .bmp, " in refusal(tmp_path / "empty", *rest)
    assert "scored by itself" in refusal(file, photos, *rest)
    assert "for a Parquet file" in refusal(photos, *rest, "--column", "a")
    assert "choose with --column: a, b, n" in refusal(file, *rest)
    assert "has no column 'c'; it has a, b, n" in refusal(file, *rest, "--column", "c")
    assert "holds int64, neither images nor paths" in refusal(file, *rest, "--column", "n")
    (tmp_path / "no.parquet").write_text("no")
    assert "cannot be read as Parquet" in refusal(tmp_path / "no.parquet", *rest)
    assert "has no rows" in refusal(
        write_parquet(tmp_path / "none.parquet", {"image": pa.array([], pa.binary())}), *rest
    )


def test_sizes_beyond_the_engine_are_refused(photos: Path, tiny: Path, tmp_path: Path) -> None:
    rest = (photos, "--engine", tiny, "--out", tmp_path / "out.parquet")
    assert "takes batches of 1 to 8" in refusal(*rest, "--batch-size", 9)
    assert "knows 10 labels" in refusal(*rest, "--top-k", 11)


def test_an_engine_that_cannot_be_used_leaves_nothing_behind(
    photos: Path, tiny: Path, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(tiny, tmp_path / "damaged"))
    (damaged / "engine.blob").write_bytes(b"damaged")
    before = sorted(tmp_path.iterdir())
    rest = (photos, "--out", tmp_path / "out.parquet")
    assert "damaged or changed" in refusal(*rest, "--engine", damaged)
    assert "no engine 'nobody'" in refusal(*rest, "--engine", "nobody", "--engine-dir", tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_without_pyarrow_it_says_what_to_install(photos: Path, tiny: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['pyarrow'] = None; from trimrt.cli import main; main()"
    arguments = ["predict", str(photos), "--engine", str(tiny), "--out", str(tmp_path / "out.parquet")]
    outcome = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )
    assert outcome.returncode == 1
    assert "pip install 'trimrt[batch]'" in outcome.stderr
