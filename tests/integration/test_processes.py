"""Processes that katapy starts: none is lost, and none that cannot be ended holds up the rest."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from own_children import children

from katapy import run
from katapy.config import VIRTIOFSD_PATHS
from katapy.errors import Unavailable
from katapy.storage.virtiofs import find_virtiofsd, start_virtiofsd

SLEEP = ["/usr/bin/sleep", "1000"]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = children()
    yield
    assert children() - before == set()


@pytest.fixture
def stuck(monkeypatch: pytest.MonkeyPatch) -> Iterator[run.Process]:
    """A process that takes no signal, as one does that waits for a dead disk inside the kernel."""
    process = run.start(SLEEP, name="the sleeper")
    with monkeypatch.context() as deaf:
        deaf.setattr(signal, "pidfd_send_signal", lambda _pidfd, _number: None)
        deaf.setattr(run, "_KILL_SECONDS", 0.05)
        yield process
    process.kill()


@pytest.mark.timeout(60)
async def test_stopping_what_is_stuck_in_the_kernel(stuck: run.Process, caplog: pytest.LogCaptureFixture) -> None:
    """One helper in uninterruptible sleep kept a pod's end waiting for ever."""
    assert await stuck.stop(grace=0.01) is None
    assert caplog.messages == [f"the sleeper does not end: pid {stuck.pid} is stuck in the kernel"]


@pytest.mark.timeout(60)
def test_killing_what_is_stuck_in_the_kernel(stuck: run.Process, caplog: pytest.LogCaptureFixture) -> None:
    """The wait after SIGKILL had no deadline."""
    stuck.kill()
    assert caplog.messages == [f"the sleeper does not end: pid {stuck.pid} is stuck in the kernel"]


async def test_stop_and_kill_reap() -> None:
    first, second = run.start(SLEEP, name="first"), run.start(SLEEP, name="second")
    assert await first.stop(grace=5) == -signal.SIGTERM
    assert await first.stop(grace=0) == -signal.SIGTERM
    second.kill()
    second.kill()
    assert second.poll() == -signal.SIGKILL


def test_a_process_that_cannot_be_watched_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pidfd_open failed (no descriptor left), the process ran on and nobody knew of it."""
    pids: list[int] = []

    def pidfd_open(pid: int) -> int:
        pids.append(pid)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "pidfd_open", pidfd_open)
    with pytest.raises(Unavailable, match=r"^cannot watch the sleeper: Too many open files$"):
        run.start(SLEEP, name="the sleeper")
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_an_owner_that_is_killed_before_the_kernel_knows_whom_to_kill(tmp_path: Path) -> None:
    """A QEMU lived on for ever whose shim was killed while it started it."""
    setpriv, began = tmp_path / "setpriv", tmp_path / "began"
    # Killed between fork and setpriv's prctl; this process is the orphan's parent then, or init.
    setpriv.write_text(f"""#!/bin/sh
        owner=$PPID
        kill -KILL $owner
        until grep -q '^State:.Z' /proc/$owner/status; do :; done
        exec {run.SETPRIV} "$@"
    """)
    setpriv.chmod(0o755)
    code = f"""if True:
        import signal
        from katapy import run
        run.SETPRIV = {str(setpriv)!r}
        run.start(["/usr/bin/touch", {str(began)!r}], name="the child", stderr=2)
        signal.pause()
    """
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as ending:
        # The child holds the pipe until its end.
        owner = subprocess.Popen([sys.executable, "-c", code], stderr=writing)
        os.close(writing)
        said = ending.read()
    assert owner.wait() == -signal.SIGKILL
    assert (said, began.exists()) == (b"", False)


@pytest.mark.root
async def test_a_daemon_whose_second_process_is_stopped(tmp_path: Path) -> None:
    """virtiofsd is two processes, and the one that serves outlived the other: it heeded no signal but SIGKILL."""
    program = find_virtiofsd(VIRTIOFSD_PATHS)
    async with start_virtiofsd(program, tmp_path, tmp_path, "katapy") as virtiofsd:
        listed = Path(f"/proc/{virtiofsd.process.pid}/task/{virtiofsd.process.pid}/children")
        while not (served := listed.read_text().split()):  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.01)
        fd = os.pidfd_open(int(served[0]))
        os.kill(int(served[0]), signal.SIGSTOP)
    try:
        assert select.select([fd], [], [], 10)[0]
    finally:
        os.close(fd)
