"""ZIP files of photographs, as phones and clouds hand them out, unpacked into the cache.

Nothing in an archive decides where a file goes, or how much is written: what leads out of the folder is
refused, and so is what unpacks to more than photographs can.
"""

from __future__ import annotations

import hashlib
import shutil
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Final

from models.bars import for_each
from models.files import replace_folder
from models.folders import DatasetError, is_picture, shown

_UTF8: Final = 0x800
_ENCRYPTED: Final = 0x1
_MOST_FILES: Final = 1_000_000
_HARMLESS_BYTES: Final = 1 << 30  # pictures of drawings shrink a hundredfold; so much of them is no harm
_MOST_GROWTH: Final = 20
_CHUNK: Final = 1 << 20
# By what their files begin with; a tar file says so further in.
_OTHERS: Final = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"7z\xbc\xaf": "7-Zip",
    b"Rar!": "RAR",
}
_TAR: Final = slice(257, 262)


def unpacked(path: Path, cache_dir: Path) -> Path:
    """The folder that a ZIP file unpacks to; anything else as it is.

    Raises:
        DatasetError: a ZIP file that is damaged, encrypted, or no archive of photographs; another archive.
    """
    if not path.is_file():
        return path
    if zipfile.is_zipfile(path):
        return _unpack(path, cache_dir)
    if kind := _other_kind(path):
        raise DatasetError(f"{path} is a {kind} archive, not a ZIP file; unpack it and name the folder")
    return path


def _other_kind(path: Path) -> str | None:
    with path.open("rb") as file:
        start = file.read(_TAR.stop)
    if start[_TAR] == b"ustar":
        return "tar"
    return next((kind for mark, kind in _OTHERS.items() if start.startswith(mark)), None)


def _unpack(archive: Path, cache_dir: Path) -> Path:
    """The folder with the archive's files, unpacked unless the cache has them already.

    Only pictures are written. Of all other files there are the names alone, for the scan to tell of.
    """
    digest = hashlib.sha256()
    with archive.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    folder = cache_dir / "archives" / digest.hexdigest()[:32]
    inner = folder / archive.stem
    if inner.is_dir():
        return inner
    try:
        with zipfile.ZipFile(archive) as opened, replace_folder(folder, cache=True) as new:
            files = _files(archive, opened, cache_dir)
            for path in files:
                (new / archive.stem / path).parent.mkdir(parents=True, exist_ok=True)

            def write(item: tuple[PurePosixPath, zipfile.ZipInfo]) -> None:
                path, entry = item
                with (new / archive.stem / path).open("wb") as out:
                    if is_picture(path):
                        with opened.open(entry) as data:  # no more of it than its header says
                            shutil.copyfileobj(data, out, _CHUNK)

            for_each(write, list(files.items()), f"Unpacking {archive.name}")
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError) as error:
        raise DatasetError(
            f"{archive} cannot be unpacked here ({error}); unpack it yourself and name the folder"
        ) from error
    return inner


def _files(archive: Path, opened: zipfile.ZipFile, cache_dir: Path) -> dict[PurePosixPath, zipfile.ZipInfo]:
    """Its files by the places that they go to.

    Raises:
        DatasetError: they may not be unpacked.
    """
    entries = [entry for entry in opened.infolist() if not _name(entry).endswith("/")]
    if len(entries) > _MOST_FILES:
        raise DatasetError(f"{archive} has {len(entries):,} files; at most {_MOST_FILES:,} are unpacked")
    files: dict[PurePosixPath, zipfile.ZipInfo] = {}
    for entry in entries:
        path = PurePosixPath(_name(entry))
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise DatasetError(f"{archive}: {shown(str(path))} leads out of the archive; nothing is unpacked")
        files[path] = entry
    pictures = [entry for path, entry in files.items() if is_picture(path)]
    if any(entry.flag_bits & _ENCRYPTED for entry in pictures):
        raise DatasetError(f"{archive} is encrypted; unpack it yourself and name the folder")
    size, room = sum(entry.file_size for entry in pictures), shutil.disk_usage(_existing(cache_dir)).free
    if size > max(_HARMLESS_BYTES, _MOST_GROWTH * archive.stat().st_size):
        raise DatasetError(
            f"{archive} would unpack to {size / 1e9:,.1f} GB, more than {_MOST_GROWTH} times its own size; "
            "photographs do not shrink so much, so it is not unpacked"
        )
    if size > room:
        raise DatasetError(
            f"{archive} unpacks to {size / 1e9:,.1f} GB, and {cache_dir} has {room / 1e9:,.1f} GB left; make "
            "room, or set TRIMRT_CACHE to another folder"
        )
    return files


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def _name(entry: zipfile.ZipInfo) -> str:
    """The name with its parts divided by slashes, also where Windows or macOS wrote it in their own ways."""
    name = entry.filename
    if not entry.flag_bits & _UTF8:  # read as the standard says, but a Mac writes UTF-8 here too
        with suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/")
