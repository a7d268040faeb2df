"""What a shim leaves that was told to end, or was killed: it is waited for, and what it could not remove is removed.

What it has said last is read here, too: its log goes with its directory.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

from katapy.client import launch
from katapy.errors import Internal, InvalidArgument, KatapyError, NotFound, Unavailable
from katapy.state import CALLER, ProcessRef, State, StateDir

# A shim that was told to end has at most this many seconds; its guest flushes its files within ten.
END_SECONDS: Final = 30.0
# What a killed shim has started is killed with it, and its stand-ins write out what they have.
_LEFT_SECONDS: Final = 2.0
_LOG_TAIL: Final = 1000
_LOG_MAX: Final = 65536
# As log.py writes it.
_WARNING: Final = re.compile(rb' level=warning msg=("(?:[^"\\]|\\.)*")')


def finish(root: Path, container_id: str, *, own_network: bool = True, patience: float = END_SECONDS) -> None:
    """Wait for a shim that was told to end, and remove what it has left where it could not.

    ``patience`` in seconds is for each process that is waited for. Without ``own_network`` somebody else takes the
    network namespace apart, and it is no error to come too late for it.
    Raises Unavailable or Timeout where a process cannot be killed.
    """
    owner = None
    # A creator is followed by its shim, and that by nobody.
    for _ in range(3):
        with suppress(NotFound), StateDir.open(str(root), container_id) as directory:
            state = directory.load()
            owner = state.shim
            member = state.sandbox != container_id
            if member and owner is not None and _serves_others(owner, root / state.sandbox, container_id, patience):
                return  # it has removed or will remove this one
            # A creator was not told to end, and cannot have what is deleted.
            told = owner is not None and owner.name == "shim"
            if owner is not None and _to_be_ended(owner) and not gone(owner, patience if told else 0.0):
                kill(owner, patience)
            with directory.lock():
                # As of now: a shim takes the container over under this lock, and may have started more before it died.
                state = directory.load()
                if state.shim is not None and _to_be_ended(state.shim) and not state.shim.ending():
                    continue
                for process in state.helpers:
                    kill(process, patience)
                _remove_cgroup(state, min(patience, _LEFT_SECONDS))
                with nullcontext() if own_network else suppress(KatapyError):
                    _leave_network(state)
                directory.remove()
        return
    raise Unavailable(f"cannot remove {container_id}: process {owner.pid if owner else 0} cannot be killed")


def _to_be_ended(owner: ProcessRef) -> bool:
    """Tell whether a container's owner ends with it: a program that uses the SDK does not, it only learns of it."""
    return owner.pid != os.getpid() and owner.name != CALLER


def _serves_others(owner: ProcessRef, directory: Path, container_id: str, patience: float) -> bool:
    """Tell whether a process is a shim that goes on, in the directory of its sandbox.

    One that was killed hangs up before it is dead, and may be connected to before that: what goes on is what answers,
    or stands still and keeps the connection. What ends is waited for, ``patience`` seconds.
    """
    if owner.name != "shim" or not owner.alive():
        return False
    from katapy.client.task import TaskClient

    try:
        with launch.connect(directory) as client:
            TaskClient(client, timeout=patience).connect(container_id)
    except Unavailable:
        # A busy host may take longer than that to take apart what was killed.
        return not gone(owner, patience) and not owner.ending()
    except KatapyError:
        return True
    return True


def _remove_cgroup(state: State, patience: float) -> None:
    """Remove the cgroup of a shim that was killed; its stand-in ends by itself, the children of a hook may not."""
    if state.cgroup is not None:
        from katapy.cgroups import directory

        try:
            directory.reap(directory.Record.parse(state.cgroup), patience=patience)
        except InvalidArgument as error:
            raise Internal(f"the state of {state.id} is damaged: {error}") from error


def _leave_network(state: State) -> None:
    """Remove from the pod's network namespace what a shim that was killed has left there."""
    if state.network and state.id == state.sandbox:
        import asyncio

        from katapy.network.pod import clean

        asyncio.run(clean(Path(state.network)))


def gone(process: ProcessRef, seconds: float) -> bool:
    """Wait until a process has ended. Returns False when it has not after ``seconds``."""
    fd = process.open()
    if fd is None:
        return True
    try:
        return _ended(fd, seconds)
    finally:
        os.close(fd)


def kill(process: ProcessRef, seconds: float = END_SECONDS) -> None:
    """Kill a process and wait for its end."""
    fd = process.open()
    if fd is None:
        return
    try:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        _ended(fd, seconds)
    finally:
        os.close(fd)


def _ended(pidfd: int, seconds: float) -> bool:
    # Not select(2): whoever uses the SDK may have more descriptors than that takes.
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(seconds * 1000))


class ShimLog:
    """What a shim logs from now on, or from its beginning: can be read when the name of its log is gone with it."""

    def __init__(self, root: Path, sandbox_id: str, *, whence: int = os.SEEK_END) -> None:
        try:
            self._file: BinaryIO | None = (root / sandbox_id / launch.LOG).open("rb")
            self._file.seek(0, whence)
        except OSError:
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def warnings(self) -> list[str]:
        """Return the texts of the warnings that came."""
        lines = self._file.read(_LOG_MAX).splitlines() if self._file is not None else []
        found = [_WARNING.search(line) for line in lines]
        return [json.loads(match[1]) for match in found if match]


def last_words(root: Path, container_id: str) -> str:
    """Return what a shim wrote last that died of something that it could not answer."""
    try:
        with (root / container_id / launch.LOG).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_TAIL))
            lines = file.read(_LOG_TAIL).decode(errors="replace").splitlines()
    except OSError:
        return ""
    return ascii(lines[-1])[1:-1] if lines else ""
