"""Streams of bits: what is written is read again, and their ends are found."""

import pytest

from ddpm_cli.compression.bits import BitReader, BitWriter, EndOfBitsError

GAMMA = [1, 2, 3, 4, 5, 100, 2**20]


def test_what_is_written_is_read():
    stream = BitWriter()
    for value in GAMMA:
        stream.write_gamma(value)
        stream.write(value % 8, 3)
    reader = BitReader(stream.to_bytes())
    assert [(reader.read_gamma(2**20), reader.read(3)) for _ in GAMMA] == [(value, value % 8) for value in GAMMA]
    assert reader.count == stream.count == sum(2 * value.bit_length() - 1 + 3 for value in GAMMA)


def test_the_padding_is_no_number():
    stream = BitWriter()
    stream.write_gamma(1)
    assert stream.to_bytes() == b"\x80"
    reader = BitReader(stream.to_bytes())
    reader.read_gamma(9000)
    with pytest.raises(EndOfBitsError):
        reader.read_gamma(9000)


def test_a_number_that_is_too_large_is_refused():
    stream = BitWriter()
    stream.write_gamma(9)
    for most in (8, 7, 3):
        with pytest.raises(ValueError, match=f"above {most}"):
            BitReader(stream.to_bytes()).read_gamma(most)
    assert BitReader(stream.to_bytes()).read_gamma(9) == 9


def test_a_full_stream_takes_all_of_a_part_or_nothing():
    stream, part = BitWriter(limit=10), BitWriter()
    part.write(5, 6)
    stream.extend(part)
    with pytest.raises(EndOfBitsError):
        stream.extend(part)
    assert (stream.count, stream.to_bytes()) == (6, b"\x14")
