"""The pump by itself: a drain ends although its source never does, and an order to stop is obeyed at any time."""

from __future__ import annotations

import os
import socket
import sys
import threading

import pytest
from katapy_agent.errors import Unavailable
from katapy_agent.pump import PIPE_SIZE, Pump


def read_all(connection: socket.socket) -> int:
    return sum(map(len, iter(lambda: connection.recv(1 << 20), b"")))


def test_drain_of_an_endless_source_ends_after_what_a_pipe_holds() -> None:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    ended = threading.Event()
    with ours:
        ours.settimeout(30)
        pump = Pump("endless", os.open("/dev/zero", os.O_RDONLY), theirs.detach(), ended.set)
        ours.recv(1)
        pump.drain()
        taken = read_all(ours)
    assert ended.wait(30)
    # What was on its way before the order comes on top of it: a chunk, and what the socket holds.
    assert PIPE_SIZE <= taken <= 3 * PIPE_SIZE


def test_stop_ends_a_pump_whose_sink_is_full_and_later_orders_do_nothing() -> None:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    ended = threading.Event()
    with ours:
        pump = Pump("stuck", os.open("/dev/zero", os.O_RDONLY), theirs.detach(), ended.set)
        pump.stop()
        pump.drain()
        assert ended.wait(30)
        pump.stop()
        ours.settimeout(30)
        read_all(ours)


def test_what_has_ended_is_small() -> None:
    """An exec is kept for as long as its container: a health check filled the VM's memory within hours."""
    ours, theirs = socket.socketpair()
    ended = threading.Event()
    with ours:
        pump = Pump("short", os.open(os.devnull, os.O_RDONLY), theirs.detach(), ended.set)
        assert ended.wait(30)
    assert sys.getsizeof(pump._buffer) < 1000


def test_no_room_for_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a container has started all processes that the VM takes: no descriptor is left."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    before = os.listdir("/proc/self/fd")
    ours, theirs = socket.socketpair()
    with ours, pytest.raises(Unavailable, match="cannot start a thread"):
        Pump("none", os.open(os.devnull, os.O_RDONLY), theirs.detach())
    assert os.listdir("/proc/self/fd") == before
