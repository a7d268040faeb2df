"""The guest's console: bounded, always drained, and harmless to read."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from katapy.console import KEPT_BYTES, LOG_BYTES, Console


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, guest = socket.socketpair()
    with ours, guest:
        yield ours, guest


async def test_tail_is_the_last_lines(ends: tuple[socket.socket, socket.socket]) -> None:
    console = Console(ends[0])
    assert console.tail(3) == ""
    ends[1].sendall(b"one\r\ntwo\r\nthree\r\nfour\r\n")
    assert console.tail(2) == "three\nfour"
    ends[1].sendall(b"no newline")
    assert console.tail(2) == "four\nno newline"
    console.close()


async def test_control_sequences_are_shown_not_sent(ends: tuple[socket.socket, socket.socket]) -> None:
    console = Console(ends[0])
    ends[1].sendall(b"\x1b[2J\x07 a\rb \xff\xc2\x9b \xe2\x80\xae\x00")
    assert console.tail(1) == r"\x1b[2J\x07 a\rb \xff\x9b \u202e\x00"
    console.close()


async def test_one_endless_line_is_cut(ends: tuple[socket.socket, socket.socket]) -> None:
    console = Console(ends[0])
    ends[1].sendall(b"x" * 60_000)
    assert console.tail(1) == "x" * 512 + "..."
    console.close()


async def test_a_flood_is_drained_and_bounded(ends: tuple[socket.socket, socket.socket], tmp_path: Path) -> None:
    """A guest that prints for ever must never block, nor fill the host's memory or /run."""
    log = tmp_path / "console.log"
    console = Console(ends[0], log)
    ends[1].setblocking(False)
    sizes = set()
    for number in range(150):
        await asyncio.get_running_loop().sock_sendall(ends[1], (b"%07d " % number) * 4096)
        sizes.add(log.stat().st_size)
    assert console.tail(1).endswith("...")
    assert len(console._kept) == KEPT_BYTES
    assert console._kept.endswith(b"0000149 ")
    assert max(sizes) <= LOG_BYTES
    assert log.read_bytes().endswith(b"0000149 ")
    console.close()


async def test_the_log_is_private_and_fresh(ends: tuple[socket.socket, socket.socket], tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    console = Console(ends[0], log)
    ends[1].sendall(b"hello\n")
    console.close()
    assert log.read_bytes() == b"hello\n"
    assert log.stat().st_mode & 0o777 == 0o600
    assert console.tail(1) == "hello"
    console.close()


async def test_a_log_that_is_a_link_is_refused(ends: tuple[socket.socket, socket.socket], tmp_path: Path) -> None:
    (tmp_path / "console.log").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic"):
        Console(ends[0], tmp_path / "console.log")


async def test_the_end_of_the_guest_ends_nothing_else(ends: tuple[socket.socket, socket.socket]) -> None:
    console = Console(ends[0])
    ends[1].sendall(b"last words\n")
    ends[1].close()
    await asyncio.sleep(0)
    assert console.tail(5) == "last words"
    console.close()
