"""What every door does with a container, as a client of its shim: create, run, execute, discard.

Blocking, and light to import. The shim owns the pod; this module only asks. What a shim leaves is removed by
``leftovers``, a container whatever its shim does by ``removal``.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from katapy import jsonfile, preload
from katapy.client import attach, launch
from katapy.client.leftovers import END_SECONDS, ShimLog, finish, gone, kill, last_words
from katapy.client.task import Stdio, TaskClient
from katapy.errors import InvalidArgument, InvalidState, KatapyError, NotFound, Unavailable, from_wire
from katapy.state import CALLER, CREATOR, PROCESS_FILE, ProcessRef, State, StateDir
from katapy.transport.ttrpc import TtrpcClient

if TYPE_CHECKING:
    from katapy.client.observe import Usage
    from katapy.oci.bundle import Bundle
    from katapy.oci.process import ProcessSpec

ATTACH: Final = "attach:"
Streams = tuple[int, int, int]


class Launch(NamedTuple):
    """What a new shim must know.

    ``root`` of the state directories, an absolute configuration file, whether to log more, whether the pod ends with
    this process (``foreground``), whether systemd makes cgroups, and whether this process is a program that has the SDK
    (``embedded``), which the end of a container is not to end.
    """

    root: Path
    config: Path | None
    debug: bool
    foreground: bool
    systemd_cgroup: bool
    embedded: bool = False


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
        # Until the shim takes over: should we be killed before, the state shows that nobody is behind it.
        state = bundle.new_state(container_id, ProcessRef.of(CALLER if options.embedded else CREATOR, os.getpid()))
        StateDir.create(str(options.root), state).close()
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

    def create(self, bundle: Bundle, *, streams: bool = True) -> None:
        """Create the container; the first one of a pod boots its VM. Without ``streams`` its own are /dev/null.

        Raises whatever the shim answers.
        """
        try:
            # Without a deadline of its own: the boot has one, in the configuration.
            stdio = _stdio(terminal=bundle.spec.process.terminal) if streams else Stdio()
            self.task.create(self._id, bundle.path, stdio, timeout=None)
        except Unavailable as error:
            # By that the shim knows that it has to undo what it has done, and to end.
            self._client.close()
            words = last_words(self._root, self._id) if self._shim and self._reap() != 0 else ""
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

    def come_for_streams(self, exec_id: str = "", *, stand: bool = True) -> attach.Control:
        """Have this process stand for a process of the container that is created or started next.

        Without ``stand`` it only wants the streams of it.
        """
        control = launch.connect_attach(self._directory)
        attach.announce(control, self._id, exec_id, stand=stand)
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
        with ShimLog(self._root, self._id, whence=os.SEEK_SET) as log:
            return log.warnings()

    def discard(self) -> list[str]:
        """Remove the container whatever it does, wait until nothing is left of it, and return what the shim warns of.

        A hook that failed when the container had gone is no error, and nobody could read of it later.
        """
        with ShimLog(self._root, self._id) as log:
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
        from katapy.client.namespace import network_command
        from katapy.client.view import view_of

        prefix = network_command(bundle.spec)
        with view_of(bundle) as view:
            return launch.start_standin(self._directory, self._id, exec_id, streams, prefix=prefix, view=view)

    def own_process(self) -> ProcessSpec:
        """Return the ``process`` that the container was created with."""
        from katapy.oci.process import parse_process

        with StateDir.open(str(self._root), self._id) as directory:
            data = jsonfile.read(PROCESS_FILE, dir_fd=directory.fd)
        return parse_process(data, what=f"process of {self._id}")

    def wait_resumed(self) -> None:
        """Wait until the container is not paused."""
        from katapy.client.observe import ShimClient

        ShimClient(self._client).wait_resumed(self._id)

    def usage(self, *, timeout: float) -> Usage:
        """Return what the container has used, as its guest says, within ``timeout`` seconds."""
        from katapy.client.observe import ShimClient

        return ShimClient(self._client).usage(self._id, timeout=timeout)

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

    def remove(self, *, force: bool, timeout: float = END_SECONDS) -> None:
        """Have the shim remove the container, killing it first with ``force``, and end if it was the last.

        With ``force`` a pod's sandbox takes the pod's other containers with it. Each call has ``timeout`` seconds,
        fewer than others have, because the caller kills a shim whose guest does not let it answer.
        Raises InvalidState for one that runs, without ``force``, and for one of a pod's that is being created.
        """
        task = TaskClient(self._client, timeout=timeout)
        if force:
            # One whose VM is about to end is not in a state to be killed, nor is one that is being created.
            with suppress(NotFound, Unavailable, InvalidState):
                task.kill(self._id, signal.SIGKILL, everyone=True)
                task.wait(self._id, timeout=timeout)
        whole = False
        try:
            task.delete(self._id)
        except NotFound:
            pass
        except InvalidState:
            if not force or self.state().sandbox != self._id:
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

    def _reap(self) -> int | None:
        """Wait until our own child, a shim that was told to end, has; kill it where it does not. Return its status."""
        pid, self._shim = self._shim, 0
        with suppress(NotFound):
            shim = ProcessRef.of("shim", pid)
            if not gone(shim, END_SECONDS):
                kill(shim)
        return preload.reap(pid)

    def _pump(self, attachment: attach.Attachment, signals: attach.Signals) -> int:
        try:
            return attach.pump(attachment, 0, 1, 2, signals)
        except attach.AttachError as error:
            raise self._translated(error) from None

    def _translated(self, error: attach.AttachError) -> KatapyError:
        text = f"the shim of {self._id} died" if isinstance(error, attach.ShimDied) else str(error)
        return from_wire(error.code, error.kind, text)


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
