"""ZIP files as phones, clouds and operating systems write them, and as nobody should."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from builder.prepare.unlabelled import has_no_classes, open_unlabelled
from models.datasets import DatasetError, DataSplit, open_dataset, reopen_dataset
from models.preprocessing import Preprocessing
from trimrt.cli import main

SPEC = Preprocessing(resize=24, height=24, width=24)


def picture(number: int) -> bytes:
    """A JPEG like no other."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def photographs(root: str = "", labels: Iterable[str] = ("cat", "dog"), count: int = 10) -> dict[str, bytes]:
    names = [f"{root}{label}/IMG_{index}.jpg" for label in labels for index in range(count)]
    return {name: picture(number) for number, name in enumerate(names)}


def write(archive: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in files.items():
            new.writestr(name, data)
    return archive


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIMRT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def opened(archive: Path) -> DataSplit:
    data = open_dataset(str(archive))
    for part in (data.train, data.validation, data.test):
        part.load_pixels(SPEC)
    return data


def refusal(archive: Path) -> str:
    with pytest.raises(DatasetError) as caught:
        open_dataset(str(archive))
    return " ".join(str(caught.value).split())


@pytest.mark.usefixtures("cache")
class TestUsual:
    def test_a_phones_archive_is_the_folder_in_it(self, tmp_path: Path) -> None:
        files = photographs("Holiday/") | {
            "__MACOSX/Holiday/cat/._IMG_0.jpg": b"\0\5\x16\7",
            "Holiday/.DS_Store": b"\0\0\0\1Bud1",
            "Holiday/cat/notes.txt": b"cats" * 1000,
        }
        data = opened(write(tmp_path / "Holiday.zip", files))
        assert (data.name, data.labels, len(data.train) + len(data.validation) + len(data.test)) == (
            "holiday",
            ("cat", "dog"),
            20,
        )
        told = " ".join(data.summary)
        assert "Holiday: 20 images, of 2 classes" in told
        for name in ("__MACOSX", ".DS_Store", "notes.txt"):
            assert name in told

    def test_it_is_the_same_data_as_the_folder(self, tmp_path: Path) -> None:
        archive = write(tmp_path / "photos.zip", photographs())
        zipfile.ZipFile(archive).extractall(tmp_path / "photos")
        assert opened(archive).sha256 == opened(tmp_path / "photos").sha256

    def test_parts_are_known(self, tmp_path: Path) -> None:
        files = photographs("Data/Train/") | photographs("Data/Test/", count=3)
        assert opened(write(tmp_path / "a.zip", files)).fold is None

    def test_a_card_finds_it_again(self, tmp_path: Path) -> None:
        data = opened(write(tmp_path / "photos.zip", photographs()))
        assert data.source == str(tmp_path / "photos.zip")
        assert reopen_dataset(data.card()).sha256 == data.sha256

    def test_it_is_unpacked_once(self, tmp_path: Path, cache: Path) -> None:
        archive = write(tmp_path / "photos.zip", photographs())
        first = opened(archive).train.paths[0]
        before = first.stat().st_mtime_ns
        assert opened(archive).train.paths[0] == first
        assert first.stat().st_mtime_ns == before
        assert len(list((cache / "archives").iterdir())) == 1

    def test_another_archive_of_that_name_is_another(self, tmp_path: Path) -> None:
        before = opened(write(tmp_path / "photos.zip", photographs()))
        after = opened(write(tmp_path / "photos.zip", photographs(labels=("hen", "pig"))))
        assert (before.labels, after.labels) == (("cat", "dog"), ("hen", "pig"))

    def test_windows_writes_backslashes(self, tmp_path: Path) -> None:
        archive = write(tmp_path / "photos.zip", photographs("all/"))
        # `zipfile` itself writes none, so the bytes are changed.
        archive.write_bytes(archive.read_bytes().replace(b"all/cat/", b"all\\cat\\"))
        assert opened(archive).labels == ("cat", "dog")

    def test_a_mac_writes_utf_8_without_saying_so(self, tmp_path: Path) -> None:
        archive = write(tmp_path / "photos.zip", photographs(labels=("Küche", "Straße")))
        with zipfile.ZipFile(archive) as written:
            assert all(entry.flag_bits & 0x800 for entry in written.infolist())
        data = bytearray(archive.read_bytes())
        for mark, place in ((b"PK\3\4", 7), (b"PK\1\2", 9)):
            start = data.find(mark)
            while start >= 0:
                data[start + place] &= ~0x08
                start = data.find(mark, start + 1)
        archive.write_bytes(data)
        assert opened(archive).labels == ("Küche", "Straße")

    def test_photographs_without_labels(self, tmp_path: Path) -> None:
        archive = write(tmp_path / "photos.zip", {f"{i}.jpg": picture(i) for i in range(12)})
        assert has_no_classes(str(archive))
        data = open_unlabelled(str(archive))
        assert (len(data.train), len(data.validation)) == (6, 6)


@pytest.mark.usefixtures("cache")
class TestHostile:
    @pytest.mark.parametrize("name", ["../cat/a.jpg", "cat/../../a.jpg", "/tmp/cat/a.jpg", "..\\cat\\a.jpg"])
    def test_nothing_leads_out_of_the_folder(self, name: str, tmp_path: Path, cache: Path) -> None:
        archive = write(tmp_path / "photos.zip", photographs() | {name: picture(99)})
        assert "leads out of the archive; nothing is unpacked" in refusal(archive)
        assert not list(tmp_path.rglob("a.jpg"))
        assert not list((cache / "archives").rglob("*.jpg"))

    def test_a_link_is_no_way_out_either(self, tmp_path: Path, cache: Path) -> None:
        secret = tmp_path / "secret.jpg"
        secret.write_bytes(picture(5))
        archive = write(tmp_path / "photos.zip", photographs())
        with zipfile.ZipFile(archive, "a") as more:
            link = zipfile.ZipInfo("cat/link.jpg")
            link.external_attr = 0o120777 << 16
            more.writestr(link, str(secret))
        assert "cat/link.jpg" in refusal(archive)  # its text is no image
        assert not any(path.is_symlink() for path in cache.rglob("*"))

    def test_a_bomb_is_not_unpacked(self, tmp_path: Path, cache: Path) -> None:
        archive = write(tmp_path / "photos.zip", photographs())
        with (
            zipfile.ZipFile(archive, "a", zipfile.ZIP_DEFLATED) as more,
            more.open("cat/bomb.png", "w") as bomb,
        ):
            for _ in range(1100):
                bomb.write(bytes(1 << 20))
        assert archive.stat().st_size < 2e6
        assert "would unpack to 1.2 GB, more than 20 times its own size" in refusal(archive)
        assert not list(cache.rglob("*.png"))

    def test_what_is_no_picture_is_not_unpacked_at_all(self, tmp_path: Path, cache: Path) -> None:
        archive = write(tmp_path / "photos.zip", photographs() | {"cat/film.mp4": bytes(1 << 20)})
        assert "cat/film.mp4" in " ".join(opened(archive).summary)
        assert next(cache.rglob("film.mp4")).stat().st_size == 0

    def test_an_entry_is_no_longer_than_it_says(self, tmp_path: Path, cache: Path) -> None:
        archive = write(tmp_path / "photos.zip", photographs() | {"cat/long.png": bytes(1 << 16)})
        size = (1 << 16).to_bytes(4, "little")
        archive.write_bytes(archive.read_bytes().replace(size, (100).to_bytes(4, "little")))
        assert "cannot be unpacked here" in refusal(archive)
        assert not list(cache.rglob("*.png"))

    def test_more_than_the_disk_holds_is_refused_beforehand(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda path: _Usage(1000))
        archive = write(tmp_path / "photos.zip", photographs())
        assert "TRIMRT_CACHE" in refusal(archive)

    def test_encrypted(self, tmp_path: Path) -> None:
        archive = write(tmp_path / "photos.zip", photographs())
        data = bytearray(archive.read_bytes())
        start = data.find(b"PK\1\2")
        data[start + 8] |= 1
        archive.write_bytes(data)
        assert "is encrypted; unpack it yourself and name the folder" in refusal(archive)

    def test_damaged(self, tmp_path: Path, cache: Path) -> None:
        archive = write(tmp_path / "photos.zip", photographs())
        data = bytearray(archive.read_bytes())
        data[200:300] = bytes(100)
        archive.write_bytes(data)
        assert "cannot be unpacked here" in refusal(archive)
        assert not list(cache.rglob("*.jpg"))

    @pytest.mark.parametrize("kind", ["tar", "gz", "bz2", "xz"])
    def test_of_another_kind_are_named(self, kind: str, tmp_path: Path) -> None:
        path = tmp_path / f"photos.{kind}"
        with tarfile.open(path, "w" if kind == "tar" else f"w:{kind}") as new:
            new.add(__file__, "cat/IMG_1.jpg")
        told = {"tar": "tar", "gz": "gzip", "bz2": "bzip2", "xz": "xz"}[kind]
        message = f"photos.{kind} is a {told} archive, not a ZIP file; unpack it and name the folder"
        assert message in refusal(path)
        with pytest.raises(DatasetError, match=message):
            open_unlabelled(str(path))

    def test_an_archive_without_classes_says_so(self, tmp_path: Path) -> None:
        archive = write(tmp_path / "photos.zip", {"readme.txt": b"nothing"})
        result = CliRunner().invoke(main, ["compress", str(archive)])
        assert result.exit_code == 1
        assert "a classifier needs at least two" in " ".join(result.output.split())
        assert "Traceback" not in result.output


class _Usage:
    def __init__(self, free: int) -> None:
        self.free = free
