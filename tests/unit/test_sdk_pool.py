"""A pool of sandboxes where starts fail, and where another pool takes its place. The sandboxes are played."""

from __future__ import annotations

import socket
import threading
from contextlib import closing
from pathlib import Path
from typing import cast

import pytest

from katapy.sdk import pool
from katapy.sdk.pool import Pool, lease
from katapy.sdk.sandbox import Sandbox

_DEADLINE = 60.0


class Played:
    """A sandbox whose start fails so many times."""

    failures = 0
    shape = "played"
    alive = True
    id = "sandbox-played"

    def open(self) -> None:
        if Played.failures:
            Played.failures -= 1
            raise OSError(28, "No space left on device")

    def close(self) -> None:
        pass


def make() -> Sandbox:
    return cast(Sandbox, Played())


def test_a_disk_that_is_full_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that starts sandboxes ended, and the pool was never ready."""
    monkeypatch.setattr(pool, "_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(Played, "failures", 3)
    with Pool(make, 1, tmp_path / "sock") as filled:
        filled.await_ready(1)
        taken = lease(tmp_path / "sock", "played")
        assert taken is not None
        taken.close()


def test_a_client_that_cannot_be_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there are too many descriptors: nobody was accepted any more."""
    monkeypatch.setattr(pool, "_RETRY_SECONDS", 0.01)
    accept, refused = socket.socket.accept, threading.Event()

    def refuse_once(listening: socket.socket) -> tuple[socket.socket, object]:
        connection = accept(listening)
        if refused.is_set():
            return connection
        refused.set()
        connection[0].close()
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(socket.socket, "accept", refuse_once)
    with Pool(make, 1, tmp_path / "sock") as filled:
        filled.await_ready(1)
        assert lease(tmp_path / "sock", "played") is None
        taken = lease(tmp_path / "sock", "played")
        assert taken is not None
        taken.close()


def test_a_pool_that_ends_leaves_its_successor_its_place(tmp_path: Path) -> None:
    """It stops to listen first, and then waits for its clients; then it removed the socket of the one after it."""
    old = Pool(make, 1, tmp_path / "sock")
    old.await_ready(1)
    (tmp_path / "sock").unlink()
    with closing(Pool(make, 1, tmp_path / "sock")) as new:
        new.await_ready(1)
        old.close()
        taken = lease(tmp_path / "sock", "played")
        assert taken is not None
        taken.close()
    assert not (tmp_path / "sock").exists()
