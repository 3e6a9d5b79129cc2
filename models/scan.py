"""One look at a folder of images before anything else, which finds all that is wrong with it at once.

Every file is read once: its hash finds duplicates, its header and its end tell damage. Only a file that looks
damaged is decoded. To leave damaged files out, all have to be known, so then every file is decoded, JPEGs at
an eighth of their size.
"""

from __future__ import annotations

import hashlib
import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from models.bars import for_each
from models.folders import (
    RAW_SUFFIXES,
    Contents,
    DatasetError,
    OnDamaged,
    read_contents,
    read_unlabelled,
    shown,
)
from models.images.wholeness import looks_whole
from models.naming import few
from models.preprocessing import ImageError, Preprocessing, plan_loading

MAX_PIXELS: Final = 178_000_000  # Pillow reads no more

_PROBE: Final = Preprocessing(resize=32, height=32, width=32)
_WIDTH: Final = 79
_COPIES: Final = "WARNING: copies of an image, of which some may train and others test"
_MOST_NAMED: Final = 1000
_FEW: Final = 3


class _File(NamedTuple):
    path: Path
    digest: str
    fault: str | None


class Image(NamedTuple):
    """An image that can be used.

    Attributes:
        path: of the file.
        label: of its class.
        digest: SHA-256 of the file, as hexadecimal digits.
    """

    path: Path
    label: str
    digest: str


@dataclass(frozen=True)
class Scan:
    """What is in a folder.

    Attributes:
        train: the training part, or all images where they are not parted.
        held_out: the part that comes with the data to test on.
        part_names: of the two folders; empty where they are not parted.
        faults: files that cannot be used, with the reason; none of them is in a part.
        summary: what was found, to print, in lines of less than 80 columns.
    """

    train: list[Image]
    held_out: list[Image]
    part_names: tuple[str, ...]
    faults: dict[Path, str]
    summary: tuple[str, ...]


def scan_folder(
    root: Path, *, smallest: Callable[[bool], int], on_damaged: OnDamaged = "stop", trusted: bool = False
) -> Scan:
    """Find all images and all faults.

    Args:
        root: a folder with a folder for each class, or with parts that have.
        smallest: how many images a class of the training part needs, told whether there is a held-out part.
        on_damaged: what to do about files that cannot be read: stop, or leave them out.
        trusted: its files were written here and are whole; only their hashes are taken.

    Raises:
        DatasetError: it cannot be used; the message names everything that is in the way.
    """
    contents = read_contents(root)
    return _scan(root, contents, smallest(contents.held_out is not None), on_damaged, trusted)


def scan_unlabelled(root: Path, *, on_damaged: OnDamaged = "stop") -> Scan:
    """Find all images under a folder, whatever folders they are in; their labels are empty.

    Raises:
        DatasetError: files cannot be read and are not to be left out; the message names all.
    """
    contents = read_unlabelled(root)
    return _scan(root, contents, 1, on_damaged, trusted=False)


def _scan(root: Path, contents: Contents, smallest: int, on_damaged: OnDamaged, trusted: bool) -> Scan:
    parts = [contents.train] + ([contents.held_out] if contents.held_out else [])
    labelled = [[(path, label) for label in part.classes for path in part.classes[label]] for part in parts]
    paths = [path for part in labelled for path, _ in part]
    examine = _hash if trusted else _examine_all if on_damaged == "skip" else _examine
    examined = {file.path: file for file in for_each(examine, paths, "Looking through the images")}
    faults = {path: file.fault for path, file in examined.items() if file.fault is not None}
    images = [
        [Image(path, label, examined[path].digest) for path, label in part if path not in faults]
        for part in labelled
    ]
    train, held_out = images[0], images[1] if len(images) > 1 else []
    problems = []
    if faults and on_damaged == "stop":
        problems.append(_listed_faults(faults, root))
    problems += _missing_classes(contents, train, held_out)
    problems += _small_classes(contents, train, smallest)
    found = [] if trusted else list(_summary(root, contents, train, held_out, faults, on_damaged))
    if problems:
        raise DatasetError(
            "\n".join([f"{shown(root, 500)} cannot be used as it is:", *problems, *_also(found)])
        )
    names = tuple(part.name for part in parts) if contents.held_out else ()
    return Scan(train, held_out, names, faults, tuple(found))


def _hash(path: Path) -> _File:
    return _File(path, hashlib.sha256(path.read_bytes()).hexdigest(), None)


def _examine(path: Path, *, decode: bool = False) -> _File:
    if path.suffix.lower() in RAW_SUFFIXES:
        return _File(path, "", "a camera's raw format; export it as JPEG")
    try:
        data = path.read_bytes()
    except OSError as error:
        broken = path.is_symlink() and not path.exists()
        return _File(path, "", "a link to a file that is not there" if broken else str(error.strerror))
    if not data:
        return _File(path, "", "an empty file")
    try:
        plan = plan_loading(data, _PROBE, max_pixels=MAX_PIXELS)
        if decode or not looks_whole(data, plan.header.format):
            plan.load()
    except ImageError as error:
        return _File(path, "", str(error))
    return _File(path, hashlib.sha256(data).hexdigest(), None)


def _examine_all(path: Path) -> _File:
    return _examine(path, decode=True)


def listed(faults: dict[Path, str], root: Path, most: int = _MOST_NAMED) -> list[str]:
    """Lines that say each fault and the files that have it."""
    by_fault: dict[str, list[str]] = defaultdict(list)
    for path, fault in sorted(faults.items()):
        by_fault[fault].append(_name(path, root))
    lines = []
    for fault, names in sorted(by_fault.items(), key=lambda item: -len(item[1])):
        lines += _wrapped(f"  {fault} ({len(names):,}): {few(names, most)}", 4)
    return lines


def _listed_faults(faults: dict[Path, str], root: Path) -> str:
    count = f"{len(faults):,} file{'s' * (len(faults) != 1)} cannot be read"
    advice = "replace or remove, or leave out with --on-damaged skip:"
    return "\n".join([*_wrapped(f"- {count}; {advice}"), *listed(faults, root)])


def _name(path: Path, root: Path) -> str:
    return shown(path.relative_to(root))


def _missing_classes(contents: Contents, train: list[Image], held_out: list[Image]) -> Iterator[str]:
    """Classes that lost all their images, and those that only one of two parts has."""
    parts = [(contents.train, train)] + ([(contents.held_out, held_out)] if contents.held_out else [])
    for part, images in parts:
        lost = sorted(part.classes.keys() - {image.label for image in images})
        if lost:
            yield from _wrapped(f"- no image can be read of: {', '.join(map(shown, lost))}", 2)
    if contents.held_out:
        differing = sorted(contents.train.classes.keys() ^ contents.held_out.classes.keys())
        if differing:
            names = f"{shown(contents.train.name)}/ and {shown(contents.held_out.name)}/"
            yield from _wrapped(f"- {names} have different classes: {', '.join(map(shown, differing))}", 2)


def _small_classes(contents: Contents, train: list[Image], smallest: int) -> Iterator[str]:
    counts = Counter(image.label for image in train)
    small = [
        f"{shown(label)} ({counts[label]})"
        for label in contents.train.classes
        if 0 < counts[label] < smallest
    ]
    if small:
        text = f"- too few images to train and test on; a class needs {smallest}: {', '.join(small)}"
        yield from _wrapped(text, 2)


def _also(found: list[str]) -> list[str]:
    return ["This was found:", *found] if found else []


def _summary(
    root: Path,
    contents: Contents,
    train: list[Image],
    held_out: list[Image],
    faults: dict[Path, str],
    on_damaged: OnDamaged,
) -> Iterator[str]:
    counts = Counter(image.label for image in (*train, *held_out))
    if counts:
        least = min(counts, key=lambda label: (counts[label], label))
        parts = (
            f"{len(train):,} in {shown(contents.train.name)}/ and "
            f"{len(held_out):,} in {shown(contents.held_out.name)}/, "
            if contents.held_out
            else ""
        )
        classes = f"of {len(counts):,} classes; the smallest is {shown(least)} ({counts[least]:,})"
        yield from _wrapped(
            f"{shown(root.name)}: {len(train) + len(held_out):,} images, {parts}"
            f"{classes if least else 'without labels'}"
        )
    for reason, paths in contents.skipped.items():
        names = [_name(path, root) for path in paths]
        yield from _wrapped(f"not used: {reason} ({len(paths):,}): {few(names, _FEW)}")
    if faults and on_damaged == "skip":
        yield f"not used: files that cannot be read ({len(faults):,}):"
        yield from listed(faults, root, _FEW)
    if contents.inner:
        names = [_name(path, root) for path in contents.inner]
        text = "folders within a class folder are no classes; their images count as its own"
        yield from _wrapped(f"{text} ({len(names):,}): {few(names, _FEW)}")
    for alike in _alike(counts):
        yield from _wrapped(f"WARNING: classes whose names are nearly the same: {alike}")
    for label in contents.renamed:
        yield from _wrapped(f"the name of a class folder is not UTF-8; read as {shown(label)}")
    yield from _duplicates(root, train, held_out)


def _alike(labels: Iterable[str]) -> Iterator[str]:
    """Words that differ in case and in what parts them, as in folders that two people put together."""
    groups: dict[str, list[str]] = defaultdict(list)
    for label in sorted(labels):
        groups[re.sub(r"[\s_-]+", " ", label.casefold()).strip()].append(label)
    for name, group in groups.items():
        if len(group) > 1 and len(name) > 1:  # a and A are letters
            yield ", ".join(f"{shown(label)!r}" for label in group)


def _duplicates(root: Path, train: list[Image], held_out: list[Image]) -> Iterator[str]:
    groups: dict[str, list[tuple[Image, bool]]] = defaultdict(list)
    for images, is_test in ((train, False), (held_out, True)):
        for image in images:
            groups[image.digest].append((image, is_test))
    within, across, leaked = [], [], []
    for group in groups.values():
        members = [image for image, _ in group]
        pairs = [(members[0].path, other.path) for other in members[1:]]
        if len({is_test for _, is_test in group}) > 1:
            seen = next(image for image, is_test in group if not is_test)
            leaked += [(image.path, seen.path) for image, is_test in group if is_test]
        if len({image.label for image in members}) > 1:
            first = members[0]
            across += [(first.path, other.path) for other in members[1:] if other.label != first.label]
        elif len({is_test for _, is_test in group}) == 1:
            within += pairs
    for pairs, text in (
        (
            leaked,
            "WARNING: test images that are training images too, so accuracy will look better than it is",
        ),
        (across, "WARNING: images that are in two classes"),
        (within, "copies of an image in the same class" if held_out else _COPIES),
    ):
        if pairs:
            names = [f"{_name(b, root)} = {_name(a, root)}" for a, b in pairs]
            yield from _wrapped(f"{text} ({len(pairs):,}): {few(names, _FEW)}")


def _wrapped(text: str, indent: int = 2) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
