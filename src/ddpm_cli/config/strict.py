"""Dataclasses that check the key, the type and the range of every value."""

from __future__ import annotations

import dataclasses
import functools
import reprlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Self, Union, get_args, get_origin, get_type_hints

from ddpm_cli.errors import ModelError

__all__ = ["Check", "Count", "Positive", "Strict", "at_least", "between", "one_of", "shown"]


@dataclass(frozen=True)
class Check:
    """A check of a value besides its type, as an annotation of a field. words: complete "must be …"."""

    passes: Callable[[Any], bool]
    words: str


def between(low: float, high: float) -> Check:
    """Both ends included."""
    return Check(lambda value: low <= value <= high, f"between {low} and {high}")


def at_least(low: int) -> Check:
    return Check(lambda value: bool(value >= low), f"{low} or more")


def one_of(*choices: Any) -> Check:
    *first, last = map(str, choices)
    return Check(lambda value: value in choices, f"{', '.join(first)} or {last}")


Count = Annotated[int, between(1, 10**12)]
Positive = Annotated[float, Check(lambda value: 0 < value <= sys.float_info.max, "a number above 0")]

_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 100


def shown(value: object) -> str:
    """A value for a message; long and nested values are shortened."""
    return _repr.repr(value)


class Strict:
    """A frozen dataclass whose values have the types and pass the checks of its annotations.

    Lists become tuples, and 2.0 becomes 2 for an int. Raises ModelError, naming the key, on a value
    that does not fit.
    """

    def __post_init__(self) -> None:
        for key, hint in _hints(type(self)).items():  # type: ignore[arg-type]
            object.__setattr__(self, key, _checked(key, getattr(self, key), hint))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raises ModelError naming the first key that is unknown, missing, or has a value that does not fit."""
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        if unknown := sorted(set(values) - {field.name for field in fields}):
            raise ModelError(
                f"unknown setting {shown(unknown[0])} in a {cls.__name__.removeprefix('_')}",
                "Was this written by a newer version of ddpm?",
            )
        required = {field.name for field in fields if field.default is dataclasses.MISSING}
        if missing := sorted(required - set(values)):
            raise ModelError(f"setting {missing[0]!r} is missing in a {cls.__name__.removeprefix('_')}")
        return cls(**values)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    return {key: hint for key, hint in get_type_hints(kind, include_extras=True).items() if key in names}


def _checked(key: str, value: Any, hint: Any) -> Any:
    """The value in the type of its field. Raises ModelError if it has another type, or fails a check."""
    for kind in _alternatives(hint):
        base, *checks = get_args(kind) if get_origin(kind) is Annotated else (kind,)
        if get_origin(base) is tuple:
            if not isinstance(value, list | tuple):
                continue
            value = tuple(_checked(key, item, get_args(base)[0]) for item in value)
        elif issubclass(base, Strict) and isinstance(value, Mapping):
            try:
                value = base.from_dict(value)
            except ModelError as error:
                raise ModelError(f"{key}: {error.message}", error.hint) from None
        elif base is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        elif not _is_a(value, base):
            continue
        for check in checks:
            if not check.passes(value):
                raise ModelError(f"{key}={shown(value)}: must be {check.words}")
        return value
    raise ModelError(f"{key}={shown(value)}: must be {' or '.join(map(_in_words, _alternatives(hint)))}")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _is_a(value: object, kind: type) -> bool:
    if kind is float and type(value) is int:
        return True
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _in_words(kind: Any) -> str:
    base = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    return "a list" if get_origin(base) is tuple else _WORDS.get(base, "an object")
