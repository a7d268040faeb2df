"""What every door does with a container, as a client of its shim: create, run, execute, delete, clean up.

Blocking, and light to import. The shim owns the pod; this module only asks, waits for it to end, and removes what a
shim that was killed has left.
"""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, NamedTuple, Self

from katapy import jsonfile
from katapy.client import attach, launch
from katapy.client.task import Stdio, TaskClient
from katapy.errors import Internal, InvalidArgument, InvalidState, KatapyError, NotFound, Unavailable, from_wire
from katapy.oci.bundle import Bundle
from katapy.oci.process import ProcessSpec, parse_process
from katapy.state import PROCESS_FILE, ProcessRef, State, StateDir, Status, current_status, now
from katapy.transport.ttrpc import TtrpcClient

ATTACH: Final = "attach:"
# A shim that was told to end has at most this many seconds; its guest flushes its files within ten.
_END_SECONDS: Final = 30.0
_LOG_TAIL: Final = 1000


class Launch(NamedTuple):
    """What a new shim must know.

    ``root`` of the state directories, an absolute configuration file, whether to log more, and whether the pod ends
    with this process (``foreground``).
    """

    root: Path
    config: Path | None
    debug: bool
    foreground: bool


class Pod:
    """A connection to the shim of a container; a context manager that closes it and nothing more."""

    def __init__(self, root: Path, container_id: str, client: TtrpcClient) -> None:
        self._root, self._id, self._client = root, container_id, client
        self.task = TaskClient(client)

    @classmethod
    def create(cls, options: Launch, container_id: str, bundle: Bundle) -> Pod:
        """Create a container in a VM of its own; its streams wait to be attached to. On failure nothing is left.

        Raises AlreadyExists for an id that is taken, and whatever the shim answers.
        """
        _make_state(options.root, container_id, bundle)
        try:
            client, pid = launch.start_shim(
                options.root,
                container_id,
                debug=options.debug,
                config=options.config,
                foreground=options.foreground,
            )
        except BaseException:
            finish(options.root, container_id)
            raise
        pod = cls(options.root, container_id, client)
        try:
            # Without a deadline of its own: the boot has one, in the configuration.
            pod.task.create(container_id, bundle.path, _stdio(terminal=bundle.spec.process.terminal), timeout=None)
        except BaseException as error:
            # By that the shim knows that it has to undo what it has done, and to end.
            client.close()
            words = _last_words(options.root, container_id) if _reap(pid) else ""
            finish(options.root, container_id)
            if words and isinstance(error, Unavailable):
                raise Unavailable(f"{error}: {words}") from error
            raise
        return pod

    @classmethod
    def connect(cls, root: Path, container_id: str) -> Pod:
        """Connect to the shim of a container. Raises NotFound, or Unavailable when its shim has died."""
        with StateDir.open(str(root), container_id) as directory:
            state = directory.load()
        if state.shim is not None and not state.shim.alive():
            raise Unavailable(f"the shim of {container_id} died: remove what is left with delete --force")
        return cls(root, container_id, launch.connect(root / state.sandbox))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def state(self) -> State:
        """Return what the state directory says."""
        with StateDir.open(str(self._root), self._id) as directory:
            return directory.load()

    def start(self) -> None:
        """Let the created container run."""
        self.task.start(self._id)

    def kill(self, number: int, *, everyone: bool) -> None:
        """Send a signal to the container's init, or to ``everyone`` in it."""
        self.task.kill(self._id, number, everyone=everyone)

    def run_foreground(self) -> int:
        """Start the container with this process's streams, and return its exit status when it has ended."""
        with attach.Signals() as signals:
            attachment = self._attach("")
            if attachment.terminal:
                self._size_terminal()
            self.start()
            return self._pump(attachment, signals)

    def discard(self) -> None:
        """Remove the container whatever it does, and wait until nothing is left of it."""
        with suppress(KatapyError):
            self.remove(force=True)
        self._client.close()
        finish(self._root, self._id)

    def stand_in(self, exec_id: str = "") -> int:
        """Start a process that holds this one's streams for a container's process; return its pid.

        A terminal stays the caller's to type on: who leaves a container behind would not share it with that.
        """
        stdin = os.open(os.devnull, os.O_RDONLY) if os.isatty(0) else os.dup(0)
        try:
            return launch.start_standin(self._root / self._id, self._id, exec_id, stdin, 1, 2).pid
        finally:
            os.close(stdin)

    def own_process(self) -> ProcessSpec:
        """Return the ``process`` that the container was created with."""
        with StateDir.open(str(self._root), self._id) as directory:
            data = jsonfile.read(PROCESS_FILE, dir_fd=directory.fd)
        return parse_process(data, what=f"process of {self._id}")

    def add_exec(self, exec_id: str, process: ProcessSpec) -> None:
        """Note a process to be started in the running container."""
        self.task.exec(self._id, exec_id, process.to_guest(), _stdio(terminal=process.terminal))

    def exec_detached(self, exec_id: str) -> int:
        """Start a process that was added, with this process's streams; return the pid of its stand-in."""
        self.task.start(self._id, exec_id)
        return self.stand_in(exec_id)

    def exec_foreground(self, exec_id: str) -> int:
        """Start a process that was added, with this process's streams; return its exit status."""
        try:
            with attach.Signals() as signals:
                self.task.start(self._id, exec_id)
                return self._pump(self._attach(exec_id), signals)
        finally:
            with suppress(KatapyError):
                self.task.delete(self._id, exec_id)

    def remove(self, *, force: bool) -> None:
        """Have the shim remove the container, killing it first with ``force``, and end if it was the last."""
        # Shorter than other calls: the caller kills a shim whose guest does not let it answer.
        task = TaskClient(self._client, timeout=_END_SECONDS)
        if force:
            with suppress(NotFound, Unavailable):
                task.kill(self._id, signal.SIGKILL, everyone=True)
                task.wait(self._id, timeout=_END_SECONDS)
        with suppress(NotFound):
            task.delete(self._id)
        task.shutdown(self._id)

    def _size_terminal(self) -> None:
        """Give the container's terminal the size of ours before its program looks at it."""
        with suppress(OSError):
            columns, rows = os.get_terminal_size(0)
            self.task.resize_pty(self._id, columns, rows)

    def _attach(self, exec_id: str) -> attach.Attachment:
        control = launch.connect_attach(self._root / self._id)
        try:
            return attach.attach(control, self._id, exec_id)
        except attach.AttachError as error:
            control.close()
            raise self._translated(error) from None

    def _pump(self, attachment: attach.Attachment, signals: attach.Signals) -> int:
        try:
            return attach.pump(attachment, 0, 1, 2, signals)
        except attach.AttachError as error:
            raise self._translated(error) from None

    def _translated(self, error: attach.AttachError) -> KatapyError:
        text = f"the shim of {self._id} died" if isinstance(error, attach.ShimDied) else str(error)
        return from_wire(error.code, error.kind, text)


def delete(root: Path, container_id: str, *, force: bool) -> None:
    """Remove a container and, with its last one, the pod.

    With ``force`` a running one is killed first, an unresponsive shim too, and a container that does not exist is no
    error, nor is one whose state cannot be read. Raises InvalidState for a running container without ``force``.
    """
    try:
        with StateDir.open(str(root), container_id) as directory:
            state = directory.load()
    except NotFound:
        if force:
            return
        raise
    except Internal:
        if not force:
            raise
        _remove_damaged(root, container_id)
        return
    status = current_status(state)
    if status not in (Status.STOPPED, Status.CREATED) and not force:
        raise InvalidState(f"cannot delete container {container_id} that is not stopped: {status}")
    if state.shim is not None and state.shim.name == "shim" and state.shim.alive():
        try:
            with Pod.connect(root, container_id) as pod:
                pod.remove(force=force)
        except KatapyError:
            if not force:
                raise
            _kill(state.shim)
    finish(root, container_id)


def finish(root: Path, container_id: str) -> None:
    """Wait for a shim that was told to end, and remove what it has left where it could not.

    Raises Unavailable where a process cannot be killed.
    """
    owner = None
    # A creator is followed by its shim, and that by nobody.
    for _ in range(3):
        with suppress(NotFound), StateDir.open(str(root), container_id) as directory:
            owner = directory.load().shim
            # A creator was not told to end, and cannot have what is deleted.
            patience = _END_SECONDS if owner is not None and owner.name == "shim" else 0.0
            if owner is not None and owner.pid != os.getpid() and not _gone(owner, patience):
                _kill(owner)
            with directory.lock():
                # As of now: a shim takes the container over under this lock, and may have started more before it died.
                state = directory.load()
                if state.shim is not None and state.shim.pid != os.getpid() and state.shim.alive():
                    continue
                for process in state.helpers:
                    _kill(process)
                directory.remove()
        return
    raise Unavailable(f"cannot remove {container_id}: process {owner.pid if owner else 0} cannot be killed")


def _remove_damaged(root: Path, container_id: str) -> None:
    """Remove a container whose state cannot be read: only its shim's socket tells whether there is one."""
    with suppress(Unavailable), launch.connect(root / container_id) as client:
        TaskClient(client, timeout=_END_SECONDS).shutdown(container_id, now=True)
        # Nothing more is said on it, but its end is the shim's.
        client.wait_closed(_END_SECONDS)
    with suppress(NotFound), StateDir.open(str(root), container_id) as directory, directory.lock():
        directory.remove()


def write_pid_file(path: Path | None, pid: int) -> None:
    """Write ``pid`` to ``path``, so that a reader sees all of it or nothing. Raises InvalidArgument."""
    if path is None:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(str(pid))
        temporary.rename(path)
    except OSError as error:
        raise InvalidArgument(f"cannot write the pid file {path}: {error.strerror}") from error


def _stdio(*, terminal: bool) -> Stdio:
    return Stdio(stdin=ATTACH, stdout=ATTACH, stderr="" if terminal else ATTACH, terminal=terminal)


def _make_state(root: Path, container_id: str, bundle: Bundle) -> None:
    state = State(
        id=container_id,
        bundle=bundle.path,
        rootfs=bundle.rootfs,
        sandbox=container_id,
        status=Status.CREATING,
        created=now(),
        oci_version=bundle.spec.oci_version,
        owner=os.getuid(),
        annotations=bundle.spec.annotations,
        # Until the shim takes over: should we be killed before, the state shows that nobody is behind it.
        shim=ProcessRef.of("creator", os.getpid()),
    )
    StateDir.create(str(root), state).close()


def _gone(process: ProcessRef, seconds: float) -> bool:
    """Wait until a process has ended. Returns False when it has not after ``seconds``."""
    fd = process.open()
    if fd is None:
        return True
    try:
        return bool(select.select([fd], [], [], seconds)[0])
    finally:
        os.close(fd)


def _kill(process: ProcessRef) -> None:
    """Kill a process and wait for its end."""
    fd = process.open()
    if fd is None:
        return
    try:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        select.select([fd], [], [], _END_SECONDS)
    finally:
        os.close(fd)


def _reap(pid: int) -> int:
    """Wait until our own child, a shim that was told to end, has; kill it where it does not. Return its exit status."""
    with suppress(NotFound):
        shim = ProcessRef.of("shim", pid)
        if not _gone(shim, _END_SECONDS):
            _kill(shim)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _last_words(root: Path, container_id: str) -> str:
    """Return what a shim wrote last that died of something that it could not answer."""
    try:
        with (root / container_id / launch.LOG).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_TAIL))
            lines = file.read(_LOG_TAIL).decode(errors="replace").splitlines()
    except OSError:
        return ""
    return ascii(lines[-1])[1:-1] if lines else ""
