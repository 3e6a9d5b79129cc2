"""Where the images come from: files, or a column of a Parquet file."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import TrimRTError
from models.folders import SUFFIXES

PARQUET_SUFFIXES: Final = frozenset({".parquet", ".pq"})

_ROWS_AT_ONCE: Final = 64  # of a Parquet file; they hold encoded images


class SourceError(TrimRTError):
    """There is nothing to score; the message says what to do."""


class Item(NamedTuple):
    """One image to score.

    Attributes:
        path: what its row is called in the output.
        image: the encoded file, the path where it lies, or None if the input has none there.
    """

    path: str
    image: bytes | str | None


class Source(Protocol):
    """Images in an order that does not change."""

    def __len__(self) -> int:
        """How many."""

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """Those with numbers `start` to `stop - 1`, read as they are asked for."""

    def digest(self) -> str:
        """SHA-256, in hexadecimal, that changes when the images do: of names, sizes and times of change."""


@dataclass(frozen=True)
class ImageFiles:
    """Image files, each read by the thread that decodes it.

    Attributes:
        paths: of the files, as they are called in the output.
        folder: what they are relative to, for readers in other folders.
    """

    paths: tuple[Path, ...]
    folder: Path = field(default_factory=Path.cwd)

    def __len__(self) -> int:
        return len(self.paths)

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """See `Source`."""
        paths = map(str, self.paths[start:stop])
        # Joining two of `Path` takes four times as long.
        return (Item(_text(path), os.path.join(self.folder, path)) for path in paths)  # noqa: PTH118

    def digest(self) -> str:
        """See `Source`."""
        return _digest(self.paths)


@dataclass(frozen=True)
class ParquetColumn:
    """A column of a Parquet file: encoded images, structs with a member `bytes`, or paths of files.

    Paths are relative to the Parquet file's folder.

    Attributes:
        file: the Parquet file.
        column: of the images.
        id_column: of what their rows are called in the output; None: the path, or `file#number`.
        rows: how many there are.
        folder: what `file` is relative to, for readers in other folders.
    """

    file: Path
    column: str
    id_column: str | None
    rows: int
    folder: Path = field(default_factory=Path.cwd)

    def __len__(self) -> int:
        return self.rows

    def items(self, start: int, stop: int) -> Iterator[Item]:
        """See `Source`; reads from the beginning of the row group that holds `start`."""
        with pq.ParquetFile(self.folder / self.file) as file:
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            first = 0  # row of the group
            group = 0
            while group < len(sizes) and first + sizes[group] <= start:
                first += sizes[group]
                group += 1
            rows = self._rows(file, range(group, len(sizes)), first)
            yield from itertools.islice(rows, start - first, stop - first)

    def _rows(self, file: pq.ParquetFile, groups: Iterable[int], number: int) -> Iterator[Item]:
        columns = [self.column, *([self.id_column] if self.id_column else [])]
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=list(groups), columns=columns):
            names = batch.column(self.id_column) if self.id_column else itertools.repeat(None)
            for image, name in zip(batch.column(self.column), names, strict=False):
                yield self._item(image.as_py(), None if name is None else str(name.as_py()), number)
                number += 1

    def _item(
        self, value: bytes | str | dict[str, bytes | str | None] | None, name: str | None, row: int
    ) -> Item:
        if isinstance(value, dict):
            value = value["bytes"]
        if isinstance(value, str):
            return Item(value if name is None else name, str(self.folder / self.file.parent / value))
        return Item(f"{_text(self.file)}#{row}" if name is None else name, value)

    def digest(self) -> str:
        """See `Source`."""
        return _digest([self.file], self.column, self.id_column or "")


def open_source(inputs: tuple[Path, ...], column: str | None, id_column: str | None) -> Source:
    """What the command line names: one Parquet file, or image files and folders of them.

    Folders are searched to any depth for the suffixes of images, in the order of their names; what begins
    with a dot is left out.

    Raises:
        SourceError: no images, or inputs that do not go together.
    """
    if any(path.suffix.lower() in PARQUET_SUFFIXES for path in inputs):
        if len(inputs) > 1:
            raise SourceError("a Parquet file is scored by itself, without further inputs")
        return _open_parquet(inputs[0], column, id_column)
    if column or id_column:
        raise SourceError("--column and --id-column are for a Parquet file")
    paths = dict.fromkeys(path for given in inputs for path in (_find(given) if given.is_dir() else [given]))
    if not paths:
        raise SourceError(f"no images ({', '.join(sorted(SUFFIXES))}) in {', '.join(map(str, inputs))}")
    return ImageFiles(tuple(paths))


def _find(folder: Path) -> Iterator[Path]:
    for directory, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."):
                yield Path(directory, name)


def _open_parquet(path: Path, column: str | None, id_column: str | None) -> ParquetColumn:
    try:
        with pq.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{path} cannot be read as Parquet: {error}") from None
    for name in (column, id_column):
        if name is not None and name not in schema.names:
            raise SourceError(f"{path} has no column {name!r}; it has {', '.join(schema.names)}")
    if column is None:
        column = _only_images(path, schema)
    elif not (_holds_images(schema.field(column).type) or _is_text(schema.field(column).type)):
        raise SourceError(
            f"column {column!r} of {path} holds {schema.field(column).type}, neither images nor paths"
        )
    if rows == 0:
        raise SourceError(f"{path} has no rows")
    return ParquetColumn(path, column, id_column, rows)


def _only_images(path: Path, schema: pa.Schema) -> str:
    found = [name for name in schema.names if _holds_images(schema.field(name).type)]
    if len(found) != 1:
        raise SourceError(
            f"which column of {path} holds the images? choose with --column: {', '.join(schema.names)}"
        )
    return str(found[0])


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return bool(index >= 0 and _holds_images(kind.field(index).type))
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _text(path: str | Path) -> str:
    """A path as text; bytes that are no UTF-8 become question marks."""
    return os.fsencode(path).decode(errors="replace")


def _digest(paths: Iterable[Path], *more: str) -> str:
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = path.stat()
        except OSError:  # its row will say so
            digest.update(b"%s\0missing\0" % os.fsencode(path))
        else:
            digest.update(b"%s\0%d\0%d\0" % (os.fsencode(path), status.st_size, status.st_mtime_ns))
    for text in more:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()
