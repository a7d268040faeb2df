"""Strict, bounded JSON: the border that every JSON document from outside crosses.

Python's own parser is too generous for a border: it guesses UTF-16, takes NaN and 1e400, lets the last of two equal
keys win and gives strings that cannot be encoded again. Here a document is read once, from a regular file, and is
refused with one line that names the file and what is wrong. What the values mean is the business of the caller.

It sits low and imports little: `katapy state` reads its files through it.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from typing import Any, Final, NoReturn

from katapy.errors import InvalidArgument, NotFound

# A config.json crosses to the guest in one gRPC message, which gRPC bounds at 4 MiB, envelope included. The kernel
# bounds argv and environment, the only parts that grow without an end, to 2 MiB for the usual 8 MiB stack.
MAX_BYTES: Final = 3 << 20
# The deepest path of the runtime-spec has nine levels; annotations and unknown keys may hold more.
MAX_DEPTH: Final = 64
# Covers every 64-bit number with its sign.
_MAX_DIGITS: Final = 20
_SHOWN: Final = 60
_PATH_MAX: Final = 4096


class _Refused(ValueError):
    """Raised inside the parser's hooks; becomes InvalidArgument with the document's name."""


def shown(text: str) -> str:
    """Return ``text`` as an error message may show it: quoted, printable ASCII, on one line, at most 60 characters."""
    return ascii(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]!a}... ({len(text)} characters)"


def read(
    path: str,
    *,
    what: str | None = None,
    limit: int = MAX_BYTES,
    dir_fd: int | None = None,
    check_status: Callable[[os.stat_result, str], None] | None = None,
) -> bytes:
    """Read a small regular file once and return its bytes.

    ``what`` names the file in errors (default: its path), ``limit`` is in bytes. With ``dir_fd`` the path is relative
    to that directory and a symbolic link is refused; without, links are followed as the caller's own choice.
    ``check_status`` may refuse the opened file by its owner and mode; it is given the name for its error, too.
    Raises NotFound when there is no such file, InvalidArgument when it is no regular file, too large or unreadable.
    """
    name = what or printable(path)
    # O_NONBLOCK: a FIFO in the file's place must be refused, not waited for.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY | (0 if dir_fd is None else os.O_NOFOLLOW)
    try:
        fd = os.open(path, flags, dir_fd=dir_fd)
    except FileNotFoundError as error:
        raise NotFound(f"{name}: no such file") from error
    except OSError as error:
        raise InvalidArgument(f"{name}: cannot be opened: {_reason(error)}") from error
    except ValueError as error:  # a NUL byte, or a lone surrogate, in the path itself
        raise InvalidArgument(f"{name}: not a valid path") from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidArgument(f"{name}: not a regular file")
        if check_status is not None:
            check_status(os.fstat(fd), name)
        with os.fdopen(fd, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise InvalidArgument(f"{name}: cannot be read: {_reason(error)}") from error
    finally:
        os.close(fd)
    if len(data) > limit:
        raise InvalidArgument(f"{name}: larger than {limit} bytes")
    return data


def parse(data: bytes, *, what: str) -> dict[str, Any]:
    """Parse strict JSON (RFC 8259, UTF-8, its top an object) and return the object.

    ``what`` names the document in errors. Refused, with InvalidArgument: more than MAX_BYTES, anything that is not
    UTF-8, duplicate keys, NaN and infinities, numbers beyond 20 digits or a float's range, nesting beyond MAX_DEPTH,
    and strings that hold NUL or a lone surrogate, which no path, argument or variable can carry.
    """
    if len(data) > MAX_BYTES:
        raise InvalidArgument(f"{what}: larger than {MAX_BYTES} bytes")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{what}: not UTF-8 at byte {error.start}") from error
    try:
        document: object = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_constant,
        )
        if not isinstance(document, dict):
            raise _Refused("expected an object at the top")
    except json.JSONDecodeError as error:
        message = error.msg[:1].lower() + error.msg[1:]
        raise InvalidArgument(f"{what}: line {error.lineno}, column {error.colno}: {message}") from error
    except _Refused as error:
        raise InvalidArgument(f"{what}: {error}") from error
    except RecursionError as error:
        raise InvalidArgument(f"{what}: nested deeper than {MAX_DEPTH} levels") from error
    check(document, what=what)
    return document


def check(document: object, *, what: str) -> None:
    """Refuse, with InvalidArgument, what no JSON document of ours may hold: depth, NUL, text that is not Unicode.

    For a document that was put together from other input than JSON, such as arguments of a command line.
    """
    try:
        _check(document, "", 1)
    except _Refused as error:
        raise InvalidArgument(f"{what}: {error}") from error


def dump(document: object) -> bytes:
    """Return ``document`` as compact UTF-8 JSON; key order is kept. Raises InvalidArgument for text beyond Unicode."""
    text = json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # an argument or a path of the caller that is not UTF-8
        around = text[max(0, error.start - _SHOWN // 2) : error.end]
        raise InvalidArgument(f"not UTF-8: {shown(around)}") from error


def printable(path: str) -> str:
    """Return a path for an error message: as it is where it is plain, quoted and bounded where it is not."""
    return path if path.isprintable() and path.isascii() and len(path) <= _PATH_MAX else shown(path)


def member(path: str, key: str) -> str:
    """Return the JSON path of ``key`` under ``path``: ``linux.sysctl["kernel.x"]``."""
    if not (key.isidentifier() and key.isascii() and len(key) <= _SHOWN):
        return f"{path}[{shown(key)}]"
    return f"{path}.{key}" if path else key


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refused(f"duplicate key {shown(twice)}")
    return members


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise _Refused(f"number too large: {digits[:_MAX_DIGITS]}...")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise _Refused(f"number too large: {digits[:_MAX_DIGITS]}")
    return value


def _constant(name: str) -> NoReturn:
    raise _Refused(f"{name} is not a JSON number")


def _check(value: object, path: str, depth: int) -> None:
    """Refuse what the parser lets through: depth, and text that the system calls behind cannot carry."""
    if depth > MAX_DEPTH:
        raise _Refused(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, str):
        _check_text(value, path)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check(item, f"{path}[{index}]", depth + 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_text(key, path)
            _check(item, member(path, key), depth + 1)


def _check_text(text: str, path: str) -> None:
    if text.isascii() and "\0" not in text:
        return
    if "\0" in text:
        raise _Refused(f"{path or 'top'}: NUL in {shown(text)}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise _Refused(f"{path or 'top'}: lone surrogate in {shown(text)}")
