"""A stream of bits: fixed-width numbers, and numbers of any size in Elias's gamma code."""

from __future__ import annotations

__all__ = ["BitReader", "BitWriter", "EndOfBitsError"]


class EndOfBitsError(Exception):
    """The stream ends within a number, or its writer has reached its limit."""


class BitWriter:
    """Appends numbers to a stream. limit: the most bits that it may have; None: any number."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.count = 0
        self._parts: list[str] = []

    def write(self, value: int, width: int) -> None:
        """Append a number of `width` bits, the highest one first. value: in [0, 2**width)."""
        if width:
            self._parts.append(f"{value:0{width}b}")
            self.count += width

    def write_gamma(self, value: int) -> None:
        """Append a number above 0 in Elias's gamma code: 2 floor(log2 value) + 1 bits."""
        self.write(value, 2 * value.bit_length() - 1)

    def extend(self, other: BitWriter) -> None:
        """Append another stream, whole or not at all. Raises EndOfBitsError if it does not fit."""
        if self.limit is not None and self.count + other.count > self.limit:
            raise EndOfBitsError
        self._parts += other._parts
        self.count += other.count

    def to_bytes(self) -> bytes:
        """The stream, filled up to a byte with zeros. No gamma code has only zeros, so they are never read as one."""
        size = -(-self.count // 8)
        return (int("".join(self._parts) or "0", 2) << (8 * size - self.count)).to_bytes(size, "big")


class BitReader:
    """Reads what a BitWriter wrote. Raises EndOfBitsError if the stream ends within a number."""

    def __init__(self, data: bytes) -> None:
        self.count = 0  # bits that were read
        self._data = data

    def read(self, width: int) -> int:
        first, end = self.count, self.count + width
        if end > 8 * len(self._data):
            raise EndOfBitsError
        self.count = end
        some = int.from_bytes(self._data[first // 8 : -(-end // 8)], "big")
        return (some >> (-end % 8)) & ((1 << width) - 1)

    def read_gamma(self, most: int) -> int:
        """most: the largest number to expect. Raises ValueError if the number must be larger."""
        zeros = 0
        while not self.read(1):
            zeros += 1
            if zeros >= most.bit_length():
                raise ValueError(f"a number is above {most}")
        value = 1 << zeros | self.read(zeros)
        if value > most:
            raise ValueError(f"a number is above {most}")
        return value
