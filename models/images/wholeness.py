"""Whether a file has its end, and no damage that can be seen without decoding it."""

from __future__ import annotations

import struct
import zlib
from typing import Final

_END: Final = 32  # bytes; behind the end of an image some programs add a few of their own


def looks_whole(data: bytes, image_format: str) -> bool:
    """Whether nothing speaks for damage. False is a suspicion alone, which decoding has to settle.

    Args:
        data: a file whose header could be read.
        image_format: what its header says it is.
    """
    if not any(data[-_END:]):  # the length of a whole file, written in part
        return False
    if image_format == "JPEG":
        return b"\xff\xd9" in data[-_END:]
    if image_format == "PNG":
        return _png_is_whole(data)
    if image_format == "GIF":
        return b"\x3b" in data[-_END:]
    if image_format == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 <= len(data)
    if image_format == "BMP":
        return 0 < int.from_bytes(data[2:6], "little") <= len(data)
    # Reading their headers found all items of these in the file; the parts of a TIFF can be anywhere.
    return image_format in ("HEIF", "AVIF")


def _png_is_whole(data: bytes) -> bool:
    """Whether all chunks up to the last have the checksums that they say."""
    view, position = memoryview(data), 8
    try:
        while True:
            (length,) = struct.unpack_from(">I", data, position)
            end = position + 8 + length
            (checksum,) = struct.unpack_from(">I", data, end)
            if zlib.crc32(view[position + 4 : end]) != checksum:
                return False
            if data[position + 4 : position + 8] == b"IEND":
                return True
            position = end + 4
    except struct.error:
        return False
