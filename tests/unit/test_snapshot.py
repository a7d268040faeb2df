"""The memory of a VM on its way to a file and back: all of it comes back, and zeros are not kept."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katapy.errors import Unavailable
from katapy.hypervisor.snapshot import Snapshot, load_ram, make_ram, save_ram

PAGE = 4096
SIZE = 4 << 20


@pytest.fixture
def ram() -> Iterator[int]:
    fd = make_ram(SIZE)
    yield fd
    os.close(fd)


def round_trip(source: int, directory: Path) -> int:
    """Return a new memory that was saved from ``source`` and loaded."""
    path = directory / "ram"
    path.unlink(missing_ok=True)
    copy = make_ram(os.fstat(source).st_size)
    load_ram(copy, Snapshot(path, save_ram(source, path), directory / "state"))
    return copy


@given(st.lists(st.tuples(st.integers(0, SIZE - 1), st.binary(min_size=1, max_size=9000)), max_size=8))
def test_what_was_written_comes_back(tmp_path_factory: pytest.TempPathFactory, writes: list[tuple[int, bytes]]) -> None:
    source = make_ram(SIZE)
    for offset, data in writes:
        os.pwrite(source, data[: SIZE - offset], offset)
    copy = round_trip(source, tmp_path_factory.mktemp("ram"))
    assert os.pread(copy, SIZE, 0) == os.pread(source, SIZE, 0)
    os.close(source)
    os.close(copy)


def test_zeros_are_not_kept(ram: int, tmp_path: Path) -> None:
    """Most of a guest's memory was in use while it booted, and holds zeros since: it is not worth a copy."""
    os.pwrite(ram, bytes(SIZE), 0)
    os.pwrite(ram, b"x", 100 * PAGE + 1)
    os.pwrite(ram, b"y" * PAGE, 900 * PAGE)
    assert save_ram(ram, tmp_path / "ram") == ((100 * PAGE, PAGE), (900 * PAGE, PAGE))
    assert (tmp_path / "ram").stat().st_size == 2 * PAGE


def test_a_copy_takes_no_memory_for_zeros(ram: int, tmp_path: Path) -> None:
    os.pwrite(ram, bytes(SIZE), 0)
    os.pwrite(ram, b"x", 0)
    copy = round_trip(ram, tmp_path)
    assert os.fstat(copy).st_blocks * 512 == PAGE
    os.close(copy)


def test_nobody_can_change_the_size(ram: int) -> None:
    """QEMU has it too: what a helper of it maps must not be taken from under it."""
    for size in (0, SIZE // 2, SIZE * 2):
        with pytest.raises(PermissionError):
            os.ftruncate(ram, size)


def test_a_file_that_is_too_short_is_refused(ram: int, tmp_path: Path) -> None:
    os.pwrite(ram, b"x" * PAGE * 3, 0)
    path = tmp_path / "ram"
    runs = save_ram(ram, path)
    os.truncate(path, PAGE)
    with pytest.raises(Unavailable, match=r"cannot read the template's memory .*: the file is too short"):
        load_ram(ram, Snapshot(path, runs, path))


def test_a_disk_that_takes_a_part(ram: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is short of a write is written by the next: the template passed every check, and was wrong."""
    data = os.urandom(PAGE * 3)
    os.pwrite(ram, data, 0)

    class Nearly(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(data[: len(data) // 2 + 1])

    with monkeypatch.context() as full:
        full.setattr(Path, "open", lambda path, mode, buffering: Nearly(path, mode))
        save_ram(ram, tmp_path / "ram")
    assert (tmp_path / "ram").read_bytes() == data


def test_a_missing_file_is_named(ram: int, tmp_path: Path) -> None:
    missing = tmp_path / "ram"
    with pytest.raises(Unavailable, match="No such file"):
        load_ram(ram, Snapshot(missing, ((0, PAGE),), missing))


def test_a_file_is_never_overwritten(ram: int, tmp_path: Path) -> None:
    (tmp_path / "ram").write_bytes(b"another's")
    with pytest.raises(Unavailable):
        save_ram(ram, tmp_path / "ram")
