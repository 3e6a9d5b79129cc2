"""What is found under the folders that a user names, and on which data it is measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from models.card import read_card
from models.datasets import DataSplit
from runtime.manifest import Precision, read_manifest
from trimrt.report.assembling import differing_parts
from trimrt.report.data import DataSets, data_of_checkpoint, data_of_package
from trimrt.report.discovery import Checkpoint, ReportError, discover


def test_everything_below_a_folder_is_found_once_and_in_order(
    checkpoint: Path, packages: dict[Precision, Path]
) -> None:
    engines = packages["int8"].parent
    found = discover([engines, checkpoint.parent, packages["int8"], checkpoint])
    assert [item.folder for item in found.checkpoints] == [checkpoint]
    assert [item.folder for item in found.packages] == list(packages.values())
    assert found.left_out == []


def test_copies_are_named_and_not_measured_twice(
    checkpoint: Path, packages: dict[Precision, Path], tmp_path: Path
) -> None:
    shutil.copytree(checkpoint, tmp_path / "copy")
    shutil.copytree(packages["fp16"], tmp_path / "engine")
    found = discover([checkpoint, packages["fp16"], tmp_path])
    assert (len(found.checkpoints), len(found.packages)) == (1, 1)
    assert {item.path: item.reason for item in found.left_out} == {
        str(tmp_path / "copy"): f"a copy of {checkpoint}: the same weights",
        str(tmp_path / "engine"): f"a copy of {packages['fp16']}: the same weights",
    }


def test_hidden_folders_are_passed_by(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / ".student.partial")
    with pytest.raises(ReportError, match="no checkpoint"):
        discover([tmp_path])


def test_something_damaged_below_a_folder_is_named(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/card.json").write_text('{"format": 1, "name"')
    (tmp_path / "website").mkdir()
    (tmp_path / "website/manifest.json").write_text('{"icons": []}')
    found = discover([checkpoint, tmp_path])
    assert len(found.checkpoints) == 1
    assert [item.path for item in found.left_out] == [str(tmp_path / "torn"), str(tmp_path / "website")]
    assert "is not a valid model card" in found.left_out[0].reason
    assert "is not a valid engine manifest" in found.left_out[1].reason
    assert not any("\n" in item.reason for item in found.left_out)


def test_something_damaged_that_is_named_itself_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text("{}")
    with pytest.raises(ReportError, match="is not a valid model card"):
        discover([tmp_path])


@pytest.fixture
def gone(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint whose images are no longer what it was trained on."""
    folder = tmp_path / "gone"
    shutil.copytree(checkpoint, folder)
    card = json.loads((folder / "card.json").read_text())
    card["dataset"]["sha256"] = "0" * 64
    (folder / "card.json").write_text(json.dumps(card))
    return folder


def test_changed_data_is_not_measured_on(gone: Path, data: DataSplit) -> None:
    choice = data_of_checkpoint(read_card(gone), DataSets(None))
    assert choice.split is None
    assert "may have learned the images" in choice.reason
    named = data_of_checkpoint(read_card(gone), DataSets("digits")).split
    assert named is not None
    assert named.test.sha256 == data.test.sha256


def test_data_that_is_not_here_and_other_classes_are_said(checkpoint: Path, data: DataSplit) -> None:
    card = read_card(checkpoint)
    assert "no such file or folder: /nowhere" in data_of_checkpoint(card, DataSets("/nowhere")).reason
    fewer = card.model_copy(update={"labels": card.labels[:9]})
    assert "has other classes" in data_of_checkpoint(fewer, DataSets(None)).reason


def test_an_engine_alone_takes_the_named_data_and_its_own_fold(
    packages: dict[Precision, Path], data: DataSplit
) -> None:
    manifest = read_manifest(packages["int8"])
    unknown = data_of_package(manifest, [], DataSets(None))
    assert unknown.split is None
    assert "its data set is not known" in unknown.reason
    named = data_of_package(manifest, [], DataSets("digits"))
    assert named.split is not None
    assert (named.split.fold, named.caution) == (0, None)
    assert manifest.evidence is not None
    other_fold = manifest.evidence.model_copy(update={"image_set": "digits-fold3-validation in 7 positions"})
    third = data_of_package(manifest.model_copy(update={"evidence": other_fold}), [], DataSets("digits"))
    assert third.split is not None
    assert third.split.fold == 3


def test_an_engine_without_its_checkpoint_shares_the_data_of_another_by_its_name(
    packages: dict[Precision, Path], checkpoint: Path, data: DataSplit
) -> None:
    manifest = read_manifest(packages["int8"])
    other = Checkpoint(checkpoint, read_card(checkpoint).model_copy(update={"weights_sha256": "3" * 64}))
    choice = data_of_package(manifest, [other], DataSets(None))
    assert choice.split is not None
    assert choice.split.test.sha256 == data.test.sha256
    assert "from the name of its validation images only" in str(choice.caution)
    elsewhere = other.card.dataset.model_copy(update={"fold": 1})
    second_fold = Checkpoint(checkpoint, other.card.model_copy(update={"dataset": elsewhere}))
    assert data_of_package(manifest, [second_fold], DataSets(None)).split is None


def test_an_engine_that_does_not_tell_its_fold_is_measured_with_a_caution(
    packages: dict[Precision, Path], data: DataSplit
) -> None:
    manifest = read_manifest(packages["int8"]).model_copy(update={"evidence": None})
    choice = data_of_package(manifest, [], DataSets("digits"))
    assert choice.split is not None
    assert "may have learned these test images" in str(choice.caution)


def test_an_engine_finds_the_checkpoint_that_its_build_command_names(
    packages: dict[Precision, Path], checkpoint: Path, gone: Path
) -> None:
    manifest = read_manifest(packages["int8"])
    built = manifest.model_copy(update={"build_command": f"trimrt build {checkpoint} -p int8"})
    choice = data_of_package(built, [], DataSets(None))
    assert choice.card == read_card(checkpoint)
    assert choice.split is not None
    retrained = built.provenance.model_copy(update={"checkpoint_sha256": "1" * 64})
    other = built.model_copy(update={"provenance": retrained})
    assert data_of_package(other, [], DataSets(None)).card is None


@pytest.mark.parametrize(
    ("paths", "parts"),
    [
        (["runs/one/engines/int8", "runs/two/engines/int8"], ["one", "two"]),
        (["runs/one/pruned", "runs/two/last/pruned"], ["one", "two/last"]),
        (["runs/pruned", "runs/old/pruned"], ["pruned", "old/pruned"]),
        (["runs/pruned", "runs/pruned/copy"], ["pruned", "pruned/copy"]),
    ],
)
def test_models_of_one_name_are_told_apart_by_what_differs(paths: list[str], parts: list[str]) -> None:
    assert differing_parts([Path(path).parts for path in paths]) == parts


@given(st.sets(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(tuple), min_size=2))
@settings(deadline=None)
def test_different_paths_stay_different(paths: set[tuple[str, ...]]) -> None:
    parts = differing_parts(sorted(paths))
    assert len(set(parts)) == len(paths)
    assert all(parts)


def test_what_was_found_in_a_folder_of_images_is_noted_once(tmp_path: Path) -> None:
    for number in range(12):
        path = tmp_path / "pets" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(path)
    (tmp_path / "pets/cat/notes.txt").write_text("no image")
    (tmp_path / "pets/dog/damaged.png").write_bytes(b"")
    noted: list[str] = []

    data = DataSets(str(tmp_path / "pets"), "skip", noted.append)
    for fold in (0, 1, 0):
        data.named(str(tmp_path / "pets"), fold)

    assert noted == [
        "pets: 12 images, of 2 classes; the smallest is cat (6)",
        "not used: files that are not images by their names (1): cat/notes.txt",
        "not used: files that cannot be read (1):",
        "  an empty file (1): dog/damaged.png",
    ]
