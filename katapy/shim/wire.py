"""What an engine says on standard input, read without protobuf: importing that takes longer than all else of a start.

It is one message: google.protobuf.Any with the runtime's options, or from containerd 2.3 on
containerd.runtime.bootstrap.v1.BootstrapParams with them inside. Source: protobuf, "Encoding"; containerd,
api/runtime/bootstrap/v1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

_VARINT: Final = 0
_FIXED64: Final = 1
_BYTES: Final = 2
_FIXED32: Final = 5
_OPTIONS: Final = "runtimeoptions.v1.Options"


class Bootstrap(NamedTuple):
    """``config`` is the configuration file that the options name; "" for what was not said."""

    config: str = ""
    ttrpc: str = ""
    publisher: str = ""


def parse_bootstrap(data: bytes) -> Bootstrap:
    """Read what came on standard input. What is not known in it is left out, and what is no message is nothing."""
    try:
        fields = list(_fields(data))
        # An Any has two fields, and both are bytes; these are what no BootstrapParams goes without.
        if not any(number in (4, 5, 6, 7) for number, _ in fields):
            return Bootstrap(config=_config(data))
        config, said = "", dict(fields)
        for number, value in fields:
            if number == 8:
                config = config or _config(_text_fields(value).get(1, b""))
        return Bootstrap(config, _text(said.get(5)), _text(said.get(7)))
    except (ValueError, IndexError):
        return Bootstrap()


def _config(data: bytes) -> str:
    """Return the path that options name, an Any; "" for options of another type."""
    fields = _text_fields(data)
    if _text(fields.get(1)).rpartition("/")[2] != _OPTIONS:
        return ""
    return _text(_text_fields(fields.get(2, b"")).get(2))


def _text_fields(data: int | bytes) -> dict[int, bytes]:
    if isinstance(data, int):
        raise ValueError("a number where a message is expected")
    return {number: value for number, value in _fields(data) if isinstance(value, bytes)}


def _text(value: int | bytes | None) -> str:
    return value.decode() if isinstance(value, bytes) else ""


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield number and value of each field. Raises ValueError or IndexError."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        size = {_FIXED64: 8, _FIXED32: 4}.get(kind, -1)
        if kind == _BYTES:
            size, at = _varint(data, at)
        if size < 0 or at + size > len(data):
            raise ValueError("not a protobuf message")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
