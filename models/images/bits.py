"""Numbers of any number of bits, as the headers of video codecs have them."""

from __future__ import annotations

import struct


class Bits:
    """Reads bits, the highest of each byte first."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def number(self, count: int) -> int:
        """The next `count` bits.

        Raises:
            struct.error: there are fewer.
        """
        self._left -= count
        if self._left < 0:
            raise struct.error("there are not so many bits")
        return self._value >> self._left & (1 << count) - 1

    def exponential(self) -> int:
        """The next number in the code of Exp-Golomb (ITU-T H.265, section 9.2)."""
        zeros = 0
        while not self.number(1):
            zeros += 1
        return (1 << zeros) - 1 + self.number(zeros)
