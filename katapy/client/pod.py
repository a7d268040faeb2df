"""What every door does with a container, as a client of its shim: create, run, execute, delete, clean up.

Blocking, and light to import. The shim owns the pod; this module only asks, waits for it to end, and removes what a
shim that was killed has left.
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
from typing import BinaryIO, Final, NamedTuple, Self

from katapy import jsonfile, linux
from katapy.client import attach, launch
from katapy.client.task import Stdio, TaskClient
from katapy.client.view import view_of
from katapy.errors import Internal, InvalidArgument, InvalidState, KatapyError, NotFound, Unavailable, from_wire
from katapy.oci.bundle import Bundle
from katapy.oci.process import ProcessSpec, parse_process
from katapy.oci.spec import Spec
from katapy.state import PROCESS_FILE, ProcessRef, State, StateDir, Status, current_status, now
from katapy.transport.ttrpc import TtrpcClient

ATTACH: Final = "attach:"
Streams = tuple[int, int, int]
_NSENTER: Final = "/usr/bin/nsenter"
_UNSHARE: Final = "/usr/bin/unshare"
# A shim that was told to end has at most this many seconds; its guest flushes its files within ten.
_END_SECONDS: Final = 30.0
_LEAVING_SECONDS: Final = 5.0
# What a killed shim has started is killed with it, and its stand-ins write out what they have.
_LEFT_SECONDS: Final = 2.0
# An engine that has lost a shim gives five seconds to all that is to be done about it.
_ABANDONED_SECONDS: Final = 1.0
_LOG_TAIL: Final = 1000
_LOG_MAX: Final = 65536
# As log.py writes it.
_WARNING: Final = re.compile(rb' level=warning msg=("(?:[^"\\]|\\.)*")')


class Launch(NamedTuple):
    """What a new shim must know.

    ``root`` of the state directories, an absolute configuration file, whether to log more, whether the pod ends with
    this process (``foreground``), and whether systemd makes cgroups.
    """

    root: Path
    config: Path | None
    debug: bool
    foreground: bool
    systemd_cgroup: bool


class Pod:
    """A connection to the shim of a container; a context manager that closes it and nothing more."""

    def __init__(self, root: Path, container_id: str, client: TtrpcClient, *, shim: int = 0) -> None:
        """``shim`` is the pid of a shim that is this process's own child."""
        self._root, self._id, self._client, self._shim = root, container_id, client, shim
        self.task = TaskClient(client)

    @classmethod
    def begin(cls, options: Launch, container_id: str, bundle: Bundle) -> Pod:
        """Make the state of a new container and start a shim for it; ``create`` follows, or ``discard``.

        A container of a pod goes to the shim of that. Raises AlreadyExists for an id that is taken, NotFound or
        Unavailable for a pod that does not exist or run. On failure nothing is left.
        """
        if bundle.spec.sandbox:
            cls.connect(options.root, bundle.spec.sandbox).close()
        _make_state(options.root, container_id, bundle)
        if bundle.spec.sandbox:
            try:
                return cls(options.root, container_id, launch.connect(options.root / bundle.spec.sandbox))
            except BaseException:
                finish(options.root, container_id)
                raise
        try:
            client, pid = launch.start_shim(
                options.root,
                container_id,
                debug=options.debug,
                config=options.config,
                foreground=options.foreground,
                systemd_cgroup=options.systemd_cgroup,
            )
        except BaseException:
            finish(options.root, container_id)
            raise
        return cls(options.root, container_id, client, shim=pid)

    @property
    def _directory(self) -> Path:
        """The directory of the pod, where its shim's sockets are."""
        return self._root / self.state().sandbox

    def create(self, bundle: Bundle) -> None:
        """Create the container; the first one of a pod boots its VM. Raises whatever the shim answers."""
        try:
            # Without a deadline of its own: the boot has one, in the configuration.
            self.task.create(self._id, bundle.path, _stdio(terminal=bundle.spec.process.terminal), timeout=None)
        except Unavailable as error:
            # By that the shim knows that it has to undo what it has done, and to end.
            self._client.close()
            words = _last_words(self._root, self._id) if self._shim and self._reap() else ""
            raise (Unavailable(f"{error}: {words}") if words else error) from error

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
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    @property
    def client(self) -> TtrpcClient:
        """The connection, for what is asked beside ``task``."""
        return self._client

    def state(self) -> State:
        """Return what the state directory says."""
        with StateDir.open(str(self._root), self._id) as directory:
            return directory.load()

    def start(self) -> None:
        """Let the created container run."""
        # Hooks have deadlines of their own.
        TaskClient(self._client, timeout=None).start(self._id)

    def kill(self, number: int, *, everyone: bool) -> None:
        """Send a signal to the container's init, or to ``everyone`` in it."""
        self.task.kill(self._id, number, everyone=everyone)

    def come_for_streams(self, exec_id: str = "") -> attach.Control:
        """Have this process stand for a process of the container that is created or started next."""
        control = launch.connect_attach(self._directory)
        attach.announce(control, self._id, exec_id)
        return control

    def run_foreground(self, control: attach.Control) -> int:
        """Start the container with this process's streams, and return its exit status when it has ended."""
        with attach.Signals() as signals:
            attachment = self._attach(control)
            if attachment.terminal:
                self._size_terminal()
            self.start()
            return self._pump(attachment, signals)

    def warnings(self) -> list[str]:
        """Return what a shim that is this process's own has warned of since its beginning."""
        if not self._shim:
            return []
        with _ShimLog(self._root, self._id, whence=os.SEEK_SET) as log:
            return log.warnings()

    def discard(self) -> list[str]:
        """Remove the container whatever it does, wait until nothing is left of it, and return what the shim warns of.

        A hook that failed when the container had gone is no error, and nobody could read of it later.
        """
        with _ShimLog(self._root, self._id) as log:
            with suppress(KatapyError):
                # A pod that is this process's own ends as a whole.
                if self._shim:
                    self.task.shutdown(self._id, now=True)
                else:
                    self.remove(force=True)
            self._client.close()
            if self._shim:
                self._reap()
            finish(self._root, self._id)
            return log.warnings()

    def stand_in(self, streams: Streams, exec_id: str = "", *, bundle: Bundle | None = None) -> launch.StandIn:
        """Start the process that stands for a process of the container that is created or started next.

        That of init is given the ``bundle``: whoever looks by its pid finds the container's network and files.
        """
        if bundle is None:
            return launch.start_standin(self._directory, self._id, exec_id, streams)
        prefix = network_command(bundle.spec)
        with view_of(bundle) as view:
            return launch.start_standin(self._directory, self._id, exec_id, streams, prefix=prefix, view=view)

    def own_process(self) -> ProcessSpec:
        """Return the ``process`` that the container was created with."""
        with StateDir.open(str(self._root), self._id) as directory:
            data = jsonfile.read(PROCESS_FILE, dir_fd=directory.fd)
        return parse_process(data, what=f"process of {self._id}")

    def wait_resumed(self) -> None:
        """Wait until the container is not paused."""
        from katapy.client.observe import ShimClient

        ShimClient(self._client).wait_resumed(self._id)

    def add_exec(self, exec_id: str, process: ProcessSpec) -> None:
        """Note a process to be started in the running container."""
        self.task.exec(self._id, exec_id, process.to_guest(), _stdio(terminal=process.terminal))

    def start_exec(self, exec_id: str) -> None:
        """Start a process that was added."""
        self.task.start(self._id, exec_id)

    def forget_exec(self, exec_id: str) -> None:
        """Remove a process that was added and could not be started."""
        with suppress(KatapyError):
            self.task.kill(self._id, signal.SIGKILL, exec_id)
        with suppress(KatapyError):
            self.task.delete(self._id, exec_id)

    def exec_foreground(self, exec_id: str) -> int:
        """Start a process that was added, with this process's streams; return its exit status."""
        try:
            with attach.Signals() as signals:
                control = self.come_for_streams(exec_id)
                try:
                    self.start_exec(exec_id)
                except BaseException:
                    control.close()
                    raise
                return self._pump(self._attach(control), signals)
        finally:
            with suppress(KatapyError):
                self.task.delete(self._id, exec_id)

    def remove(self, *, force: bool, timeout: float = _END_SECONDS) -> None:
        """Have the shim remove the container, killing it first with ``force``, and end if it was the last.

        With ``force`` a pod's sandbox takes the pod's other containers with it. Each call has ``timeout`` seconds,
        fewer than others have, because the caller kills a shim whose guest does not let it answer.
        """
        task = TaskClient(self._client, timeout=timeout)
        if force:
            with suppress(NotFound, Unavailable):
                task.kill(self._id, signal.SIGKILL, everyone=True)
                task.wait(self._id, timeout=timeout)
        whole = False
        try:
            task.delete(self._id)
        except NotFound:
            pass
        except InvalidState:
            if not force:
                raise
            whole = True
        task.shutdown(self._id, now=whole)

    def _size_terminal(self) -> None:
        """Give the container's terminal the size of ours before its program looks at it."""
        with suppress(OSError):
            columns, rows = os.get_terminal_size(0)
            self.task.resize_pty(self._id, columns, rows)

    def _attach(self, control: attach.Control) -> attach.Attachment:
        try:
            return attach.attach(control)
        except attach.AttachError as error:
            control.close()
            raise self._translated(error) from None

    def _reap(self) -> int:
        """Wait until our own child, a shim that was told to end, has; kill it where it does not. Return its status."""
        pid, self._shim = self._shim, 0
        with suppress(NotFound):
            shim = ProcessRef.of("shim", pid)
            if not _gone(shim, _END_SECONDS):
                _kill(shim)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def _pump(self, attachment: attach.Attachment, signals: attach.Signals) -> int:
        try:
            return attach.pump(attachment, 0, 1, 2, signals)
        except attach.AttachError as error:
            raise self._translated(error) from None

    def _translated(self, error: attach.AttachError) -> KatapyError:
        text = f"the shim of {self._id} died" if isinstance(error, attach.ShimDied) else str(error)
        return from_wire(error.code, error.kind, text)


def delete(root: Path, container_id: str, *, force: bool) -> list[str]:
    """Remove a container and, with its last one, the pod. Returns what the shim warns of.

    With ``force`` a running one is killed first, an unresponsive shim too, and a container that does not exist is no
    error, nor is one whose state cannot be read. Raises InvalidState for a running container without ``force``.
    """
    try:
        with StateDir.open(str(root), container_id) as directory:
            state = directory.load()
    except NotFound:
        if force:
            return []
        raise
    except Internal:
        if not force:
            raise
        _remove_damaged(root, container_id)
        return []
    status = current_status(state)
    if status not in (Status.STOPPED, Status.CREATED) and not force:
        raise InvalidState(f"cannot delete container {container_id} that is not stopped: {status}")
    with _ShimLog(root, state.sandbox) as log:
        if state.shim is not None and state.shim.name == "shim" and state.shim.alive():
            try:
                with Pod.connect(root, container_id) as pod:
                    pod.remove(force=force)
            except KatapyError as error:
                if not force:
                    raise
                # One that has hung up may be in the middle of its own end, and would leave half of it undone.
                if not (isinstance(error, Unavailable) and _gone(state.shim, _LEAVING_SECONDS)):
                    _kill(state.shim)
        finish(root, container_id)
        return log.warnings()


def abandon(root: Path, container_id: str, *, patience: float) -> State:
    """Remove a container that its engine has done with, however that went, and return what was known of it.

    Its shim may have been killed, or not answer, or be about to end, for which it has ``patience`` seconds. One that
    serves a pod's other containers lives on. Raises NotFound where nothing is left; what cannot be ended quickly makes
    it fail, and the state stays for who tries again.
    """
    with StateDir.open(str(root), container_id) as directory:
        state = directory.load()
    shim = state.shim
    if shim is not None and shim.name == "shim" and shim.alive():
        if state.sandbox != container_id:
            with suppress(KatapyError), Pod.connect(root, container_id) as pod:
                pod.remove(force=True, timeout=patience)
        elif not _gone(shim, patience):
            _kill(shim, _ABANDONED_SECONDS)
    finish(root, container_id, own_network=False, patience=_ABANDONED_SECONDS)
    return state


class _ShimLog:
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


def finish(root: Path, container_id: str, *, own_network: bool = True, patience: float = _END_SECONDS) -> None:
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
            if state.sandbox != container_id and owner is not None and owner.name == "shim" and owner.alive():
                return  # it has other containers to serve, and has removed or will remove this one
            # A creator was not told to end, and cannot have what is deleted.
            told = owner is not None and owner.name == "shim"
            if owner is not None and owner.pid != os.getpid() and not _gone(owner, patience if told else 0.0):
                _kill(owner, patience)
            with directory.lock():
                # As of now: a shim takes the container over under this lock, and may have started more before it died.
                state = directory.load()
                if state.shim is not None and state.shim.pid != os.getpid() and state.shim.alive():
                    continue
                for process in state.helpers:
                    _kill(process, patience)
                _remove_cgroup(state, min(patience, _LEFT_SECONDS))
                with nullcontext() if own_network else suppress(KatapyError):
                    _leave_network(state)
                directory.remove()
        return
    raise Unavailable(f"cannot remove {container_id}: process {owner.pid if owner else 0} cannot be killed")


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


def _remove_damaged(root: Path, container_id: str) -> None:
    """Remove a container whose state cannot be read: only its shim's socket tells whether there is one."""
    with suppress(Unavailable), launch.connect(root / container_id) as client:
        TaskClient(client, timeout=_END_SECONDS).shutdown(container_id, now=True)
        # Nothing more is said on it, but its end is the shim's.
        client.wait_closed(_END_SECONDS)
    with suppress(NotFound), StateDir.open(str(root), container_id) as directory, directory.lock():
        directory.remove()


def network_command(spec: Spec) -> list[str]:
    """Return the command that executes another in the network namespace that ``spec`` asks for; empty for none.

    What stands for the container on the host has to be in it: hooks and network plugins look there.
    """
    namespace = spec.linux.namespace("network")
    if namespace is None:
        return []
    if namespace.path:
        os.close(_open_network(namespace.path))
    return [_NSENTER, f"--net={namespace.path}", "--"] if namespace.path else [_UNSHARE, "--net", "--"]


def enter_network(spec: Spec) -> None:
    """Move this process into the network namespace that ``spec`` asks for; what it has started stays where it is."""
    namespace = spec.linux.namespace("network")
    if namespace is not None and namespace.path:
        fd = _open_network(namespace.path)
        try:
            linux.setns(fd, linux.CLONE_NEWNET)
        except OSError as error:
            raise InvalidArgument(f"cannot join {namespace.path}: {error.strerror}: not a network namespace") from error
        finally:
            os.close(fd)
    elif namespace is not None:
        linux.unshare(linux.CLONE_NEWNET)


def _open_network(path: str) -> int:
    """Return a descriptor of the network namespace at ``path``. Raises NotFound, InvalidArgument."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise NotFound(f"cannot open the network namespace {path}: {error.strerror}") from error
    # Where namespaces are: what is bound elsewhere is a file of the same file system.
    if os.fstat(fd).st_dev != os.stat("/proc/self/ns/net").st_dev:
        os.close(fd)
        raise InvalidArgument(f"cannot join {path}: not a network namespace")
    return fd


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
        sandbox=bundle.spec.sandbox or container_id,
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


def _kill(process: ProcessRef, seconds: float = _END_SECONDS) -> None:
    """Kill a process and wait for its end."""
    fd = process.open()
    if fd is None:
        return
    try:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
        select.select([fd], [], [], seconds)
    finally:
        os.close(fd)


def _last_words(root: Path, container_id: str) -> str:
    """Return what a shim wrote last that died of something that it could not answer."""
    try:
        with (root / container_id / launch.LOG).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_TAIL))
            lines = file.read(_LOG_TAIL).decode(errors="replace").splitlines()
    except OSError:
        return ""
    return ascii(lines[-1])[1:-1] if lines else ""
