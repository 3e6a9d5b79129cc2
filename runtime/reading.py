"""Reads the files of an engine package, each in one go. Whatever lies there, reading it ends.

An engine package may be written over at any time. So nothing that is used depends on a file any more once it
was read, and what is checked is what was read.
"""

from __future__ import annotations

import errno
import stat
from pathlib import Path
from typing import Final

TEXT_BYTES: Final = 4 << 20  # ten times the longest list of labels that is known


def read_file(path: Path, most: int | None = None) -> bytes:
    """The content of a regular file.

    Args:
        path: may be a link.
        most: bytes that the file may have.

    Raises:
        OSError: it is missing, not a regular file, too large, or cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would block, and some devices never end
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    with path.open("rb") as file:
        content = file.read() if most is None else file.read(most + 1)
    if most is not None and len(content) > most:
        raise OSError(errno.EFBIG, f"larger than {most:,} bytes", str(path))
    return content
