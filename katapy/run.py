"""The only place that starts processes on the host.

A started process has a list of arguments, an explicit environment and explicit descriptors, a session of its own
and /dev/null as standard input. It is watched and signalled by pidfd, never by pid, and it dies with its owner:
the kernel kills it when the thread that started it ends (PR_SET_PDEATHSIG, set by setpriv(1)), and it does not begin
where that happened before. Start processes from the main thread only.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from katapy.errors import NotFound, Timeout, Unavailable

ENVIRONMENT: Final[Mapping[str, str]] = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
}
SETPRIV: Final = "/usr/bin/setpriv"
# Between fork and PR_SET_PDEATHSIG the end of the owner goes unnoticed: then somebody else is the parent by now. The
# first process of a PID namespace sees no parent, 0: only stand-ins are that, and their shim's socket tells them.
_UNLESS_ORPHAN: Final = ("/bin/sh", "-c", 'case $PPID in "$0" | 0) exec "$@" ;; esac')
# A process stuck in the kernel does not see even SIGKILL. It must not hold up the end of everything else.
_KILL_SECONDS: Final = 10.0


@dataclass(frozen=True)
class Identity:
    """Whom a process runs as: these ids and groups, no capability at all, and no way to gain one."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()

    def setpriv_options(self) -> list[str]:
        """Return what setpriv(1) is told."""
        groups = f"--groups={','.join(map(str, self.groups))}" if self.groups else "--clear-groups"
        ids = [f"--reuid={self.uid}", f"--regid={self.gid}", groups]
        return [*ids, "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]


@dataclass(eq=False)
class Process:
    """A child process that this process owns."""

    name: str
    pid: int
    _popen: subprocess.Popen[bytes] = field(repr=False)
    _pidfd: int = field(repr=False)

    def signal(self, number: int) -> None:
        """Send a signal; does nothing if the process has ended."""
        if self._popen.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def poll(self) -> int | None:
        """Return the exit status as ``wait`` does, None while the process runs."""
        return self._popen.poll()

    async def wait(self) -> int:
        """Wait for the end and return the exit status: 0 to 255, or -N where signal N ended it."""
        if self._popen.returncode is None:
            await readable(self._pidfd)
        status = self._popen.wait()
        self._close()
        return status

    def kill_children(self) -> None:
        """End the processes that the process itself has started, now, and has not waited for."""
        for pid in self._children():
            with contextlib.suppress(OSError):
                fd = os.pidfd_open(pid)
                try:
                    # Looked up again with the descriptor open: from here on the pid cannot be another process.
                    if pid in self._children():
                        signal.pidfd_send_signal(fd, signal.SIGKILL)
                finally:
                    os.close(fd)

    def _children(self) -> list[int]:
        if self._popen.returncode is None:
            with contextlib.suppress(OSError), open(f"/proc/{self.pid}/task/{self.pid}/children") as children:  # noqa: PTH123 - pathlib is slow to import
                return [int(pid) for pid in children.read().split()]
        return []

    async def stop(self, *, grace: float) -> int | None:
        """End the process: SIGTERM, after ``grace`` seconds SIGKILL, then reap.

        Returns the exit status, None where the process has not ended 10 s after SIGKILL.
        """
        import asyncio

        if grace > 0:
            self.signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace):
                    return await self.wait()
        self.signal(signal.SIGKILL)
        try:
            async with asyncio.timeout(_KILL_SECONDS):
                return await self.wait()
        except TimeoutError:
            self._give_up()
            return None

    def kill(self) -> None:
        """End the process at once and reap it, without an event loop; one that does not end in 10 s is left."""
        self.signal(signal.SIGKILL)
        if self._popen.returncode is None and not _ends_within(self._pidfd, _KILL_SECONDS):
            self._give_up()
            return
        self._popen.wait()
        self._close()

    def release(self) -> int:
        """Leave a daemon (``die_with_owner=False``) to itself and return its pid; this object is of no more use."""
        # Without a status, Popen would warn that nobody waits for it. The starter's own end gives it to init.
        self._popen.returncode = 0
        self._close()
        return self.pid

    def _give_up(self) -> None:
        import logging  # not above: the command line starts processes and logs nothing

        logging.getLogger(__name__).error("%s does not end: pid %d is stuck in the kernel", self.name, self.pid)

    def _close(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


async def readable(fd: int) -> None:
    """Wait until ``fd`` is readable. At most one waiter per descriptor."""
    import asyncio  # not above: the command line starts processes and has no event loop; it costs 50 ms

    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    # A descriptor of its own: several tasks may wait for the end of one process.
    own = os.dup(fd)
    loop.add_reader(own, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(own)
        os.close(own)


def _ends_within(pidfd: int, seconds: float) -> bool:
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    return bool(poller.poll(seconds * 1000))


def start(
    argv: Sequence[str],
    *,
    name: str,
    fds: Iterable[int] = (),
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    env: Mapping[str, str] = ENVIRONMENT,
    identity: Identity | None = None,
    die_with_owner: bool = True,
) -> Process:
    """Start a process and return it.

    ``argv`` starts with an absolute path; ``fds`` stay open in it under the same numbers; ``stdin``, ``stdout`` and
    ``stderr`` are descriptors, None is /dev/null. ``identity`` None is the caller's own; another needs root.
    ``die_with_owner=False`` is for a daemon that outlives its starter.
    Raises NotFound when the program does not exist, Unavailable when it cannot be started.
    """
    if not os.path.isabs(argv[0]):
        raise NotFound(f"cannot start {name}: {argv[0]!r} is not an absolute path")
    if not os.access(argv[0], os.X_OK):
        raise NotFound(f"cannot start {name}: {argv[0]} is missing or not executable")
    options = identity.setpriv_options() if identity is not None else []
    # setpriv sets the death signal last, which matters: the kernel clears it when the ids change.
    options += ["--pdeathsig", "KILL"] if die_with_owner else []
    prefix = [SETPRIV, *options, "--"] if options else []
    prefix += [*_UNLESS_ORPHAN, str(os.getpid())] if die_with_owner else []
    null = subprocess.DEVNULL
    try:
        popen = subprocess.Popen(
            [*prefix, *argv],
            stdin=null if stdin is None else stdin,
            stdout=null if stdout is None else stdout,
            stderr=null if stderr is None else stderr,
            pass_fds=tuple(fds),
            env=dict(env),
            cwd="/",
            start_new_session=True,
        )
    except OSError as error:
        raise Unavailable(f"cannot start {name}: {error.strerror}") from error
    try:
        return Process(name, popen.pid, popen, os.pidfd_open(popen.pid))
    except OSError as error:
        popen.kill()
        popen.wait()
        raise Unavailable(f"cannot watch {name}: {error.strerror}") from error


def output(argv: Sequence[str], *, timeout: float = 60.0) -> str:
    """Run a short helper program to its end and return its standard output as text.

    Raises NotFound when there is no such program, Timeout after ``timeout`` seconds, Unavailable when it fails.
    """
    try:
        done = subprocess.run(
            list(argv),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout,
            env=dict(ENVIRONMENT),
            cwd="/",
            check=False,
        )
    except FileNotFoundError as error:
        raise NotFound(f"cannot run {argv[0]}: no such program") from error
    except subprocess.TimeoutExpired as error:
        raise Timeout(f"{argv[0]} did not end within {timeout:g} s") from error
    if done.returncode != 0:
        tail = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
        raise Unavailable(f"{argv[0]} failed with status {done.returncode}: {tail[0]}")
    return done.stdout.decode(errors="replace")
