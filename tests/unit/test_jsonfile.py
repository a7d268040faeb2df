"""The JSON border: what is refused, in one line that names it, and that nothing gets through that cannot go on."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katapy.errors import InvalidArgument, NotFound
from katapy.jsonfile import MAX_BYTES, MAX_DEPTH, check, dump, parse, printable, read, shown


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "f: line 1, column 1: expecting value"),
        (b'{"a": 1', "f: line 1, column 8: expecting ',' delimiter"),
        (b'{\n  "a": 1,\nb}', "f: line 3, column 1: expecting property name enclosed in double quotes"),
        (b'{"a": "x\ny"}', "f: line 1, column 9: invalid control character at"),
        (b"{} {}", "f: line 1, column 4: extra data"),
        (b"[]", "f: expected an object at the top"),
        (b'"text"', "f: expected an object at the top"),
        (b'{"a": NaN}', "f: NaN is not a JSON number"),
        (b'{"a": -Infinity}', "f: -Infinity is not a JSON number"),
        (b'{"a": 1e400}', "f: number too large: 1e400"),
        (b'{"a": ' + b"9" * 5000 + b"}", "f: number too large: 99999999999999999999..."),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "f: duplicate key 'c'"),
        (b'{"a": 1, "\\u0061": 2}', "f: duplicate key 'a'"),
        (b'{"a": ["x\\u0000y"]}', "f: a[0]: NUL in 'x\\x00y'"),
        (b'{"a": {"\\ud800": 1}}', "f: a: lone surrogate in '\\ud800'"),
        (b'{"a b": "\\udfff"}', "f: ['a b']: lone surrogate in '\\udfff'"),
        (b'{"a": "\xff"}', "f: not UTF-8 at byte 7"),
        ('{"a": 1}'.encode("utf-16"), "f: not UTF-8 at byte 0"),
        ('{"a": 1}'.encode("utf-16-le"), "f: line 1, column 2: expecting property name enclosed in double quotes"),
        ('{"a": 1}'.encode("utf-8-sig"), "f: line 1, column 1: unexpected UTF-8 BOM (decode using utf-8-sig)"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "f: nested deeper than 64 levels"),
        (b'{"a": ' + b"[" * 200_000, "f: nested deeper than 64 levels"),
        (b" " * (MAX_BYTES + 1), f"f: larger than {MAX_BYTES} bytes"),
    ],
)
def test_refused(data: bytes, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse(data, what="f")
    assert str(caught.value) == message


def test_deepest_document() -> None:
    def nested(levels: int) -> bytes:
        return b'{"a":' * levels + b"1" + b"}" * levels

    assert parse(nested(MAX_DEPTH - 1), what="f")
    with pytest.raises(InvalidArgument, match="nested deeper"):
        parse(nested(MAX_DEPTH), what="f")


def outcome(data: bytes) -> dict[str, Any] | str:
    """The document, or the error's text."""
    try:
        return parse(data, what="f")
    except InvalidArgument as error:
        return str(error)


@given(st.binary(max_size=200) | st.text(alphabet='{}[]":,\\u0d8 1eE-+.\n', max_size=40).map(str.encode))
def test_any_bytes_give_an_object_or_one_line(data: bytes) -> None:
    found = outcome(data)
    assert isinstance(found, dict) or re.fullmatch(r"f: [ -~]+", found)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(st.dictionaries(st.text(), _VALUES, max_size=5))
def test_what_is_taken_is_what_was_written_and_can_be_written_again(document: dict[str, Any]) -> None:
    found = outcome(json.dumps(document).encode())
    if isinstance(found, str):
        assert "NUL" in found or "surrogate" in found
        return
    assert found == document
    assert parse(dump(found), what="f") == document


def test_check_of_arguments_that_are_not_utf8() -> None:
    with pytest.raises(InvalidArgument, match=r"^exec: args\[0\]: lone surrogate in '\\udcff'$"):
        check({"args": [os.fsdecode(b"\xff")]}, what="exec")


def test_read(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(b"{}")
    assert read(str(file)) == b"{}"
    assert read(str(file), limit=2) == b"{}"
    with pytest.raises(InvalidArgument, match=r"config\.json: larger than 1 bytes$"):
        read(str(file), limit=1)


def test_read_follows_links_only_without_a_directory(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"{}")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "loop").symlink_to("loop")
    assert read(str(tmp_path / "link")) == b"{}"
    with pytest.raises(InvalidArgument, match="loop: cannot be opened: too many levels of symbolic links"):
        read(str(tmp_path / "loop"))
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        assert read("real", dir_fd=directory) == b"{}"
        with pytest.raises(InvalidArgument, match="link: cannot be opened"):
            read("link", dir_fd=directory)
    finally:
        os.close(directory)


def test_read_refuses_what_is_no_file(tmp_path: Path) -> None:
    """A FIFO as config.json must not make katapy wait for a writer, nor /dev/zero fill its memory."""
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(InvalidArgument, match="not a regular file"):
            read(str(path))
    with pytest.raises(NotFound, match="gone: no such file"):
        read(str(tmp_path / "gone"))
    with pytest.raises(InvalidArgument, match="not a valid path"):
        read("a\0b")


def test_shown_is_one_bounded_line() -> None:
    assert shown("a\nb\u202e") == "'a\\nb\\u202e'"
    assert shown("x" * 5000) == f"'{'x' * 60}'... (5000 characters)"
    assert printable("/a b") == "/a b"
    assert printable("/a\nb") == "'/a\\nb'"
