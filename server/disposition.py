"""The filename in a form part's `Content-Disposition`."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote_to_bytes

from python_multipart.multipart import parse_options_header

# RFC 8187. Not meant for forms, but what older clients send for names beyond ASCII.
_EXTENDED: Final = re.compile(rb";\s*filename\*\s*=\s*(utf-8|iso-8859-1)'[^']*'([^\s;]*)", re.IGNORECASE)


def parse_disposition(value: bytes) -> tuple[str, str | None]:
    """A part's name, and its filename if the client gave one."""
    options = parse_options_header(value)[1]
    name = options.get(b"name", b"").decode("utf-8", "replace")
    extended = _EXTENDED.search(value)
    if extended is not None:
        return name, unquote_to_bytes(extended[2]).decode(extended[1].decode(), "replace")
    filename = options.get(b"filename")
    return name, None if filename is None else filename.decode("utf-8", "replace")
