"""`glyphs`: drawn alike everywhere, and no typeface that tests was seen before."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

import models.datasets
import models.glyphs
import models.named_data
from models.datasets import DatasetError, DataSplit, open_dataset
from models.glyphs import GLYPHS_SHA256, LABELS, Typeface, read_typefaces, typeface_of
from models.preprocessing import Preprocessing

SPEC = Preprocessing(resize=32, height=32, width=32)

# Matplotlib brings these typefaces: enough to draw, and to cut folds from.
FEW = tuple(
    Typeface(name, "fonts-of-the-test", f"{first}.ttf", f"{second}.ttf")
    for name, first, second in (
        ("computer-modern", "cmr10", "cmti10"),
        ("computer-modern-sans", "cmss10", "cmss10"),
        ("dejavu-mono", "DejaVuSansMono", "DejaVuSansMono-Bold"),
        ("dejavu-sans", "DejaVuSans", "DejaVuSans-Oblique"),
        ("dejavu-serif", "DejaVuSerif", "DejaVuSerif-Bold"),
        ("stix", "STIXGeneral", "STIXGeneralItalic"),
    )
)


@pytest.fixture(scope="module", autouse=True)
def _few_typefaces() -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.glyphs, "FONTS_FOLDER", Path(matplotlib.get_data_path(), "fonts", "ttf"))
        patch.setattr(models.named_data, "read_typefaces", lambda: FEW)
        yield


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folds(cache: Path) -> list[DataSplit]:
    return [open_dataset("glyphs", fold=fold, cache_dir=cache) for fold in range(5)]


def test_classes_are_figures_and_letters_of_both_cases(folds: list[DataSplit]) -> None:
    assert "".join(folds[0].labels) == LABELS
    assert len(LABELS) == 62


def test_no_typeface_is_in_two_parts(folds: list[DataSplit]) -> None:
    for data in folds:
        parts = [
            {typeface_of(path) for path in part.paths} for part in (data.train, data.validation, data.test)
        ]
        assert all(parts)
        assert sum(map(len, parts)) == len(set.union(*parts)) == len(FEW)


def test_the_folds_test_every_image_once(folds: list[DataSplit]) -> None:
    tested = [path for data in folds for path in data.test.paths]
    assert len(tested) == len(set(tested)) == 2 * len(FEW) * 62


def test_every_part_has_two_images_of_a_class_for_each_typeface(folds: list[DataSplit]) -> None:
    for part in (folds[0].train, folds[0].validation, folds[0].test):
        typefaces = {typeface_of(path) for path in part.paths}
        assert np.bincount(part.targets).tolist() == [2 * len(typefaces)] * 62


def test_drawing_again_gives_the_same_files(folds: list[DataSplit], tmp_path: Path) -> None:
    again = open_dataset("glyphs", cache_dir=tmp_path)
    assert again.sha256 == folds[0].sha256
    assert again.test.paths != folds[0].test.paths


def test_the_card_tells_how_to_find_the_data_again(folds: list[DataSplit], cache: Path) -> None:
    card = folds[2].card()
    assert card.fold == 2
    assert "whole typefaces" in card.split
    assert open_dataset(card.source, fold=card.fold, cache_dir=cache).card() == card


def test_images_of_a_class_are_distorted_each_in_its_own_way(cache: Path, folds: list[DataSplit]) -> None:
    # The two images of this typeface are of the same face.
    first, second = (
        np.asarray(Image.open(cache / "glyphs" / "R" / f"computer-modern-sans-{face}.png"), np.int64)
        for face in (0, 1)
    )
    assert first.shape == second.shape == (32, 32)
    assert np.abs(first - second).mean() > 5


def test_letters_that_differ_by_their_size_alone_keep_it(folds: list[DataSplit]) -> None:
    data = folds[0].train
    pixels = data.load_pixels(SPEC, progress=False)[:, :, :, 0].astype(float)

    def height(label: str) -> float:
        """Mean number of rows with ink, over the typefaces."""
        images = pixels[data.targets == data.labels.index(label)]
        strength = images.max(axis=2) - np.median(images, axis=(1, 2))[:, None]
        return float((strength > strength.max(axis=1, keepdims=True) / 2).sum(axis=1).mean())

    for letter in "cosvxz":
        assert height(letter) < 0.85 * height(letter.upper())


def test_missing_fonts_are_refused_with_what_installs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Typeface("other", "fonts-not-here", "cmr10.ttf", "other/Bold.otf")
    monkeypatch.setattr(models.named_data, "read_typefaces", lambda: (*FEW, other))
    with pytest.raises(DatasetError, match=r"sudo apt-get install fonts-not-here$"):
        open_dataset("glyphs", cache_dir=tmp_path)
    assert not (tmp_path / "glyphs").exists()


def test_other_images_than_the_documented_ones_are_told_of(
    folds: list[DataSplit], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    assert "not the images that docs/data.md" in folds[0].summary[0]
    assert all(len(line) < 80 for line in folds[0].summary)
    monkeypatch.setattr(models.datasets, "GLYPHS_SHA256", folds[0].sha256)
    assert open_dataset("glyphs", cache_dir=cache).summary == ()


class TestTypefaces:
    def test_there_are_110_and_no_font_is_in_two(self) -> None:
        typefaces = read_typefaces()
        assert len(typefaces) == 110
        assert len({typeface.name for typeface in typefaces}) == 110
        files = [{typeface.first, typeface.second} for typeface in typefaces]
        assert sum(map(len, files)) == len(set.union(*files))

    def test_their_names_tell_files_apart_on_any_file_system(self) -> None:
        for name, package, *files in read_typefaces():
            assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
            assert re.fullmatch(r"fonts-[a-z0-9-]+", package)
            assert all(file.endswith((".otf", ".ttf")) and not Path(file).is_absolute() for file in files)


FONTS = models.glyphs.FONTS_FOLDER


@pytest.mark.slow
@pytest.mark.skipif(
    not all((FONTS / typeface.first).is_file() for typeface in read_typefaces()),
    reason="the fonts of models/typefaces.csv are not here (.ci/run installs them)",
)
class TestAllTypefaces:
    def test_these_are_the_documented_images(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(models.glyphs, "FONTS_FOLDER", FONTS)
        monkeypatch.setattr(models.named_data, "read_typefaces", read_typefaces)
        data = open_dataset("glyphs", cache_dir=tmp_path)
        assert data.sha256 == GLYPHS_SHA256
        assert data.summary == ()
        assert (len(data.train), len(data.validation), len(data.test)) == (9796, 1116, 2728)

    def test_the_packages_of_the_list_bring_the_fonts(self) -> None:
        for typeface in read_typefaces():
            listed = subprocess.run(
                ["dpkg", "-S", FONTS / typeface.first], capture_output=True, text=True, check=True
            ).stdout
            assert listed.startswith(f"{typeface.package}:")
