"""The files of a sandbox, on a directory that plays its root. Attacks on them are functional tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from katapy.errors import InvalidArgument, NotFound
from katapy.sdk import files as module
from katapy.sdk.files import Files


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    (tmp_path / "root").mkdir()
    (tmp_path / "outside").write_text("secret")
    fd = os.open(tmp_path / "root", os.O_RDONLY | os.O_DIRECTORY)
    yield Files(lambda: fd, (os.getuid(), os.getgid()))
    os.close(fd)


def test_reading_is_bounded(files: Files) -> None:
    files.write("/file", b"12345")
    assert files.read("/file", max_bytes=5) == b"12345"
    assert files.read("file") == b"12345"
    assert files.read_text(b"/file") == "12345"
    with pytest.raises(InvalidArgument, match="longer than 4 bytes"):
        files.read("/file", max_bytes=4)


def test_listing_is_bounded(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LIST_MAX", 2)
    for name in ("a", "b"):
        files.write(name, b"")
    assert [(each.name, each.kind, each.size, each.mode) for each in files.list()] == [
        ("a", "file", 0, 0o644),
        ("b", "file", 0, 0o644),
    ]
    files.write("c", b"")
    with pytest.raises(InvalidArgument, match="more than 2 names"):
        files.list()


@pytest.mark.parametrize("path", ["a\0b", "\ud800", "x" * 4096, b"a\0b"])
def test_what_is_no_path(files: Files, path: str | bytes) -> None:
    """Nothing is made of it."""
    for call in (files.read, files.list, files.exists, files.remove, files.make_directory):
        with pytest.raises(InvalidArgument, match="is no path"):
            call(path)
    with pytest.raises(InvalidArgument, match="is no path"):
        files.write(path, b"")
    with pytest.raises(InvalidArgument, match="is no path"):
        files.write(f"made/{path!s}" if isinstance(path, str) else b"made/" + path, b"")
    assert files.list() == []


@pytest.mark.parametrize("path", ["/../outside", "../outside", "/link", "/up/outside"])
def test_there_is_no_way_out(files: Files, tmp_path: Path, path: str) -> None:
    (tmp_path / "root/link").symlink_to(tmp_path / "outside")
    (tmp_path / "root/up").symlink_to("..")
    with pytest.raises(NotFound):
        files.read(path)
    files.write(path, b"own")
    assert files.read(path) == b"own"
    assert (tmp_path / "outside").read_text() == "secret"


def test_modes(files: Files, tmp_path: Path) -> None:
    """No set-user-id, whatever is asked for."""
    files.write("/program", b"", mode=0o6755)
    assert (tmp_path / "root/program").stat().st_mode & 0o7777 == 0o755
