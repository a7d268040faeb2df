"""A cursor over a parsed JSON document that knows its path, so that every error names the field it is about.

The parsers of ``spec``, ``process`` and ``linux`` are tables of fields written with it. It checks type and range and
nothing else. As in Go, where the other runtimes live, ``null`` is the same as an absent member.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Any, Final, NoReturn, TypeVar

from katapy.errors import InvalidArgument
from katapy.jsonfile import member, shown

T = TypeVar("T")
D = TypeVar("D")
Parser = Callable[["Node"], T]

INT64_MIN: Final = -(1 << 63)
INT64_MAX: Final = (1 << 63) - 1
UINT64_MAX: Final = (1 << 64) - 1
# 2^32-1 is the kernel's "no user" and cannot be asked for.
ID_MAX: Final = (1 << 32) - 2
_PATH_MAX: Final = 4095


class Node:
    """One value of a document: ``value`` as the JSON parser gave it, ``path`` as an error shows it."""

    def __init__(self, value: Any, what: str, path: str = "") -> None:
        self.value = value
        self.what = what
        self.path = path

    def fail(self, problem: str, kind: type[Exception] = InvalidArgument) -> NoReturn:
        """Raise an error of ``kind`` about this value: ``config.json: process.args[1]: problem``."""
        raise kind(f"{self.what}: {self.path}: {problem}" if self.path else f"{self.what}: {problem}")

    def child(self, key: str) -> Node:
        """Return the member ``key`` of an object; its value is None where it is absent."""
        return Node(self.members().get(key), self.what, member(self.path, key))

    def members(self) -> dict[str, Any]:
        """Return the value as an object."""
        if not isinstance(self.value, dict):
            self.fail("expected an object")
        return self.value

    def items(self) -> list[Node]:
        """Return the elements of an array."""
        if not isinstance(self.value, list):
            self.fail("expected an array")
        return [Node(item, self.what, f"{self.path}[{index}]") for index, item in enumerate(self.value)]

    def need(self, key: str, parse: Parser[T]) -> T:
        """Parse a required member."""
        node = self.child(key)
        if node.value is None:
            node.fail("is missing")
        return parse(node)

    def get(self, key: str, parse: Parser[T], default: D) -> T | D:
        """Parse an optional member; ``default`` where it is absent."""
        node = self.child(key)
        return default if node.value is None else parse(node)

    def find(self, key: str, parse: Parser[T]) -> T | None:
        """Parse an optional member; None where it is absent."""
        return self.get(key, parse, None)

    def each(self, key: str, parse: Parser[T]) -> tuple[T, ...]:
        """Parse an optional array, element by element; empty where it is absent."""
        return self.get(key, array(parse), ())


def text(node: Node) -> str:
    """Parse a string."""
    if not isinstance(node.value, str):
        node.fail("expected a string")
    return node.value


def boolean(node: Node) -> bool:
    """Parse a boolean."""
    if not isinstance(node.value, bool):
        node.fail("expected true or false")
    return node.value


def integer(low: int, high: int, *, unset: int | None = None) -> Parser[int]:
    """Return a parser of integers from ``low`` to ``high``, and ``unset`` where a caller may spell absence so."""

    def parse(node: Node) -> int:
        value = node.value
        # bool is an int in Python and none in JSON.
        if not isinstance(value, int) or isinstance(value, bool):
            node.fail("expected an integer")
        if not low <= value <= high and value != unset:
            node.fail(f"{value} is not between {low} and {high}")
        return value

    return parse


int64: Final = integer(INT64_MIN, INT64_MAX)
uint16: Final = integer(0, (1 << 16) - 1)
uint32: Final = integer(0, (1 << 32) - 1)
uint64: Final = integer(0, UINT64_MAX)
identity: Final = integer(0, ID_MAX)


def array(parse: Parser[T], *, at_most: int | None = None) -> Parser[tuple[T, ...]]:
    """Return a parser of arrays whose elements ``parse`` takes."""

    def parse_all(node: Node) -> tuple[T, ...]:
        items = node.items()
        if at_most is not None and len(items) > at_most:
            node.fail(f"more than {at_most} elements")
        return tuple(parse(item) for item in items)

    return parse_all


def mapping(node: Node) -> dict[str, str]:
    """Parse an object whose members are all strings."""
    return {key: text(node.child(key)) for key in node.members()}


def one_of(choices: Collection[str]) -> Parser[str]:
    """Return a parser of strings out of a fixed set."""

    def parse(node: Node) -> str:
        value = text(node)
        if value not in choices:
            node.fail(f"{shown(value)} is none of {', '.join(sorted(filter(None, choices)))}")
        return value

    return parse


def matching(pattern: str, description: str) -> Parser[str]:
    """Return a parser of strings that match a whole regular expression; ``description`` says what they are."""
    compiled = re.compile(pattern, re.ASCII)

    def parse(node: Node) -> str:
        value = text(node)
        if not compiled.fullmatch(value):
            node.fail(f"{shown(value)} is not {description}")
        return value

    return parse


def absolute_path(node: Node) -> str:
    """Parse an absolute path without ``..``."""
    path = text(node)
    if not path.startswith("/"):
        node.fail(f"{shown(path)} is not an absolute path")
    return no_escape(node)


def no_escape(node: Node) -> str:
    """Parse a path without ``..`` that the kernel takes."""
    path = text(node)
    if ".." in path.split("/"):
        node.fail(f"{shown(path)} contains '..'")
    if not 0 < len(path.encode()) <= _PATH_MAX:
        node.fail("is empty" if not path else f"longer than {_PATH_MAX} bytes")
    return path


def required_text(node: Node) -> str:
    """Parse a string that is not empty."""
    value = text(node)
    if not value:
        node.fail("is empty")
    return value
