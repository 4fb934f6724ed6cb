"""Damage to files, by accident or on purpose. It is drawn from a generator, so it can be repeated."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Random = random.Random

# What stands in the place of a JSON value, as text: some of it is no JSON, and some that Python reads only.
VALUES = [
    *("null", "true", "false", "-1", "0", "-0.0", "1", "1.5", "2", "3", "4", "7", "16", "1000000", "2147483648"),
    *("1e400", "-1e400", "1e-320", "1e308", "NaN", "Infinity", "-Infinity", "1" + "0" * 400, "1" * 5000, "0x10"),
    *('""', '"x"', '"4"', r'"\u001b[31m"', r'"\u001b]0;title\u0007"', r'"\u009b31m"', r'"\u202e"', r'"\ud800"'),
    *(r'"a\nb"', r'"\u0000"', '"/dev/zero"', '"../../x"', f'"{"x" * 10_000}"', '"\xff"', "'x'", "[]", "{}", "[[]]"),
    *("[1, 2]", '["x", "y"]', '[["diffusers", "X"]]', '{"a": {"b": 1}}', "[" * 500 + "]" * 500, "[" * 100_000),
]
_MARK = "a value to be replaced"
JUNK = [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\x00", b"\x1b[31m", b"\x1b]0;title\x07", b"\x9b", b"\xc2\x9b31m", b"\n"]
JUNK += ["\u202e".encode(), b"---\n", b"{", b"[" * 2000, b"a: &a [*a, *a]\n", b"\r", b"\xef\xbb\xbf"]


def in_bytes(data: bytes, draw: Random) -> tuple[str, bytes]:
    """Bits that flipped, bytes that are gone, doubled, or others."""
    here = draw.randrange(len(data) + 1)
    there = min(len(data), here + draw.choice([1, 2, 8, 100, 10_000]))
    match draw.randrange(7):
        case 0:
            flipped = bytearray(data)
            for _ in range(draw.choice([1, 1, 1, 8, 100]) if data else 0):
                flipped[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            return "flip bits", bytes(flipped)
        case 1:
            return f"cut at {here}", data[:here]
        case 2:
            return f"delete {here}:{there}", data[:here] + data[there:]
        case 3:
            junk = draw.choice(JUNK)
            return f"insert {junk[:20]!r} at {here}", data[:here] + junk + data[here:]
        case 4:
            return f"double {here}:{there}", data[:there] + data[here:]
        case 5:
            return f"random {here}:{there}", data[:here] + draw.randbytes(there - here) + data[there:]
        case _:
            whole = draw.choice([b"", b"{}", b"[]", b"null", b"\0" * 1000, b"[" * 100_000, b"\x80\x02", b"PK\x03\x04"])
            return f"replace by {whole[:9]!r}", whole


def in_json(text: str, draw: Random) -> tuple[str, str]:
    """A value that is another one, a key that is gone, new, or there twice."""
    whole = json.loads(text)
    places = list(_places(whole))
    if not places:
        return "replace", draw.choice(VALUES)
    parent, key = draw.choice(places)
    value = draw.choice(VALUES)
    match draw.randrange(6):
        case 0:
            del parent[key]
            return f"remove {key!r}", json.dumps(whole)
        case 1 if isinstance(parent, dict):
            parent[new := draw.choice(["x", "", "\x1b[31m", "\x9b", "a\nb", "/dev/zero", "_x", "\ud800"])] = _MARK
            what = f"add {new!r}: "
        case 2 if isinstance(parent, dict):
            old = json.dumps({key: parent[key]})[1:-1]
            parent[key] = _MARK
            return f"double {key!r}: {value[:20]}", json.dumps(whole).replace(f'"{_MARK}"', f"{value}, {old}")
        case _:
            what = f"set {key!r}: "
            parent[key] = _MARK
    return f"{what}{value[:20]}", json.dumps(whole).replace(f'"{_MARK}"', value)


def _places(value: Any) -> Any:
    """Every (object or list, key) inside a JSON value."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def in_tensors(data: bytes, draw: Random) -> tuple[str, bytes]:
    """The header of a safetensors file has other types, shapes, places, or another length of itself."""
    (length,) = struct.unpack("<Q", data[:8])
    header, tensors = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = draw.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    about = header.get("__metadata__", {}).get("ddpm")
    match draw.randrange(9 if about is None else 14):
        case 0:
            wrong = draw.choice([0, 1, length - 1, length + 1, length + 8, 2**31, 2**40, 2**63, 2**64 - 1])
            return f"length {wrong}", struct.pack("<Q", wrong) + data[8:]
        case 1:
            entry["dtype"] = draw.choice(["F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "X", "", 4])
            what = f"{name}: dtype {entry['dtype']}"
        case 2:  # another type of the same size
            entry["dtype"] = draw.choice(["I32", "U32", "F32"])
            what = f"{name}: dtype {entry['dtype']}"
        case 3:
            halves = [size * (2 if i == 0 else 1) for i, size in enumerate(entry["shape"])] or [2]
            entry |= {"dtype": "F16", "shape": halves}
            what = f"{name}: halves {halves}"
        case 4:
            entry["shape"] = draw.choice([[], [0], [-1], [1] * 100, [2**62, 4], entry["shape"][::-1], [2**64], "x"])
            what = f"{name}: shape {str(entry['shape'])[:20]}"
        case 5:
            begin, end = entry["data_offsets"]
            entry["data_offsets"] = draw.choice([[end, begin], [begin, 2**63], [-1, end], [begin], [0, end], None])
            what = f"{name}: offsets {entry['data_offsets']}"
        case 6:
            header["__metadata__"] = draw.choice([{"x": "\x1b[31m"}, {"\x9b": ""}, {"x": 1}, None, [], {}])
            what = f"metadata {header['__metadata__']}"
        case 7:
            new = draw.choice(["\x1b[31m", "\x9b31m", "a\nb", "\u202e", "", "x" * 5000, "conv_in", "a.attentions.b"])
            header[new] = header.pop(name)
            what = f"rename {name} to {new[:9]!r}"
        case 8:  # values that no network has
            begin, end = entry["data_offsets"]
            odd = draw.choice([b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", b"\0" * 4, b"\1\0\0\0"])
            tensors = tensors[:begin] + odd * ((end - begin) // 4) + tensors[end:]
            what = f"{name}: filled with {odd!r}"
        case _:
            what, header["__metadata__"]["ddpm"] = in_json(about, draw)
    packed = json.dumps(header).encode()
    if draw.random() < 0.2:
        more, text = in_json(json.dumps(header), draw)
        what, packed = f"{what}, {more}", text.encode("utf-8", "surrogatepass")
    return what, struct.pack("<Q", len(packed)) + packed + tensors


def _linked(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def _endless(path: Path) -> None:
    """A device without an end. Users who may make one get their own, since they could also replace /dev/zero."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
    except PermissionError:
        path.symlink_to("/dev/zero")


# What may stand in the place of a file or a folder.
INSTEAD: dict[str, Callable[[Path], None]] = {
    "nothing": lambda path: None,
    "a file": lambda path: path.write_bytes(b"x"),
    "a folder": Path.mkdir,
    "a folder that is not empty": lambda path: (path / "x").mkdir(parents=True),
    "a pipe": os.mkfifo,
    "an endless device": _endless,
    "a link to nothing": _linked("nothing at all"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to its folder": _linked("."),
}
# Names that mean something in a run or a folder of samples, and those that no terminal should see.
NAMES = [
    "step-00000005",
    "step-99999999",
    "step-000000005",
    f"step-{'9' * 200}",
    "damaged-step-00000004",
    "config.json",
]
NAMES += [".step-00000004.x.partial", ".ddpm-0", "step-00000009.png", f"step-{'9' * 200}.png", "000001.png", "-o", "~"]
NAMES += ["\x1b[31m.png", "\x9b.safetensors", "a\nb", "\u202e.json", os.fsdecode(b"\xff.png"), ".lock", "README.md"]


def mutate(path: Path, draw: Random) -> str:
    """Damage a file. Returns what was done, in words."""
    data = path.read_bytes()
    chance = draw.random()
    if chance < 0.1:
        what = draw.choice(list(INSTEAD))
        path.unlink()
        INSTEAD[what](path)
        return f"{what} instead"
    if chance < 0.75 and path.suffix in (".json", ".jsonl"):
        lines = data.decode().splitlines(keepends=True) if path.suffix == ".jsonl" else [data.decode()]
        i = draw.randrange(len(lines))
        what, lines[i] = in_json(lines[i], draw)
        changed = "\n".join(lines).encode("utf-8", "surrogatepass")
    elif chance < 0.75 and path.suffix == ".safetensors":
        what, changed = in_tensors(data, draw)
    else:
        what, changed = in_bytes(data, draw)
    path.write_bytes(changed)
    return what


def add(folder: Path, draw: Random) -> str:
    """Put something into a folder."""
    path, what = folder / draw.choice(NAMES), draw.choice(list(INSTEAD))
    if not os.path.lexists(path):
        INSTEAD[what](path)
    return f"{what} as {path.name[:20]!r}"


def replace(folder: Path, draw: Random) -> str:
    """Put something into the place of a folder."""
    what = draw.choice(list(INSTEAD))
    shutil.rmtree(folder)
    INSTEAD[what](folder)
    return f"{what} instead"
