"""What the header of an image file tells before any decoder sees the file.

The times are those of one core of an AMD EPYC server processor. They were measured with the worst files that
the formats allow, not with ordinary ones; `benchmarks/decoding_cost.py` compares them with the truth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Cost(NamedTuple):
    """The most that decoding a file takes.

    Attributes:
        seconds: of one core's time.
        memory: bytes at the peak, without the file itself.
    """

    seconds: float
    memory: int


@dataclass(slots=True)
class Header:
    """What a format's reader found out.

    Attributes:
        format: Pillow's name of the format.
        width: in pixels, as stored; an EXIF orientation may still swap it with the height.
        height: in pixels.
        full_cost: of decoding at full size.
    """

    format: str
    width: int
    height: int
    full_cost: Cost

    def cost(self, smallest: float) -> Cost:
        """What decoding takes if the shorter side has to keep only `smallest` pixels."""
        del smallest  # only JPEG can be decoded at less than its full size
        return self.full_cost
