"""The output, written in parts beside it, so that an interruption costs at most one part.

The parts lie in a folder, the output's name and `.parts`, with the plan that they follow. When all are
there, they become the output, and the folder goes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv
from pydantic import BaseModel, ConfigDict, ValidationError

from models.errors import TrimRTError
from models.files import BusyError, locked, replace_file
from runtime.manifest import Manifest
from trimrt.predict.scoring import Rows

SCHEMA: Final = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("index", pa.int32()),
        pa.field("probability", pa.float32()),
        pa.field("top_labels", pa.list_(pa.string())),
        pa.field("top_probabilities", pa.list_(pa.float32())),
        pa.field("error", pa.string()),
        pa.field("engine", pa.string(), nullable=False),
        pa.field("engine_sha256", pa.string(), nullable=False),
    ]
)

_PLAN_NAME: Final = "plan.json"
_PLAN_KEY: Final = b"trimrt_plan"
_FIRST: Final = 5  # failures that are shown


class PartsError(TrimRTError):
    """The output cannot be written or gone on with; the message says what to do."""


class Plan(BaseModel):
    """What decides on every row of the output; parts of another plan are of no use."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine: str
    engine_version: str
    engine_sha256: str
    images: int
    images_sha256: str
    top_k: int
    batch_size: int
    part_size: int

    @property
    def parts(self) -> int:
        """How many parts there are."""
        return -(-self.images // self.part_size)

    def span(self, part: int) -> range:
        """The numbers of the images in a part."""
        return range(part * self.part_size, min((part + 1) * self.part_size, self.images))

    def digest(self, part: int) -> bytes:
        """What a part carries as its mark."""
        return hashlib.sha256(f"{self.model_dump_json()}#{part}".encode()).hexdigest().encode()


def to_table(rows: Iterable[Rows], manifest: Manifest) -> pa.Table:
    """The results as a table of `SCHEMA`."""
    batches = list(rows)
    errors = [error for batch in batches for error in batch.errors]
    indices = np.concatenate([batch.indices for batch in batches])
    probabilities = np.concatenate([batch.probabilities for batch in batches])
    failed = np.array([error is not None for error in errors])
    labels = pa.array(manifest.labels, pa.string())
    top = indices.shape[1]
    # A list for every image, and none where there is no result.
    ends = np.arange(len(errors) + 1, dtype=np.int32) * top
    missing = pa.array(failed)
    flat = pa.array(indices.ravel(), mask=np.repeat(failed, top))
    return pa.Table.from_arrays(
        [
            pa.array([path for batch in batches for path in batch.paths], pa.string()),
            labels.take(pa.array(indices[:, 0], mask=failed)),
            pa.array(indices[:, 0], mask=failed),
            pa.array(probabilities[:, 0], mask=failed),
            pa.ListArray.from_arrays(pa.array(ends), labels.take(flat), mask=missing),
            pa.ListArray.from_arrays(pa.array(ends), pa.array(probabilities.ravel()), mask=missing),
            pa.array(errors, pa.string()),
            pa.repeat(pa.scalar(manifest.name), len(errors)),
            pa.repeat(pa.scalar(manifest.provenance.artefact_sha256), len(errors)),
        ],
        schema=SCHEMA,
    )


@contextmanager
def open_parts(output: Path, plan: Plan, *, restart: bool = False) -> Iterator[Parts]:
    """The parts of one output; until the block ends no other process gets them.

    Args:
        output: the file that they become; CSV by its suffix, else Parquet.
        plan: what they follow.
        restart: forget parts that are there, and replace an output that is.

    Raises:
        PartsError: the folder holds parts of another plan, the output is there already, or another process is
            writing it.
    """
    folder = output.with_name(f"{output.name}.parts")
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder, wait=False))
        except BusyError:
            raise PartsError(
                f"another process is writing {output}; wait for it to end, or name another --out"
            ) from None
        yield Parts(output, folder, plan, restart=restart)


class Parts:
    """The parts of one output; see `open_parts`.

    Attributes:
        folder: where they lie.
    """

    def __init__(self, output: Path, folder: Path, plan: Plan, *, restart: bool) -> None:
        self.folder = folder
        self._output = output
        self._plan = plan
        if restart and self.folder.exists():
            shutil.rmtree(self.folder)
        self._plan_path = self.folder / _PLAN_NAME
        if self._plan_path.exists():
            self._check_plan()
        elif output.exists() and not restart:
            raise PartsError(f"{output} is there already; name another --out, or replace it with --restart")

    def _check_plan(self) -> None:
        path = self._plan_path
        try:
            begun = Plan.model_validate_json(path.read_text(encoding="utf-8"))
        except (ValidationError, UnicodeDecodeError):
            raise PartsError(f"{path} is damaged; start again with --restart") from None
        changed = [name for name in Plan.model_fields if getattr(begun, name) != getattr(self._plan, name)]
        if changed:
            raise PartsError(
                f"{self.folder} holds parts of a run that was interrupted, and since then "
                f"{_changes(changed)} changed. Start again with --restart, or name another --out"
            )

    def missing(self) -> list[int]:
        """The parts that are not there, or not whole."""
        return [part for part in range(self._plan.parts) if not self._is_whole(part)]

    def _is_whole(self, part: int) -> bool:
        path = self._path(part)
        if not path.exists():
            return False
        try:
            table = pq.read_table(path, page_checksum_verification=True)
        except (OSError, pa.ArrowException):
            return False
        mark = (table.schema.metadata or {}).get(_PLAN_KEY)
        return mark == self._plan.digest(part) and len(table) == len(self._plan.span(part))

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.parquet"

    def write(self, part: int, table: pa.Table) -> None:
        """Keep a part, whole or not at all; the plan with the first one."""
        if not self._plan_path.exists():
            with replace_file(self._plan_path) as new:
                new.write_text(self._plan.model_dump_json(indent=2) + "\n", encoding="utf-8")
        marked = table.replace_schema_metadata({_PLAN_KEY: self._plan.digest(part)})
        with replace_file(self._path(part)) as new:
            pq.write_table(marked, new, write_page_checksum=True)

    def assemble(self) -> Failures:
        """Turn the parts into the output, in their order, and remove them.

        Returns:
            The images without a result.
        """
        failures = Failures()
        tables = (failures.note(pq.read_table(self._path(part))) for part in range(self._plan.parts))
        write = _write_csv if self._output.suffix.lower() == ".csv" else _write_parquet
        with replace_file(self._output) as whole:
            write(whole, tables)
        shutil.rmtree(self.folder)
        return failures


@dataclass
class Failures:
    """The images without a result.

    Attributes:
        count: how many.
        first: the first of them, with the reasons.
    """

    count: int = 0
    first: list[tuple[str, str]] = field(default_factory=list)

    def note(self, table: pa.Table) -> pa.Table:
        """Take note of those in `table`, which is returned."""
        failed = table.filter(table.column("error").is_valid()).select(["path", "error"])
        self.count += len(failed)
        rows = failed.slice(0, max(0, _FIRST - len(self.first))).to_pylist()
        self.first += [(row["path"], row["error"]) for row in rows]
        return table


def _changes(names: Sequence[str]) -> str:
    what = {
        "engine": "the engine",
        "engine_version": "the engine",
        "engine_sha256": "the engine",
        "images": "the images",
        "images_sha256": "the images",
        "top_k": "--top-k",
        "batch_size": "--batch-size",
        "part_size": "--part-size",
    }
    return " and ".join(dict.fromkeys(what[name] for name in names))


def _write_parquet(path: Path, tables: Iterator[pa.Table]) -> None:
    with pq.ParquetWriter(path, SCHEMA) as writer:
        for table in tables:
            writer.write_table(table.replace_schema_metadata(None))


def _write_csv(path: Path, tables: Iterator[pa.Table]) -> None:
    """Lists become JSON, which CSV has no other place for."""
    schema = pa.schema(
        [field.with_type(pa.string()) if pa.types.is_list(field.type) else field for field in SCHEMA]
    )
    with csv.CSVWriter(path, schema) as writer:
        for table in tables:
            columns = [
                pa.array([_json(value) for value in column.to_pylist()], pa.string())
                if pa.types.is_list(column.type)
                else column
                for column in table.columns
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)
