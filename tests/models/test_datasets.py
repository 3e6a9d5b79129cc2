"""Data sets: the same parts every time, no image in two of them, and errors that say what to do."""

from __future__ import annotations

import gzip
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold

import models.datasets
import models.named_data
from models.datasets import DatasetError, DataSplit, open_dataset
from models.preprocessing import Preprocessing

SPEC = Preprocessing(resize=8, height=8, width=8)


def write_images(folder: Path, classes: dict[str, int]) -> None:
    for label, count in classes.items():
        (folder / label).mkdir(parents=True)
        for index in range(count):
            Image.new("L", (8, 8), index).save(folder / label / f"{label}{index}.png")


class TestDigits:
    def test_files_hold_scikit_learns_images(self, data: DataSplit) -> None:
        original = load_digits()
        for images in (data.train, data.validation, data.test):
            indices = [int(path.stem) for path in images.paths]
            grey = np.round(original.images[indices] * 255 / 16)
            np.testing.assert_array_equal(images.load_pixels(SPEC)[:, :, :, 1], grey)
            np.testing.assert_array_equal(images.targets, original.target[indices])

    @pytest.mark.parametrize("fold", range(5))
    def test_folds_are_those_of_the_published_recipe(self, cache_dir: Path, fold: int) -> None:
        data = open_dataset("digits", fold=fold, cache_dir=cache_dir)
        targets = load_digits().target
        _, test = list(StratifiedKFold(5, shuffle=True, random_state=42).split(targets, targets))[fold]
        assert [int(path.stem) for path in data.test.paths] == test.tolist()

    @pytest.mark.parametrize("fold", range(5))
    def test_unshuffled_folds_keep_the_files_order(self, cache_dir: Path, fold: int) -> None:
        data = open_dataset("digits-unshuffled", fold=fold, cache_dir=cache_dir)
        targets = load_digits().target
        _, test = list(StratifiedKFold(5).split(targets, targets))[fold]
        assert [int(path.stem) for path in data.test.paths] == test.tolist()
        assert data.card().source == "digits-unshuffled"

    def test_parts_are_disjoint_and_complete(self, data: DataSplit) -> None:
        parts = [set(images.paths) for images in (data.train, data.validation, data.test)]
        assert [len(part) for part in parts] == [1293, 144, 360]
        assert len(set.union(*parts)) == 1797

    def test_validation_has_a_tenth_of_every_class(self, data: DataSplit) -> None:
        rest = np.bincount(data.train.targets) + np.bincount(data.validation.targets)
        np.testing.assert_allclose(np.bincount(data.validation.targets), rest / 10, atol=1)

    def test_test_parts_of_the_folds_share_no_image(self, cache_dir: Path) -> None:
        tests = [open_dataset("digits", fold=fold, cache_dir=cache_dir).test.paths for fold in range(5)]
        assert len({path for paths in tests for path in paths}) == sum(map(len, tests)) == 1797

    def test_opening_again_gives_the_same(self, data: DataSplit, cache_dir: Path, tmp_path: Path) -> None:
        again = open_dataset("digits", cache_dir=cache_dir)
        elsewhere = open_dataset("digits", cache_dir=tmp_path)
        assert again.train.paths == data.train.paths
        assert elsewhere.sha256 == data.sha256
        assert elsewhere.train.sha256 == data.train.sha256 != data.test.sha256

    def test_card_tells_how_to_find_the_data_again(self, data: DataSplit, cache_dir: Path) -> None:
        card = data.card()
        assert card.fold is not None
        assert open_dataset(card.source, fold=card.fold, cache_dir=cache_dir).card() == card


class TestFashionMnist:
    def test_is_unpacked_from_the_debian_package(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        package = tmp_path / "package"
        package.mkdir()
        rng = np.random.default_rng(0)
        pixels = {}
        for prefix, count in (("train", 40), ("t10k", 10)):
            pixels[prefix] = rng.integers(0, 256, (count, 28, 28), np.uint8)
            targets = (np.arange(count) % 10).astype(np.uint8)
            images = struct.pack(">IIII", 0x803, count, 28, 28) + pixels[prefix].tobytes()
            labels = struct.pack(">II", 0x801, count) + targets.tobytes()
            (package / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
            (package / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
        monkeypatch.setattr(models.named_data, "FASHION_MNIST_FOLDER", package)
        data = open_dataset("fashion-mnist", cache_dir=tmp_path / "cache")
        assert data.fold is None
        assert (len(data.train), len(data.validation), len(data.test)) == (30, 10, 10)
        assert {"T-shirt", "Ankle boot"} < set(data.labels)
        spec = Preprocessing(resize=28, height=28, width=28)
        for row, path, target in zip(
            data.test.load_pixels(spec), data.test.paths, data.test.targets, strict=True
        ):
            np.testing.assert_array_equal(row[:, :, 0], pixels["t10k"][int(path.stem)])
            assert path.parent.name == data.labels[target]

    def test_says_which_package_is_missing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(models.named_data, "FASHION_MNIST_FOLDER", tmp_path / "nothing")
        with pytest.raises(DatasetError, match="apt install dataset-fashion-mnist"):
            open_dataset("fashion-mnist", cache_dir=tmp_path)
        assert not (tmp_path / "fashion-mnist").exists()


class TestFolders:
    def test_its_own_test_part_is_kept(self, split: DataSplit, few_digits: Path) -> None:
        assert split.fold is None
        assert {path.relative_to(few_digits).parts[0] for path in split.test.paths} == {"test"}
        parts = [set(images.paths) for images in (split.train, split.validation, split.test)]
        assert [len(part) for part in parts] == [43, 5, 12]
        assert len(set.union(*parts)) == 60

    def test_val_is_a_test_part_too(self, tmp_path: Path) -> None:
        write_images(tmp_path / "train", {"cat": 10, "dog": 10})
        write_images(tmp_path / "val", {"cat": 2, "dog": 2})
        data = open_dataset(str(tmp_path), cache_dir=tmp_path)
        assert len(data.test) == 4
        assert "val/" in data.description

    def test_one_folder_is_cut_into_folds(self, tmp_path: Path) -> None:
        write_images(tmp_path / "Pets (2)", {"cat": 20, "dog": 10})
        data = open_dataset(str(tmp_path / "Pets (2)"), fold=4, cache_dir=tmp_path)
        assert data.labels == ("cat", "dog")
        assert (data.name, data.fold, data.folds) == ("pets--2", 4, 5)
        assert np.bincount(data.test.targets).tolist() == [4, 2]

    def test_a_changed_image_changes_the_hash(self, tmp_path: Path) -> None:
        write_images(tmp_path / "pets", {"cat": 10, "dog": 10})
        before = open_dataset(str(tmp_path / "pets")).sha256
        Image.new("L", (8, 8), 200).save(tmp_path / "pets" / "cat" / "cat0.png")
        assert open_dataset(str(tmp_path / "pets")).sha256 != before

    def test_large_sets_are_memory_mapped(
        self, split: DataSplit, monkeypatch: pytest.MonkeyPatch, cache_dir: Path
    ) -> None:
        in_memory = split.train.load_pixels(SPEC)
        monkeypatch.setattr(models.datasets, "_IN_MEMORY_BYTES", 1000)
        for _ in range(2):
            mapped = split.train.load_pixels(SPEC)
            assert isinstance(mapped, np.memmap)
            np.testing.assert_array_equal(mapped, in_memory)
        assert len(list((cache_dir / "pixels").iterdir())) == 1

    def test_errors_say_what_to_do(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match="give digits, digits-unshuffled, fashion-mnist, glyphs, or"):
            open_dataset(str(tmp_path / "nowhere"))
        with pytest.raises(DatasetError, match="0 to 4"):
            open_dataset("digits", fold=5)

        write_images(tmp_path / "one", {"cat": 10})
        with pytest.raises(DatasetError, match="at least two"):
            open_dataset(str(tmp_path / "one"))

        write_images(tmp_path / "empty", {"cat": 10, "dog": 0})
        with pytest.raises(DatasetError, match=r"needs at least two\. Without images: dog"):
            open_dataset(str(tmp_path / "empty"))

        write_images(tmp_path / "few", {"cat": 10, "dog": 4})
        with pytest.raises(DatasetError, match=r"a class needs 5: dog \(4\)"):
            open_dataset(str(tmp_path / "few"))

        write_images(tmp_path / "untested" / "train", {"cat": 10, "dog": 10})
        with pytest.raises(DatasetError, match="neither test/ nor val/"):
            open_dataset(str(tmp_path / "untested"))

        write_images(tmp_path / "untested", {"test": 3})
        with pytest.raises(DatasetError, match="test/ has no folders of classes; sort its images"):
            open_dataset(str(tmp_path / "untested"))
        shutil.rmtree(tmp_path / "untested" / "test")

        write_images(tmp_path / "untested" / "test", {"cat": 10, "cow": 10})
        with pytest.raises(DatasetError, match="different classes: cow, dog"):
            open_dataset(str(tmp_path / "untested"))

        write_images(tmp_path / "single" / "train", {"cat": 10, "dog": 1})
        write_images(tmp_path / "single" / "test", {"cat": 1, "dog": 1})
        with pytest.raises(DatasetError, match=r"a class needs 2: dog \(1\)"):
            open_dataset(str(tmp_path / "single"))
