"""What lies in a data set's folder: parts, classes, images, and what is none of these.

Photographs have passed through archives, operating systems and programs, and each left files of its own. None
of them is taken for a class or an image, and none is passed over without a word.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Final, Literal

from models.errors import TrimRTError
from models.naming import few

OnDamaged = Literal["stop", "skip"]
ON_DAMAGED_TEXT: Final = "Images that cannot be read: stop and name all of them, or leave them out."

SUFFIXES: Final = frozenset(
    {".jpg", ".jpeg", ".jfif", ".jpe", ".jif", ".png", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"}
    | {".heic", ".heif", ".hif", ".avif"}
)
# Cameras' own formats. Most are TIFF files to look at, but their first image is a thumbnail.
RAW_SUFFIXES: Final = frozenset(
    {".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"}
)
# Pictures that cannot be read; they are looked at, so that nobody loses half of a class without a word.
_OTHER_PICTURES: Final = frozenset({".jxl", ".jp2", ".psd", ".ico", ".svg"} | RAW_SUFFIXES)
_LEFT_BY_SYSTEMS: Final = frozenset(
    {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "@__thumb", "#recycle"}
    | {"$recycle.bin", "system volume information", "lost+found", "__pycache__"}
)

_TRAIN: Final = ("train", "training", "trainset", "trn")
_HELD_OUT: Final = (
    *("test", "testing", "testset", "tst"),
    *("val", "valid", "validation", "valset", "validate", "dev", "eval", "evaluation"),
)

SYSTEM_FILES: Final = "files and folders of operating systems and programs"
OTHER_FILES: Final = "files that are not images by their names"
LOOSE_IMAGES: Final = "images in no class folder"
EMPTY_FOLDERS: Final = "folders without images"
UNUSED_PARTS: Final = "folders beside the parts"


class DatasetError(TrimRTError):
    """A data set that cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Part:
    """Class folders and the images in them.

    Attributes:
        name: of the folder, as it is on the disk.
        classes: the files of each class, by label; no class is without files.
    """

    name: str
    classes: dict[str, list[Path]]


@dataclass
class Contents:
    """A data set's folder.

    Attributes:
        train: the training part, or all images where they are not parted.
        held_out: the part that comes with the data to test on.
        skipped: what is not used, by the reason.
        renamed: labels of the class folders whose names are not UTF-8.
        inner: folders in class folders that hold nothing else, whose images are of the class all the same.
    """

    train: Part = field(default_factory=lambda: Part("", {}))
    held_out: Part | None = None
    skipped: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))
    renamed: list[str] = field(default_factory=list)
    inner: list[Path] = field(default_factory=list)


def read_contents(root: Path) -> Contents:
    """Find parts, classes and images by the names of folders and files.

    Parts are known whatever their case and in common spellings (`Train`, `Testing`, `seg_train`). A part or a
    data set may be wrapped in a folder of its own, as archives often are.

    Raises:
        DatasetError: there are fewer than two classes, a training part without another, or several of a kind.
    """
    contents = Contents()
    root = _unwrapped(root, contents, within_part=False)
    folders = _folders(root)
    parts = [
        path for path in folders if _rank(path.name, (*_TRAIN, *_HELD_OUT)) is not None and _is_part(path)
    ]
    train, held_out = _chosen(root, parts, _TRAIN), _chosen(root, parts, _HELD_OUT)
    if train is None:
        if parts and parts == folders:
            raise DatasetError(
                f"{root} has {', '.join(f'{shown(p.name)}/' for p in parts)} but no train/; add it"
            )
        contents.train = Part("", _read_classes(root, contents))
        return contents
    if held_out is None:
        raise DatasetError(_nothing_held_out(root, train, folders))
    contents.train, contents.held_out = (
        Part(part.name, _read_classes(_unwrapped(part, contents, within_part=True), contents))
        for part in (train, held_out)
    )
    for path in sorted(root.iterdir()):
        if path not in (train, held_out):
            _skip(path, UNUSED_PARTS if path.is_dir() else _reason(path), contents)
    return contents


def read_unlabelled(root: Path) -> Contents:
    """Find images in a folder and the folders in it, all of the class with the empty label."""
    contents = Contents()
    images = _images_in(root, contents)
    contents.train = Part("", {"": images} if images else {})
    return contents


def shown(name: str | Path, longest: int = 60) -> str:
    """A name to print: text whatever its encoding, in one line, shortened in the middle if it is long."""
    text = "".join(letter if letter.isprintable() else "?" for letter in _text(str(name)))
    return text if len(text) <= longest else f"{text[: longest // 2 - 1]}…{text[-longest // 2 :]}"


def _text(name: str) -> str:
    """`name` as text: UTF-8, else the encoding of Western Windows; composed, for a Mac's are not."""
    encoded = os.fsencode(name)
    try:
        text = encoded.decode("utf-8")
    except UnicodeDecodeError:
        text = encoded.decode("cp1252", errors="replace")
    return unicodedata.normalize("NFC", text)


def _is_left_by_a_system(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LEFT_BY_SYSTEMS


def is_picture(path: PurePath) -> bool:
    """Whether it is an image by its name, of a kind that can be read or not."""
    return path.suffix.lower() in SUFFIXES | _OTHER_PICTURES


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not _is_left_by_a_system(p.name))


def _has_loose_pictures(folder: Path) -> bool:
    return any(
        is_picture(p) and not _is_left_by_a_system(p.name) and not p.is_dir() for p in folder.iterdir()
    )


def _unwrapped(folder: Path, contents: Contents, *, within_part: bool) -> Path:
    """The only folder in `folder`, if that is nothing but a wrapping around class folders or parts."""
    inner = _folders(folder)
    if (
        len(inner) != 1
        or _has_loose_pictures(folder)
        or _has_loose_pictures(inner[0])
        or not _folders(inner[0])
    ):
        return folder
    # A lone part has no other beside it; the lone folder in a part is a class unless its name says otherwise.
    if (_rank(inner[0].name, (*_TRAIN, *_HELD_OUT)) is not None) != within_part:
        return folder
    for path in sorted(folder.iterdir()):
        if path != inner[0]:
            _skip(path, OTHER_FILES, contents)
    return _unwrapped(inner[0], contents, within_part=within_part)


def _is_part(folder: Path) -> bool:
    """Whether it holds folders with images; a class holds images, a part without labels does too."""
    return not _has_loose_pictures(folder) and any(
        is_picture(Path(name))
        for inner in _folders(folder)
        for _, _, names in os.walk(inner)
        for name in names
    )


def _rank(name: str, spellings: tuple[str, ...]) -> tuple[bool, int] | None:
    """How well `name` says one of `spellings`, alone or with other words; the lowest says it best."""
    words = re.findall(r"[a-z]+", name.lower())
    known = [(words != [word], spellings.index(word)) for word in words if word in spellings]
    return min(known, default=None)


def _nothing_held_out(root: Path, train: Path, folders: list[Path]) -> str:
    alone = f"name {shown(root / train.name)} alone, of which a fifth then tests"
    for path in folders:
        if _rank(path.name, _HELD_OUT) is not None:  # as competitions hand it out
            return (
                f"{root} has {shown(train.name)}/, but {shown(path.name)}/ has no folders of classes; sort "
                f"its images by class, or {alone}"
            )
    return f"{root} has {shown(train.name)}/ but neither test/ nor val/ beside it; add one, or {alone}"


def _chosen(root: Path, parts: list[Path], spellings: tuple[str, ...]) -> Path | None:
    ranked = sorted((rank, path.name) for path in parts if (rank := _rank(path.name, spellings)) is not None)
    if not ranked:
        return None
    best = [name for rank, name in ranked if rank == ranked[0][0]]
    if len(best) > 1:
        raise DatasetError(f"{root}: which of {', '.join(map(shown, best))} is meant? Move the others away")
    return root / best[0]


def _read_classes(folder: Path, contents: Contents) -> dict[str, list[Path]]:
    classes: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not _is_left_by_a_system(path.name):
            files = _images_in(path, contents)
            label = _text(path.name)
            if not is_utf8(path.name):
                contents.renamed.append(label)
            if files:
                classes.setdefault(label, []).extend(files)
                inner = sorted({path / file.relative_to(path).parts[0] for file in files})
                if len(inner) > 1 and not set(inner) & set(files):
                    contents.inner += inner
            else:
                contents.skipped[EMPTY_FOLDERS].append(path)
        else:
            _skip(path, _reason(path), contents)
    if len(classes) < 2:
        raise DatasetError(_too_few(folder, classes, contents))
    return dict(sorted(classes.items()))


def _too_few(folder: Path, classes: dict[str, list[Path]], contents: Contents) -> str:
    text = f"{folder} has {len(classes)} class folder{'s' * (len(classes) != 1)} with images"
    if classes:
        text += f" ({shown(next(iter(classes)))})"
    text += "; a classifier needs at least two"
    if empty := contents.skipped.get(EMPTY_FOLDERS):
        text += f". Without images: {few(_within(folder, empty))}"
    if loose := contents.skipped.get(LOOSE_IMAGES):
        text += f". Put the images of each class in a folder of its own: {few(_within(folder, loose))}"
    return text


def _within(root: Path, paths: Iterable[Path]) -> list[str]:
    return [shown(path.relative_to(root)) for path in paths]


def is_utf8(name: str) -> bool:
    """Whether the name of a file or folder is text, which can be written to JSON."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _images_in(folder: Path, contents: Contents) -> list[Path]:
    """All images in a class folder and the folders in it, linked ones too."""
    found: list[Path] = []
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=_fail, followlinks=True):
        here = Path(place)
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        for name in [name for name in folders if _is_left_by_a_system(name)]:
            folders.remove(name)
            _skip(here / name, SYSTEM_FILES, contents)
        folders.sort()
        for name in sorted(names):
            path = here / name
            if is_picture(path) and not _is_left_by_a_system(name) and (path.is_file() or not path.exists()):
                found.append(path)
            else:
                _skip(path, _reason(path, within_class=True), contents)
    return found


def _fail(error: OSError) -> None:
    raise error


def _reason(path: Path, *, within_class: bool = False) -> str:
    if _is_left_by_a_system(path.name):
        return SYSTEM_FILES
    return LOOSE_IMAGES if is_picture(path) and not within_class else OTHER_FILES


def _skip(path: Path, reason: str, contents: Contents) -> None:
    if _is_left_by_a_system(path.name):
        reason = SYSTEM_FILES
    contents.skipped[reason].append(path)
