"""What of a container is written to its state directory, so that others can read it without asking the shim.

The caller that makes a container makes the directory, but an engine that adds one to a pod leaves that to the shim;
from then on the shim is the only one that writes to it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from katapy import run
from katapy.cgroups.directory import Record as CgroupRecord
from katapy.errors import NotFound
from katapy.oci.bundle import Bundle
from katapy.state import PROCESS_FILE, ProcessRef, State, StateDir, Status


class Record:
    """The state file of one container."""

    def __init__(self, root: Path, container_id: str) -> None:
        """Take the container's state over from its creator. Raises NotFound where it was removed meanwhile."""
        self._directory = StateDir.open(str(root), container_id)
        # Under the lock, so that whoever removes the container sees either nobody behind it or this process.
        with self._directory.lock():
            self._state = self._directory.load()
            self.creator = self._state.shim
            self._update(shim=ProcessRef.of("shim", os.getpid()))

    @classmethod
    def begin(cls, root: Path, bundle: Bundle, container_id: str) -> Record:
        """Make the state of a container that nobody has made yet. Raises AlreadyExists for an id that is taken."""
        StateDir.create(str(root), bundle.new_state(container_id, ProcessRef.of("shim", os.getpid()))).close()
        return cls(root, container_id)

    def helpers(self, processes: Iterable[run.Process]) -> None:
        """Note the processes that the pod runs on, for whoever must clean up when the shim cannot."""
        refs = []
        for process in processes:
            with suppress(NotFound):  # it died at once; its owner says so
                refs.append(ProcessRef.of(process.name, process.pid))
        self._update(helpers=tuple(refs))

    def created(self, process: bytes, accelerator: str) -> None:
        """The container exists and waits for its start; ``process`` is what `exec` starts from."""
        self._directory.write(PROCESS_FILE, process)
        # Its VM may have died meanwhile.
        stopped = self._state.status is Status.STOPPED
        self._update(status=Status.STOPPED if stopped else Status.CREATED, accelerator=accelerator)

    def cgroup(self, record: CgroupRecord) -> None:
        """Note the cgroup on the host, for whoever must clean up when the shim cannot."""
        self._update(cgroup=record._asdict())

    def network(self, path: str) -> None:
        """Note the network namespace that the VM is connected to, for whoever must clean up when the shim cannot."""
        self._update(network=path)

    @property
    def state(self) -> State:
        """What the file says."""
        return self._state

    def announced(self, pid: int) -> None:
        """``pid`` stands in for the container on the host."""
        self._update(pid=pid)

    def running(self) -> None:
        """The container was started, or goes on."""
        if self._state.status is not Status.STOPPED:
            self._update(status=Status.RUNNING)

    def paused(self) -> None:
        """The container is frozen."""
        if self._state.status is not Status.STOPPED:
            self._update(status=Status.PAUSED)

    def stopped(self, exit_status: int) -> None:
        """The container has ended; the first report counts."""
        if self._state.status is not Status.STOPPED:
            self._update(status=Status.STOPPED, exit_status=exit_status)

    def remove(self) -> None:
        """Remove the directory and everything in it; does nothing where someone else has."""
        with suppress(NotFound), self._directory.lock():
            self._directory.remove()

    def _update(self, **changes: object) -> None:
        self._state = State._replace(self._state, **changes)  # type: ignore[arg-type]
        self._directory.save(self._state)
