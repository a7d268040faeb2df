"""Turns untrusted JSON into frozen dataclasses, and dataclasses into JSON; the dataclasses are the schema.

It owns the rules that hold for every JSON document: UTF-8 only, no duplicate key, no NaN, no endless number, nothing
nested too deep, a bool is no number, a string holds no NUL and no half surrogate pair. Which fields there are and
what they may hold is said by the dataclasses themselves (``config``); their ``__post_init__`` refuses what a type
cannot. A key that a dataclass does not have is ignored, as the runtime specification demands of one that it does not
know. Those that it knows and katapy does not honour are in the dataclass's REFUSED: they are refused by name, unless
the value is empty and so asks for nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, NamedTuple, NoReturn, TypeVar

from katapy_agent.errors import InvalidArgument, Unsupported

MAX_ITEMS: Final = 65536
MAX_TEXT: Final = 131072  # the kernel's limit for one argument or environment string

_T = TypeVar("_T")
_Decoder = Callable[[object, str], Any]


class Range(NamedTuple):
    """Inclusive bounds of an integer: ``Annotated[int, Range(0, 7)]``."""

    low: int
    high: int


# Keys that are not the field's name in camel case.
_IRREGULAR: Final = {
    "block_io": "blockIO",
    "container_id": "containerID",
    "disable_oom_killer": "disableOOMKiller",
    "host_id": "hostID",
    "kernel_tcp": "kernelTCP",
    "throttle_read_iops_device": "throttleReadIOPSDevice",
    "throttle_write_iops_device": "throttleWriteIOPSDevice",
    "class_": "class",
}


def parse(cls: type[_T], data: bytes, *, what: str, max_bytes: int) -> _T:
    """Parse a JSON document into the dataclass ``cls``.

    ``what`` names the document in errors. Raises InvalidArgument for what is wrong, Unsupported for a field that
    katapy does not honour; both name the field.
    """
    if len(data) > max_bytes:
        raise InvalidArgument(f"{what} has {len(data)} bytes, more than {max_bytes}")
    try:
        document = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_bounded_int
        )
    except RecursionError as error:
        raise InvalidArgument(f"{what} is nested too deep") from error
    except ValueError as error:
        raise InvalidArgument(f"{what} is not valid JSON: {error}") from error
    return decode(cls, document)


def decode(cls: type[_T], value: object) -> _T:
    """Build the dataclass ``cls`` from parsed JSON. Raises InvalidArgument and Unsupported, which name the field."""
    return typing.cast(_T, decoder(typing.cast(Any, cls))(value, ""))


def encode(value: object) -> object:
    """Return a dataclass as plain JSON that ``decode`` takes back; what is None or empty is left out."""
    if dataclasses.is_dataclass(value):
        pairs = ((_key(field.name), getattr(value, field.name)) for field in dataclasses.fields(value))
        return {key: encode(item) for key, item in pairs if item is not None and item != ()}
    if isinstance(value, tuple):
        return [encode(item) for item in value]
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    return value


@functools.cache
def decoder(kind: Any) -> _Decoder:
    """Return the function that turns JSON into ``kind``; it takes the value and the path that names it."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _integer(arguments[1])
    if origin in (types.UnionType, typing.Union):
        (inner,) = (decoder(argument) for argument in arguments if argument is not type(None))
        return lambda value, where: None if value is None else inner(value, where)
    if origin is tuple:
        return _sequence(decoder(arguments[0]))
    if origin is Mapping:
        return _mapping(decoder(arguments[1]))
    if kind is bool:
        return lambda value, where: value if isinstance(value, bool) else _wrong(where, "true or false")
    if kind is str:
        return _text
    return _record(kind)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:64]!r} is there twice")
    return made


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _bounded_int(text: str) -> int:
    if len(text) > 20:
        raise ValueError("a number has more than 20 digits")
    return int(text)


def _wrong(where: str, wanted: str) -> NoReturn:
    raise InvalidArgument(f"{where or 'the document'} is not {wanted}")


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        _wrong(where, "a string")
    if len(value) > MAX_TEXT:
        _wrong(where, f"at most {MAX_TEXT} characters long")
    if "\0" in value:
        _wrong(where, "free of NUL characters")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            _wrong(where, "valid Unicode")
    return value


def _integer(bounds: Range) -> _Decoder:
    def decode_integer(value: object, where: str) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            _wrong(where, "an integer")
        if not bounds.low <= value <= bounds.high:
            _wrong(where, f"between {bounds.low} and {bounds.high}")
        return value

    return decode_integer


def _sequence(item: _Decoder) -> _Decoder:
    def decode_sequence(value: object, where: str) -> tuple[Any, ...]:
        if value is None:
            return ()
        if not isinstance(value, list):
            _wrong(where, "an array")
        if len(value) > MAX_ITEMS:
            _wrong(where, f"at most {MAX_ITEMS} items long")
        return tuple(item(each, f"{where}[{index}]") for index, each in enumerate(value))

    return decode_sequence


def _mapping(item: _Decoder) -> _Decoder:
    def decode_mapping(value: object, where: str) -> Mapping[str, Any]:
        if value is None:
            return {}
        if not isinstance(value, dict):
            _wrong(where, "an object")
        if len(value) > MAX_ITEMS:
            _wrong(where, f"at most {MAX_ITEMS} items long")
        return {_text(key, f"a key of {where}"): item(each, f"{where}[{key!r}]") for key, each in value.items()}

    return decode_mapping


def _key(name: str) -> str:
    head, *rest = name.split("_")
    return _IRREGULAR.get(name) or head + "".join(map(str.capitalize, rest))


def _record(cls: Any) -> _Decoder:
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {_key(field.name): (field.name, decoder(hints[field.name])) for field in dataclasses.fields(cls)}
    refused = frozenset(getattr(cls, "REFUSED", ()))
    required = {
        _key(field.name)
        for field in dataclasses.fields(cls)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }

    def decode_record(value: object, where: str) -> Any:
        if not isinstance(value, dict):
            _wrong(where, "an object")
        prefix = f"{where}." if where else ""
        made = {}
        for key, item in value.items():
            if key in fields:
                name, decode_item = fields[key]
                if item is not None or key in required:
                    made[name] = decode_item(item, prefix + key)
            elif item and key in refused:
                raise Unsupported(f"{prefix}{key} is not supported")
        if missing := required - value.keys():
            raise InvalidArgument(f"{prefix}{min(missing)} is missing")
        try:
            return cls(**made)
        except (InvalidArgument, Unsupported) as error:
            raise type(error)(f"{prefix}{error}") from error

    return decode_record
