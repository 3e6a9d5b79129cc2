"""Which label is which: by name, never by chance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from builder.prepare.export import ExportError
from builder.prepare.labels import labels_beside, match_labels, natural_order, read_labels
from builder.prepare.plausibility import Alternative, require_plausible

FOLDERS = ("ant", "bee", "cat")


def matched(told: list[str] | None, folders: tuple[str, ...] = FOLDERS, *, classes: int = 3, single=False):
    found = match_labels(told, "labels.txt", folders, classes, single)
    return found.labels, found.classes.tolist()


def test_labels_in_another_order_than_the_folders_are_matched_by_name():
    assert matched(["cat", "ant", "bee"]) == (["cat", "ant", "bee"], [1, 2, 0])


def test_folders_may_be_some_of_the_networks_classes():
    labels = ["ant", "bee", "cat", "dog", "emu"]
    assert matched(labels, ("emu", "bee"), classes=5) == (labels, [4, 1])


def test_case_spaces_and_punctuation_do_not_matter_where_nothing_else_tells_them_apart():
    assert matched(["Great Dane", "Ant"], ("ant", "great_dane"), classes=2)[1] == [1, 0]


def test_without_labels_the_network_has_the_order_of_the_folders():
    assert matched(None) == (list(FOLDERS), [0, 1, 2])


def test_one_label_of_one_score_is_the_second_class():
    assert matched(["bee"], ("ant", "bee"), classes=2, single=True) == (["ant", "bee"], [0, 1])
    assert matched(["ant"], ("ant", "bee"), classes=2, single=True) == (["bee", "ant"], [1, 0])


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (["ant", "bee"], "labels.txt has 2 labels, the network has 3 classes: ant, bee"),
        (["background", "ant", "bee", "cat"], "has 4 labels, the network has 3 classes"),
        (["ant", "bee", "cats"], r"folders cat \(did you mean cats\?\) are no classes of the network, whose"),
        (["n01", "n02", "n03"], "folders ant, bee, cat are no classes of the network, whose labels are n01"),
        (["ant", "ant", "cat"], "labels.txt names ant twice"),
    ],
)
def test_other_classes_than_the_networks_are_refused_by_name(told: list[str], message: str):
    with pytest.raises(ExportError, match=message):
        matched(told)


def test_a_thousand_classes_without_names_are_not_guessed_from_three_folders():
    with pytest.raises(ExportError, match="1000 classes and the data has 3 folders; name the"):
        matched(None, classes=1000)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.txt", b"\xef\xbb\xbfant\r\nbee\r\n\r\ncat"),
        ("labels.json", b'["ant", "bee", "cat"]'),
        ("labels.json", b'{"0": "ant", "2": "cat", "1": "bee"}'),
        ("labels.json", b'{"cat": 2, "ant": 0, "bee": 1}'),
    ],
)
def test_labels_are_read_from_lines_and_json_whatever_a_windows_editor_put_before_them(
    tmp_path: Path, name: str, content: bytes
):
    (tmp_path / name).write_bytes(content)
    assert read_labels(tmp_path / name) == list(FOLDERS)


def test_labels_are_read_from_hugging_faces_file_beside_the_model(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "ant", "1": "bee"}}))
    assert labels_beside(tmp_path) == (["ant", "bee"], str(tmp_path / "config.json"))
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}))
    assert labels_beside(tmp_path) is None


def test_people_count_two_before_ten():
    assert natural_order(["c1", "c10", "c2"]) == ["c1", "c2", "c10"]


# What a network can be right about


def logits_for(found: list[int], classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[found] * 5


def judge(found: np.ndarray, targets: np.ndarray, labels: list[str], *others: Alternative) -> None:
    require_plausible(logits_for(found.tolist(), len(labels)), targets, labels, lambda: iter(others))


TEN = [str(number) for number in range(10)]
TARGETS = np.repeat(np.arange(10), 10)


def test_a_network_that_is_mostly_right_passes():
    found = np.where(np.arange(100) % 5 == 0, (TARGETS + 1) % 10, TARGETS)
    judge(found, TARGETS, TEN)


def test_a_network_near_chance_is_stopped_with_what_would_be_better():
    found = np.random.default_rng(0).integers(0, 10, 100)
    better = Alternative("--preprocess -1..1", 0.95)
    with pytest.raises(ExportError, match=r"guessing gets 10%: .*with --preprocess -1..1 it gets 95%"):
        judge(found, TARGETS, TEN, Alternative("--preprocess caffe", 0.3), better)


def test_naming_the_most_frequent_class_always_is_guessing():
    targets = np.array([0] * 90 + [1] * 10)
    with pytest.raises(ExportError, match=r"gets 50% .* guessing gets 50%"):
        judge(np.zeros(100, np.int64), targets, ["rare", "frequent"])
    judge(np.where(np.arange(100) < 94, 0, 1), targets, ["rare", "frequent"])


def test_two_labels_in_each_others_place_are_found():
    swapped = np.array([0, 1, 2, 3, 4, 5, 6, 8, 7, 9])
    with pytest.raises(ExportError, match=r"gets 80% .* would get 100% .*output 7 is 8, output 8 is 7"):
        judge(swapped[TARGETS], TARGETS, TEN)


def test_classes_in_the_order_that_people_count_in_are_found():
    labels = sorted(str(number) for number in range(12))  # 0, 1, 10, 11, 2, ...
    targets = np.repeat(np.arange(12), 4)
    found = np.array([int(labels[target]) for target in targets])
    with pytest.raises(ExportError, match="as numbers count: 0, 1, 2, 3"):
        judge(found, targets, labels)


def test_a_hard_task_with_few_images_of_each_class_is_no_matter_of_order():
    random = np.random.default_rng(0)
    targets = np.repeat(np.arange(100), 2)
    found = np.where(random.random(200) < 0.5, targets, random.integers(0, 100, 200))
    judge(found, targets, [str(number) for number in range(100)])
