"""The reaper: statuses reach whoever watches, in either order, and never a stranger."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
from katapy_agent import reaper as module
from katapy_agent.reaper import Reaper


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Play the kernel: (pid, wait status) pairs that waitpid is to return, and no process exists."""
    pending: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "waitpid", lambda _pid, _options: pending.pop(0) if pending else (0, 0))
    monkeypatch.setattr(module, "_exists", lambda _pid: False)
    return pending


@pytest.mark.parametrize(("wait_status", "code"), [(0, 0), (7 << 8, 7), (255 << 8, 255), (9, -9), (15, -15)])
def test_exit_status(ends: list[tuple[int, int]], wait_status: int, code: int) -> None:
    seen: list[int] = []
    reaper = Reaper()
    reaper.watch(5, seen.append)
    ends.append((5, wait_status))
    reaper.reap()
    assert seen == [code]


def test_end_before_watch_is_told_once(ends: list[tuple[int, int]]) -> None:
    first: list[int] = []
    second: list[int] = []
    reaper = Reaper()
    ends.append((5, 3 << 8))
    reaper.reap()
    reaper.watch(5, first.append)
    reaper.watch(5, second.append)
    assert (first, second) == ([3], [])


def test_status_of_an_earlier_owner_of_the_pid_is_not_told(
    ends: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    reaper = Reaper()
    ends.append((5, 3 << 8))
    reaper.reap()
    monkeypatch.setattr(module, "_exists", lambda _pid: True)
    reaper.watch(5, seen.append)
    assert seen == []
    ends.append((5, 4 << 8))
    reaper.reap()
    assert seen == [4]


def test_unclaimed_statuses_are_bounded(ends: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_UNCLAIMED_MAX", 2)
    seen: list[int] = []
    reaper = Reaper()
    ends.extend((pid, pid << 8) for pid in (11, 12, 13))
    reaper.reap()
    for pid in (11, 12, 13):
        reaper.watch(pid, seen.append)
    assert seen == [12, 13]


async def test_sigchld_reaps(ends: list[tuple[int, int]]) -> None:
    import asyncio

    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    reaper = Reaper()
    reaper.start()
    watch: Callable[[int], None] = ended.set_result
    reaper.watch(5, watch)
    ends.append((5, 0))
    os.kill(os.getpid(), signal.SIGCHLD)
    assert await asyncio.wait_for(ended, 30) == 0
    asyncio.get_running_loop().remove_signal_handler(signal.SIGCHLD)
