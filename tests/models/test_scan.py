"""What is made of folders as archives, operating systems, cameras and people leave them."""

from __future__ import annotations

import io
import os
import shutil
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from models.bars import bars_in, for_each
from models.datasets import DatasetError, DataSplit, open_dataset, reopen_dataset
from models.images.wholeness import looks_whole
from models.preprocessing import Preprocessing
from trimrt.compress import compress

SPEC = Preprocessing(resize=24, height=24, width=24)
RAW = b"II*\0" + bytes(40)

rng = np.random.default_rng(0)


def encoded(image_format: str = "JPEG") -> bytes:
    """A picture like no other."""
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8)).save(buffer, image_format)
    return buffer.getvalue()


def write(folder: Path, *, classes: tuple[str, ...] = ("cat", "dog"), images: int = 10) -> Path:
    for label in classes:
        inner = Path(os.fsdecode(os.fsencode(folder / label)))
        inner.mkdir(parents=True, exist_ok=True)
        for index in range(images):
            (inner / f"IMG_{index}.jpg").write_bytes(encoded())
    return folder


def opened(folder: Path) -> DataSplit:
    data = open_dataset(str(folder))
    for part in (data.train, data.validation, data.test):
        part.load_pixels(SPEC)
    return data


def total(data: DataSplit) -> int:
    return len(data.train) + len(data.validation) + len(data.test)


def told(data: DataSplit) -> str:
    """The summary in one line."""
    assert all(len(line) < 80 for line in data.summary)
    return " ".join(" ".join(data.summary).split())


def refusal(folder: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        open_dataset(str(folder))
    return " ".join(str(caught.value).split())


class TestParts:
    @pytest.mark.parametrize(
        ("train", "test"),
        [
            ("train", "test"),
            ("Train", "Test"),
            ("TRAIN", "VAL"),
            ("Training", "Testing"),
            ("training_set", "test_set"),
            ("seg_train", "seg_test"),
            ("seg_train/seg_train", "seg_test/seg_test"),
            ("train_images", "Validation"),
            ("asl_alphabet_train", "asl_alphabet_test"),
            ("01-train", "02-dev"),
        ],
    )
    def test_are_known_by_common_spellings(self, tmp_path: Path, train: str, test: str) -> None:
        write(tmp_path / train)
        write(tmp_path / test, images=3)
        data = opened(tmp_path)
        assert (data.labels, data.fold, len(data.test)) == (("cat", "dog"), None, 6)
        assert {path.relative_to(tmp_path).parts[0] for path in data.test.paths} == {test.split("/")[0]}
        assert f"{train.split('/')[0]}/ and {test.split('/')[0]}/ as they came" in data.description

    def test_may_be_wrapped_in_a_folder_as_archives_are(self, tmp_path: Path) -> None:
        write(tmp_path / "archive" / "photos" / "train")
        write(tmp_path / "archive" / "photos" / "test", images=3)
        (tmp_path / "__MACOSX").mkdir()
        data = opened(tmp_path)
        assert (len(data.test), data.fold) == (6, None)
        assert "programs (1): __MACOSX" in told(data)

    def test_without_labels_are_not_used_and_that_is_told(self, tmp_path: Path) -> None:
        write(tmp_path / "train")
        write(tmp_path / "val", images=3)
        (tmp_path / "test").mkdir()
        (tmp_path / "test" / "1.jpg").write_bytes(encoded())
        data = opened(tmp_path)
        assert len(data.test) == 6
        assert "not used: folders beside the parts (1): test" in told(data)

    def test_test_comes_before_val(self, tmp_path: Path) -> None:
        for part in ("train", "val", "test"):
            write(tmp_path / part, images=4 if part == "test" else 6)
        data = opened(tmp_path)
        assert len(data.test) == 8
        assert "folders beside the parts (1): val" in told(data)

    def test_a_class_may_be_called_train(self, tmp_path: Path) -> None:
        data = opened(write(tmp_path, classes=("bus", "train", "test")))
        assert data.labels == ("bus", "test", "train")

    def test_that_cannot_be_told_apart_are_named(self, tmp_path: Path) -> None:
        for part in ("a_train", "b_train", "test"):
            write(tmp_path / part, images=2)
        assert "which of a_train, b_train is meant?" in refusal(tmp_path)

    def test_to_test_on_alone_are_no_classes(self, tmp_path: Path) -> None:
        write(tmp_path / "Test")
        write(tmp_path / "Val")
        assert "has Test/, Val/ but no train/" in refusal(tmp_path)

    def test_that_share_images_are_told(self, tmp_path: Path) -> None:
        write(tmp_path / "train")
        write(tmp_path / "test", images=3)
        shutil.copy(tmp_path / "train/cat/IMG_1.jpg", tmp_path / "test/cat/other.jpg")
        text = told(opened(tmp_path))
        assert "WARNING: test images that are training images too" in text
        assert "(1): train/cat/IMG_1.jpg = test/cat/other.jpg" in text


class TestWhatIsNoImage:
    @pytest.mark.parametrize(
        "name",
        [
            "cat/Thumbs.db",
            "cat/.DS_Store",
            "cat/desktop.ini",
            "cat/._IMG_1.jpg",
            "__MACOSX/cat/IMG_1.jpg",
            "cat/@eaDir/IMG_1.jpg/SYNOPHOTO_THUMB_XL.jpg",
            "cat/.ipynb_checkpoints/IMG_1-checkpoint.jpg",
            "$RECYCLE.BIN/cat/IMG_1.jpg",
            ".git/cat/IMG_1.jpg",
        ],
    )
    def test_what_systems_leave_is_passed_over_and_named(self, tmp_path: Path, name: str) -> None:
        write(tmp_path)
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded())
        data = opened(tmp_path)
        assert (total(data), data.labels) == (20, ("cat", "dog"))
        assert "files and folders of operating systems and programs (1): " in told(data)

    def test_other_files_empty_folders_and_loose_images_are_named(self, tmp_path: Path) -> None:
        write(tmp_path)
        (tmp_path / "notes.txt").write_text("")
        (tmp_path / "dog" / "IMG_1.mov").write_bytes(b"")
        (tmp_path / "empty").mkdir()
        (tmp_path / "lost.jpg").write_bytes(encoded())
        data = opened(tmp_path)
        assert total(data) == 20
        text = told(data)
        assert "20 images, of 2 classes" in text
        assert "not images by their names (2): dog/IMG_1.mov, notes.txt" in text
        assert "folders without images (1): empty" in text
        assert "images in no class folder (1): lost.jpg" in text

    def test_many_are_three_and_a_number(self, tmp_path: Path) -> None:
        write(tmp_path)
        for index in range(9):
            (tmp_path / "cat" / f"{index}.txt").write_text("")
        assert "names (9): cat/0.txt, cat/1.txt, cat/2.txt, 6 more" in told(opened(tmp_path))


class TestImages:
    def test_jfif_is_an_image(self, tmp_path: Path) -> None:
        write(tmp_path)
        for path in list((tmp_path / "cat").iterdir())[:5]:
            path.rename(path.with_suffix(".jfif"))
        assert total(opened(tmp_path)) == 20

    def test_of_phones_are_images(self, tmp_path: Path) -> None:
        write(tmp_path)
        for name, image_format in (("IMG_1.HEIC", "HEIF"), ("DSC_2.HIF", "HEIF"), ("c.avif", "AVIF")):
            (tmp_path / "cat" / name).write_bytes(encoded(image_format))
        assert total(opened(tmp_path)) == 23

    def test_of_phones_name_the_extra_that_they_need_in_one_line(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(tmp_path)
        for index in range(3):
            (tmp_path / "cat" / f"IMG_{index}.HEIC").write_bytes(encoded("HEIF"))
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
        needed = "HEIC photographs need pillow-heif, which is not installed: pip install 'trimrt[heif]'"
        assert f"{needed} (3): cat/IMG_0.HEIC, cat/IMG_1.HEIC, cat/IMG_2.HEIC" in refusal(tmp_path)

    def test_in_linked_folders_count(self, tmp_path: Path) -> None:
        write(tmp_path / "store")
        for label in ("cat", "dog"):
            (tmp_path / "data" / label).mkdir(parents=True)
            (tmp_path / "data" / label / "batch").symlink_to(tmp_path / "store" / label)
            (tmp_path / "data" / label / "loop").symlink_to(tmp_path / "data" / label)
        assert total(opened(tmp_path / "data")) == 20

    def test_copies_are_told_within_a_class_and_across(self, tmp_path: Path) -> None:
        write(tmp_path)
        shutil.copy(tmp_path / "cat/IMG_0.jpg", tmp_path / "cat/copy.jpg")
        shutil.copy(tmp_path / "cat/IMG_1.jpg", tmp_path / "dog/wrong.jpg")
        text = told(opened(tmp_path))
        assert "WARNING: copies of an image, of which some may train and others test (1)" in text
        assert "cat/copy.jpg = cat/IMG_0.jpg" in text
        assert "WARNING: images that are in two classes (1): dog/wrong.jpg = cat/IMG_1.jpg" in text

    def test_larger_than_a_server_takes_are_used(self, tmp_path: Path) -> None:
        write(tmp_path)
        Image.new("L", (12_000, 9_000)).save(tmp_path / "cat" / "panorama.jpg")
        assert total(opened(tmp_path)) == 21


class TestNames:
    def test_of_images_may_be_in_any_encoding(self, tmp_path: Path) -> None:
        write(tmp_path)
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/cat/caf\xe9.jpg")).write_bytes(encoded())
        data = opened(tmp_path)
        assert total(data) == 21
        assert data.card().model_dump_json()

    def test_of_classes_may_be_in_another_encoding(self, tmp_path: Path) -> None:
        data = opened(write(tmp_path, classes=(os.fsdecode(b"caf\xe9"), "dog")))
        assert data.labels == ("café", "dog")
        assert "not UTF-8; read as café" in told(data)

    def test_of_classes_are_the_same_from_a_mac_and_from_linux(self, tmp_path: Path) -> None:
        write(tmp_path / "train", classes=(unicodedata.normalize("NFC", "café"), "dog"))
        write(tmp_path / "test", classes=(unicodedata.normalize("NFD", "café"), "dog"), images=3)
        assert opened(tmp_path).labels == ("café", "dog")

    def test_of_classes_that_only_a_computer_tells_apart_are_told(self, tmp_path: Path) -> None:
        """Two people's folders, put together: a network would learn who took the photograph."""
        cats, signs = ("cat", "Cat"), ("stop_sign", "stop sign ")
        data = opened(write(tmp_path, classes=(*cats, *signs, "a", "A", "dog"), images=5))
        text = told(data)
        assert "WARNING: classes whose names are nearly the same: 'Cat', 'cat'" in text
        assert "nearly the same: 'stop sign ', 'stop_sign'" in text
        assert text.count("nearly the same") == 2
        assert len(data.labels) == 7

    def test_of_folders_by_year_around_the_classes_are_told_to_be_the_classes(self, tmp_path: Path) -> None:
        for year in ("2023", "2024"):
            write(tmp_path / year)
        data = opened(tmp_path)
        assert data.labels == ("2023", "2024")
        told_of = "folders within a class folder are no classes; their images count as its own (4): "
        assert told_of + "2023/cat, 2023/dog, 2024/cat" in told(data)

    def test_of_one_folder_in_a_class_folder_are_not_worth_a_line(self, tmp_path: Path) -> None:
        write(tmp_path, classes=("cat/photos", "dog/photos"))
        assert "folders within" not in told(opened(tmp_path))

    def test_of_the_whole_folder_has_to_be_text_for_the_card_says_it(self, tmp_path: Path) -> None:
        folder = write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")))
        assert "café: the name of this folder is not UTF-8; rename it" in refusal(folder)


def cut(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def zeroed(data: bytes) -> bytes:
    return cut(data) + bytes(len(data) - len(cut(data)))


DAMAGE: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "no image": lambda: b"<html>not found</html>",
    "JPEG cut": lambda: cut(encoded()),
    "JPEG with zeros": lambda: zeroed(encoded()),
    "PNG cut": lambda: cut(encoded("PNG")),
    "PNG with zeros": lambda: zeroed(encoded("PNG")),
    "WebP cut": lambda: cut(encoded("WEBP")),
    "BMP cut": lambda: cut(encoded("BMP")),
    "GIF cut": lambda: cut(encoded("GIF")),
    "TIFF cut": lambda: encoded("TIFF")[:5000],
    "HEIC cut": lambda: cut(encoded("HEIF")),
    "HEIC with zeros": lambda: zeroed(encoded("HEIF")),
    "AVIF cut": lambda: cut(encoded("AVIF")),
}


class TestDamage:
    def test_all_damaged_files_are_named_at_once_with_the_way_out(self, tmp_path: Path) -> None:
        write(tmp_path)
        for index, damaged in enumerate(DAMAGE.values()):
            (tmp_path / "dog" / f"damaged{index}.jpg").write_bytes(damaged())
        (tmp_path / "cat" / "link.jpg").symlink_to(tmp_path / "gone.jpg")
        text = refusal(tmp_path)
        assert f"{len(DAMAGE) + 1} files cannot be read" in text
        assert "--on-damaged skip" in text
        assert all(f"dog/damaged{index}.jpg" in text for index in range(len(DAMAGE)))
        assert "a link to a file that is not there (1): cat/link.jpg" in text

    @pytest.mark.parametrize("kind", DAMAGE)
    def test_each_kind_is_found_by_the_scan(self, tmp_path: Path, kind: str) -> None:
        write(tmp_path)
        (tmp_path / "dog" / "damaged.png").write_bytes(DAMAGE[kind]())
        assert "dog/damaged.png" in refusal(tmp_path)

    def test_damaged_files_can_be_left_out(self, tmp_path: Path) -> None:
        write(tmp_path)
        whole = open_dataset(str(tmp_path))
        (tmp_path / "dog" / "damaged.jpg").write_bytes(cut(encoded()))
        data = open_dataset(str(tmp_path), on_damaged="skip")
        assert data.damaged == 1
        assert data.sha256 == whole.sha256
        assert "not used: files that cannot be read (1):" in told(data)
        data.train.load_pixels(SPEC)

    def test_what_was_left_out_stays_out_when_the_card_names_the_data(self, tmp_path: Path) -> None:
        write(tmp_path)
        (tmp_path / "dog" / "damaged.jpg").write_bytes(cut(encoded()))
        card = open_dataset(str(tmp_path), on_damaged="skip").card()
        assert card.damaged_files == 1
        assert reopen_dataset(card).card() == card

    def test_what_only_decoding_finds_is_left_out_too(self, tmp_path: Path) -> None:
        """A GIF has no checksums."""
        write(tmp_path)
        data = encoded("GIF")
        begin, end = data.rindex(b",", 0, 900), len(data)
        spoiled = data[: begin + 11] + bytes((end - begin - 13) // 2) + data[-1:]
        assert looks_whole(spoiled, "GIF")
        (tmp_path / "dog" / "spoiled.gif").write_bytes(spoiled)
        data_set = open_dataset(str(tmp_path), on_damaged="skip")
        assert data_set.damaged == 1
        everything = open_dataset(str(tmp_path))
        faults = []
        for part in (everything.train, everything.validation, everything.test):
            try:
                part.load_pixels(SPEC)
            except DatasetError as error:
                faults.append(str(error))
        assert len(faults) == 1
        assert "spoiled.gif" in faults[0]
        assert "--on-damaged skip" in faults[0]

    @pytest.mark.parametrize(
        ("name", "content", "advice"),
        [
            ("a.jxl", b"\xff\x0a" + bytes(40), "a JPEG XL; convert it to one of JPEG"),
            ("a.DNG", encoded("TIFF"), "a camera's raw format; export it as JPEG"),
        ],
    )
    def test_pictures_that_are_not_read_are_no_silent_loss(
        self, tmp_path: Path, name: str, content: bytes, advice: str
    ) -> None:
        write(tmp_path)
        (tmp_path / "cat" / name).write_bytes(content)
        assert f"{advice}" in refusal(tmp_path)
        assert f"(1): cat/{name}" in refusal(tmp_path)

    def test_a_class_that_loses_all_its_images_is_never_left_out(self, tmp_path: Path) -> None:
        write(tmp_path)
        (tmp_path / "phone").mkdir()
        (tmp_path / "phone" / "1.cr2").write_bytes(RAW)
        with pytest.raises(DatasetError, match="no image can be read of: phone"):
            open_dataset(str(tmp_path), on_damaged="skip")

    @pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "HEIF", "AVIF"])
    def test_a_whole_file_is_not_decoded(self, image_format: str) -> None:
        assert looks_whole(encoded(image_format), image_format)

    def test_everything_in_the_way_is_told_at_once(self, tmp_path: Path) -> None:
        write(tmp_path)
        write(tmp_path, classes=("cow", "ewe"), images=4)
        (tmp_path / "dog" / "damaged.jpg").write_bytes(b"")
        (tmp_path / "notes.txt").write_text("")
        text = refusal(tmp_path)
        assert "an empty file (1): dog/damaged.jpg" in text
        assert "a class needs 5: cow (4), ewe (4)" in text
        assert "not images by their names (1): notes.txt" in text


class TestCommand:
    def test_compress_stops_at_damaged_files(self, tmp_path: Path) -> None:
        write(tmp_path / "pets")
        (tmp_path / "pets" / "dog" / "damaged.jpg").write_bytes(b"")
        result = CliRunner().invoke(compress, [str(tmp_path / "pets"), "--out", str(tmp_path / "out")])
        assert isinstance(result.exception, DatasetError)
        assert "dog/damaged.jpg" in str(result.exception)

    @pytest.mark.slow
    def test_compress_leaves_them_out_and_tells_what_was_found(self, tmp_path: Path) -> None:
        write(tmp_path / "pets")
        (tmp_path / "pets" / "dog" / "damaged.jpg").write_bytes(b"")
        options = ["--image-size", "24", "--teacher-epochs", "1", "--teacher-architecture", "resnet18"]
        result = CliRunner().invoke(
            compress,
            [
                *(str(tmp_path / "pets"), "--out", str(tmp_path / "out"), "--on-damaged", "skip"),
                *("--until", "teacher", "--device", "cpu", *options),
            ],
        )
        assert result.exit_code == 0, result.output
        assert "pets: 20 images, of 2 classes" in result.output
        assert "an empty file (1): dog/damaged.jpg" in result.output


def test_a_terminal_sees_how_long_the_rest_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("models.bars._SILENT_SECONDS", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert for_each(lambda number: number + 1, range(100), "Looking") == list(range(1, 101))
    assert "Looking" in capsys.readouterr().err


def test_in_a_running_display_the_bar_is_one_of_its_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("models.bars._SILENT_SECONDS", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = io.StringIO()
    display = Progress(console=Console(file=shown, force_terminal=True, width=80))
    display.add_task("reading")
    with display, bars_in(display):
        assert for_each(lambda number: number + 1, range(100), "Looking") == list(range(1, 101))
        display.refresh()
    assert "Looking" in shown.getvalue()
    assert capsys.readouterr().err == ""
    assert [task.description for task in display.tasks] == ["reading"]


def test_no_terminal_sees_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("models.bars._SILENT_SECONDS", 0.0)
    for_each(lambda number: number, range(100), "Looking")
    assert capsys.readouterr().err == ""
