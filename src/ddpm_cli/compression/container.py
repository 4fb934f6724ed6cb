"""The file of a compressed image: a header of about 20 bytes, then the stream of bits.

    magic "ddpm" and version 1       5 bytes
    fingerprint of the model         4 bytes, the first of `DDPM.fingerprint`
    block_bits                       1 byte
    steps, last t, bytes of stream   each 7 bits per byte, the lowest first; the high bit says that more follow
    CRC-32 of the stream             4 bytes
    CRC-16 of all of this            2 bytes

A file that is shorter than it says was cut: it is a coarser image, and its stream cannot be checked.
"""

from __future__ import annotations

import binascii
import struct
import zlib
from dataclasses import dataclass

from ddpm_cli.compression.codec import Plan
from ddpm_cli.errors import DataError

__all__ = ["SUFFIX", "Container", "header_size"]

SUFFIX = ".ddpm"

_MAGIC, _VERSION = b"ddpm", 1
_FINGERPRINT = 4  # bytes
_MOST_BLOCK_BITS = 16  # 256 MiB for the candidates
_LONGEST = 5  # bytes of a number


@dataclass(frozen=True)
class Container:
    """fingerprint: of the model, at least 8 hexadecimal digits. stream: see `codec.send`. missing: bytes cut off."""

    fingerprint: str
    plan: Plan
    stream: bytes
    missing: int = 0

    @property
    def header(self) -> bytes:
        body = _MAGIC + struct.pack(">B4sB", _VERSION, self._short, self.plan.block_bits)
        body += b"".join(map(_number, (self.plan.steps, self.plan.last, len(self.stream))))
        body += struct.pack(">I", zlib.crc32(self.stream))
        return body + struct.pack(">H", binascii.crc_hqx(body, 0))

    @property
    def _short(self) -> bytes:
        return bytes.fromhex(self.fingerprint)[:_FINGERPRINT]

    def to_bytes(self) -> bytes:
        return self.header + self.stream

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> Container:
        """Read what `to_bytes` wrote, or the beginning of it. name: of the file, in messages. Raises DataError."""
        damaged = DataError(f"{name}: is damaged: its checksum is wrong", "Copy or download it again.")
        if not data.startswith(_MAGIC):
            raise DataError(f"{name}: was not made by ddpm compress")
        try:
            version, short, block_bits = struct.unpack_from(">B4sB", data, len(_MAGIC))
            place = len(_MAGIC) + 6
            numbers = []
            for _ in range(3):
                value, place = _read_number(data, place)
                numbers.append(value)
            stored, check = struct.unpack_from(">IH", data, place)
        except (struct.error, IndexError):
            raise DataError(f"{name}: ends within its header") from None
        except ValueError:
            raise damaged from None
        if version != _VERSION:
            raise DataError(f"{name}: has version {version} of the format, and this program reads {_VERSION}")
        stream = data[place + 6 :]
        steps, last, length = numbers
        if binascii.crc_hqx(data[: place + 4], 0) != check or not 1 <= block_bits <= _MOST_BLOCK_BITS or not steps:
            raise damaged
        if len(stream) > length:
            raise DataError(f"{name}: is damaged: it has {len(stream) - length} bytes too many")
        if len(stream) == length and zlib.crc32(stream) != stored:
            raise damaged
        return cls(short.hex(), Plan(block_bits, steps, last), stream, length - len(stream))

    def is_of(self, fingerprint: str) -> bool:
        """Whether the model with this fingerprint made it."""
        return bytes.fromhex(fingerprint)[:_FINGERPRINT] == self._short


def header_size(plan: Plan, length: int) -> int:
    """How many bytes come before a stream of `length` bytes."""
    empty = Container("00" * _FINGERPRINT, plan, b"")
    return len(empty.header) - len(_number(0)) + len(_number(length))


def _number(value: int) -> bytes:
    """A number in as few bytes as it needs, 7 bits in each."""
    low, high = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + _number(high) if high else bytes([low])


def _read_number(data: bytes, place: int) -> tuple[int, int]:
    """The number that begins at a place, and the place after it. Raises IndexError at the end of the data."""
    value = 0
    for i in range(_LONGEST):
        byte = data[place + i]
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, place + i + 1
    raise ValueError("a number is too long")
