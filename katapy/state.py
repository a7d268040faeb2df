"""What the host remembers of each container: one directory of mode 0700 each, with a state.json.

It owns ids, the state directory, state.json and the lock that keeps two verbs on one container apart. It starts,
signals and removes nothing else; what the sandbox keeps in the same directory is removed with it.

`katapy state`, `list` and `kill` live by this module, so it imports little: no dataclasses, no asyncio, no subprocess.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from enum import StrEnum
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from katapy import jsonfile
from katapy.errors import (
    AlreadyExists,
    Internal,
    InvalidArgument,
    InvalidState,
    KatapyError,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from katapy.jsonfile import printable, shown
from katapy.tree import empty_directory, mounts_below

DEFAULT_ROOT: Final = "/run/katapy"
PROCESS_FILE: Final = "process.json"  # beside state.json: the process that the container was created with
# containerd's bound. It keeps `<root>/<id>/shim.sock` within the 107 bytes of a socket's path for the usual roots.
ID_MAX_LENGTH: Final = 76

_VERSION: Final = 1
_FILE: Final = "state.json"
_ID: Final = re.compile(r"[A-Za-z0-9_+.-]+")
# What State.shim is before a shim takes the container over: a command, which ends with the container where it lives, or
# a program that uses the SDK, which does not.
CREATOR: Final = "creator"
CALLER: Final = "caller"
_UNFINISHED: Final = re.compile(r"~[0-9a-f]{16}")
_UNFINISHED_SECONDS: Final = 3600.0
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
_PF_EXITING: Final = 0x4
_SIGKILL: Final = 1 << 9 - 1
_PID_MAX: Final = 1 << 22  # the kernel's PID_MAX_LIMIT


class Status(StrEnum):
    """Where a container is in its life (runtime-spec, runtime.md, "State"; paused is runc's)."""

    CREATING = "creating"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"


class ProcessRef(NamedTuple):
    """A process of the host, told apart from a later one with the same pid by its start time.

    ``start_time`` is field 22 of /proc/PID/stat: clock ticks since the machine started.
    """

    name: str
    pid: int
    start_time: int

    @classmethod
    def of(cls, name: str, pid: int) -> ProcessRef:
        """Describe a running process. Raises NotFound when there is none."""
        found = _process_stat(pid)
        if found is None:
            raise NotFound(f"{name}: no process {pid}")
        return cls(name, pid, found.start_time)

    def alive(self) -> bool:
        """Whether this very process still runs; one that nobody has reaped yet does not."""
        found = _process_stat(self.pid)
        return found is not None and found.status not in "ZX" and found.start_time == self.start_time

    def ending(self) -> bool:
        """Whether it has ended, or was killed and does nothing any more while the kernel takes it apart."""
        found = _process_stat(self.pid)
        if found is None or found.status in "ZX" or found.start_time != self.start_time:
            return True
        return bool(found.flags & _PF_EXITING or found.pending & _SIGKILL)

    def open(self) -> int | None:
        """Return a pidfd of this very process, which the caller closes; None when it has ended."""
        try:
            fd = os.pidfd_open(self.pid)
        except OSError as error:
            # The last two where the number is now that of another process's thread: it depends on the kernel.
            if error.errno in (errno.ESRCH, errno.EINVAL, errno.ENOENT):
                return None
            raise
        # Checked after the descriptor is open: from here on the pid cannot become another process.
        if self.alive():
            return fd
        os.close(fd)
        return None


class State(NamedTuple):
    """What state.json holds. ``created`` is RFC 3339 in UTC, ``owner`` the uid that made the container.

    ``cgroup`` is what cgroups.directory.Record keeps of the one on the host.
    ``network`` is the path of the network namespace, where it has one, that the VM is connected to.
    ``accelerator`` is what executes the VM's instructions, "kvm" or "tcg" (emulation), once it is known.
    """

    id: str
    bundle: str
    rootfs: str
    sandbox: str
    status: Status
    created: str
    oci_version: str
    owner: int
    pid: int = 0
    annotations: dict[str, str] = {}  # noqa: RUF012 - never changed in place
    shim: ProcessRef | None = None
    helpers: tuple[ProcessRef, ...] = ()
    exit_status: int | None = None
    accelerator: str = ""
    cgroup: dict[str, Any] | None = None
    network: str = ""


def check_id(text: str) -> str:
    """Return ``text`` if it is the id of a container, sandbox or exec: runc's characters, at most 76 of them.

    Raises InvalidArgument.
    """
    if not text:
        raise InvalidArgument("container id is empty")
    if not _ID.fullmatch(text) or text in (".", ".."):
        raise InvalidArgument(f"container id {shown(text)}: only letters, digits, '_+.-'; not '.' or '..'")
    if len(text) > ID_MAX_LENGTH:
        raise InvalidArgument(f"container id {shown(text)}: longer than {ID_MAX_LENGTH} characters")
    return text


def now() -> str:
    """Return the time as RFC 3339 in UTC, with nanoseconds."""
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{nanoseconds:09}Z"


def current_status(state: State) -> Status:
    """Return the status as of now: a container whose shim has died is stopped, whatever its file says."""
    if state.shim is not None and not state.shim.alive():
        return Status.STOPPED
    return state.status


def state_json(state: State) -> dict[str, Any]:
    """Return the state as `state` prints it: runtime-spec's (runtime.md, "State"), with runc's additions."""
    status = current_status(state)
    return {
        "ociVersion": state.oci_version,
        "id": state.id,
        "pid": 0 if status is Status.STOPPED else state.pid,
        "status": status.value,
        "bundle": state.bundle,
        "rootfs": state.rootfs,
        "created": state.created,
        "annotations": state.annotations,
        **({"accelerator": state.accelerator} if state.accelerator else {}),
    }


class StateDir:
    """The state directory of one container, held open; a context manager that closes it.

    Readers need no lock: state.json is replaced as a whole. Whoever changes anything holds the lock.
    """

    def __init__(self, root: str, id: str, fd: int) -> None:  # noqa: A002 - the field's own word
        self.root = root
        self.id = id
        self.path = f"{root}/{id}"
        self.fd = fd

    @classmethod
    def create(cls, root: str, state: State) -> StateDir:
        """Make the directory of a new container, its state.json in it.

        It appears under its name as a whole, by one rename, which decides between simultaneous creates.
        Raises AlreadyExists where the id is taken, Unavailable where the directory cannot be made.
        """
        check_id(state.id)
        root = os.path.abspath(root)
        with (
            _open_root(root, create=True) as root_fd,
            _unavailable(f"cannot create the state of {state.id}"),
            ExitStack() as undo,
        ):
            _sweep(root_fd)
            # '~' is in no id: an unfinished directory is never taken for a container.
            temporary = f"~{os.urandom(8).hex()}"
            os.mkdir(temporary, 0o700, dir_fd=root_fd)
            undo.callback(os.rmdir, temporary, dir_fd=root_fd)
            fd = os.open(temporary, _DIRECTORY, dir_fd=root_fd)
            undo.callback(os.close, fd)
            undo.callback(empty_directory, fd)
            _write(fd, _FILE, _encoded(state))
            _publish(root_fd, temporary, state.id)
            undo.pop_all()
        return cls(root, state.id, fd)

    @classmethod
    def open(cls, root: str, id: str) -> StateDir:  # noqa: A002
        """Open the directory of a container. Raises NotFound where there is none."""
        check_id(id)
        root = os.path.abspath(root)
        try:
            with _open_root(root) as root_fd, _unavailable(f"cannot open the state of {id}"):
                return cls(root, id, os.open(id, _DIRECTORY, dir_fd=root_fd))
        except FileNotFoundError as error:
            raise _does_not_exist(id) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the directory, which gives up the lock; idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def load(self) -> State:
        """Read state.json and check it again. Raises NotFound, or Internal where it is damaged."""
        try:
            return _decode(jsonfile.read(_FILE, dir_fd=self.fd), self.id)
        except NotFound as error:
            raise _does_not_exist(self.id) from error
        except InvalidArgument as error:
            raise Internal(f"the state of {self.id} is damaged: {error}") from error

    def write(self, name: str, data: bytes) -> None:
        """Replace the file ``name`` of the directory, atomically and on disk. Raises Unavailable."""
        with _unavailable(f"cannot write {name} of {self.id}"):
            _write(self.fd, name, data)

    def save(self, state: State) -> None:
        """Replace state.json by ``state``, atomically and on disk. The caller holds the lock. Raises Unavailable."""
        if state.id != self.id:
            raise Internal(f"cannot save the state of {state.id} as that of {self.id}")
        with _unavailable(f"cannot save the state of {self.id}"):
            _write(self.fd, _FILE, _encoded(state))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other verbs off this container. Waits for them; the kernel frees the lock of a process that dies.

        Not reentrant in one StateDir. Raises NotFound where the container was removed meanwhile.
        """
        fcntl.flock(self.fd, fcntl.LOCK_EX)
        try:
            try:
                current = os.stat(self.path, follow_symlinks=False)
            except FileNotFoundError as error:
                raise _does_not_exist(self.id) from error
            if not os.path.samestat(current, os.fstat(self.fd)):
                raise _does_not_exist(self.id)
            yield
        finally:
            if self.fd >= 0:
                fcntl.flock(self.fd, fcntl.LOCK_UN)

    def remove(self) -> None:
        """Remove the directory and all that is in it, and close it. The caller holds the lock.

        Follows no symbolic link and enters no mount: where something is still mounted below, nothing is removed and
        InvalidState names it. state.json goes last, so that a removal that was cut short can be done again.
        """
        for mount in mounts_below(os.readlink(f"/proc/self/fd/{self.fd}")):
            raise InvalidState(f"cannot remove {self.id}: {printable(mount)} is still mounted")
        with _unavailable(f"cannot remove the state of {self.id}"), _open_root(self.root) as root_fd:
            empty_directory(self.fd, keep=_FILE)
            # Away from its name in one step: emptied in place, it could be replaced by a new container's.
            temporary = f"~{os.urandom(8).hex()}"
            os.rename(self.id, temporary, src_dir_fd=root_fd, dst_dir_fd=root_fd)
            with suppress(FileNotFoundError):
                os.unlink(_FILE, dir_fd=self.fd)
            os.rmdir(temporary, dir_fd=root_fd)
        self.close()


@contextmanager
def scratch(root: str) -> Iterator[str]:
    """Make a directory beside the containers', which goes when the context ends.

    What a killed process leaves of it is removed as an unfinished container is. Raises Unavailable.
    """
    root = os.path.abspath(root)
    name = f"~{os.urandom(8).hex()}"
    with _open_root(root, create=True) as root_fd:
        with _unavailable(f"cannot write to {printable(root)}"):
            _sweep(root_fd)
            os.mkdir(name, 0o700, dir_fd=root_fd)
            fd = os.open(name, _DIRECTORY, dir_fd=root_fd)
        try:
            yield f"{root}/{name}"
        finally:
            with suppress(OSError):
                empty_directory(fd)
                os.rmdir(name, dir_fd=root_fd)
            os.close(fd)


def list_states(root: str) -> tuple[list[State], list[KatapyError]]:
    """Return the states of all containers, oldest first, and an error for each that cannot be read."""
    states: list[State] = []
    errors: list[KatapyError] = []
    try:
        with _open_root(os.path.abspath(root)) as root_fd, _unavailable(f"cannot list {printable(root)}"):
            names = [name for name in os.listdir(root_fd) if _ID.fullmatch(name)]
    except FileNotFoundError:
        return [], []
    for name in names:
        try:
            with StateDir.open(root, name) as directory:
                states.append(directory.load())
        except NotFound:
            continue  # it went, or no container ever was there
        except KatapyError as error:
            errors.append(error)
    return sorted(states, key=lambda state: (state.created, state.id)), errors


def _does_not_exist(id: str) -> NotFound:  # noqa: A002
    return NotFound(f'container "{id}" does not exist')


@contextmanager
def _unavailable(what: str) -> Iterator[None]:
    """Turn the operating system's errors into Unavailable; a missing file stays what it is."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unavailable(f"{what}: {(error.strerror or str(error)).lower()}") from error


@contextmanager
def _open_root(root: str, *, create: bool = False) -> Iterator[int]:
    """Open the directory of all state directories; nobody but its owner may change it."""
    with _unavailable(f"cannot open {printable(root)}"):
        if create:
            os.makedirs(root, 0o700, exist_ok=True)
        # The root itself may be a link: it is the caller's choice, unlike what is in it.
        fd = os.open(root, _DIRECTORY & ~os.O_NOFOLLOW)
    try:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionDenied(f"{printable(root)}: must belong to uid {os.geteuid()} and be writable by it alone")
        yield fd
    finally:
        os.close(fd)


def _sweep(root_fd: int) -> None:
    """Remove what commands have left that were killed while they made or removed a container."""
    for name in os.listdir(root_fd):
        if not _UNFINISHED.fullmatch(name):
            continue
        with suppress(OSError):
            # Making and removing take moments.
            if time.time() - os.stat(name, dir_fd=root_fd, follow_symlinks=False).st_ctime < _UNFINISHED_SECONDS:
                continue
            fd = os.open(name, _DIRECTORY, dir_fd=root_fd)
            try:
                empty_directory(fd)
            finally:
                os.close(fd)
            os.rmdir(name, dir_fd=root_fd)


def _publish(root_fd: int, temporary: str, id: str) -> None:  # noqa: A002
    try:
        os.rename(temporary, id, src_dir_fd=root_fd, dst_dir_fd=root_fd)
    except OSError as error:
        # A directory can replace an empty one only, and every container's holds its state.json.
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise AlreadyExists(f"container with id exists: {id}") from error
        raise


def _write(directory_fd: int, name: str, data: bytes) -> None:
    temporary = f"{name}.{os.getpid()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(temporary, flags, 0o600, dir_fd=directory_fd)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)
    os.rename(temporary, name, src_dir_fd=directory_fd, dst_dir_fd=directory_fd)
    os.fsync(directory_fd)


def _encoded(state: State) -> bytes:
    shim = None if state.shim is None else state.shim._asdict()
    helpers = [helper._asdict() for helper in state.helpers]
    return jsonfile.dump({"version": _VERSION, **state._asdict(), "shim": shim, "helpers": helpers})


def _decode(data: bytes, id: str) -> State:  # noqa: A002
    """Check what was read as strictly as what comes from outside: a later version, or a hand, may have written it."""
    document = jsonfile.parse(data, what=_FILE)
    if document.pop("version", None) != _VERSION:
        raise InvalidArgument(f"{_FILE}: not version {_VERSION}")
    if document.keys() != set(State._fields):
        raise InvalidArgument(f"{_FILE}: other members than version {_VERSION} has")
    if document["id"] != id:
        raise InvalidArgument(f"{_FILE}: is that of another container")
    return State(
        id=id,
        bundle=_string(document, "bundle"),
        rootfs=_string(document, "rootfs"),
        sandbox=check_id(_string(document, "sandbox")),
        status=_status(document),
        created=_string(document, "created"),
        oci_version=_string(document, "oci_version"),
        owner=_number(document, "owner", (1 << 32) - 2),
        pid=_number(document, "pid", _PID_MAX),
        annotations=_annotations(document["annotations"]),
        shim=None if document["shim"] is None else _process_ref(document["shim"]),
        helpers=_helpers(document["helpers"]),
        accelerator=_string(document, "accelerator"),
        cgroup=_cgroup(document["cgroup"]),
        network=_string(document, "network"),
        exit_status=None if document["exit_status"] is None else _number(document, "exit_status", 255),
    )


def _string(document: dict[str, Any], key: str) -> str:
    value = document[key]
    if not isinstance(value, str):
        raise InvalidArgument(f"{_FILE}: {key}: expected a string")
    return value


def _number(document: dict[str, Any], key: str, high: int) -> int:
    value = document[key]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= high:
        raise InvalidArgument(f"{_FILE}: {key}: expected an integer between 0 and {high}")
    return value


def _status(document: dict[str, Any]) -> Status:
    try:
        return Status(_string(document, "status"))
    except ValueError as error:
        raise InvalidArgument(f"{_FILE}: status: {shown(document['status'])} is unknown") from error


def _annotations(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise InvalidArgument(f"{_FILE}: annotations: expected an object of strings")
    return value


def _cgroup(value: object) -> dict[str, Any] | None:
    # Who removes it checks what is in it.
    if value is not None and not isinstance(value, dict):
        raise InvalidArgument(f"{_FILE}: cgroup: expected an object")
    return value


def _process_ref(value: object) -> ProcessRef:
    if not isinstance(value, dict) or value.keys() != set(ProcessRef._fields):
        raise InvalidArgument(f"{_FILE}: a process: expected name, pid and start_time")
    start_time = _number(value, "start_time", (1 << 64) - 1)
    return ProcessRef(_string(value, "name"), _number(value, "pid", _PID_MAX), start_time)


def _helpers(value: object) -> tuple[ProcessRef, ...]:
    if not isinstance(value, list):
        raise InvalidArgument(f"{_FILE}: helpers: expected an array")
    return tuple(_process_ref(item) for item in value)


class _ProcessStat(NamedTuple):
    """Of /proc/PID/stat (proc(5)): ``flags`` are the kernel's, ``pending`` the signals of the first thread's."""

    status: str
    start_time: int
    flags: int
    pending: int


def _process_stat(pid: int) -> _ProcessStat | None:
    """Return what is to know of a process; None where there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123 - pathlib is slow to import
            # The command's name, in parentheses, may hold spaces and parentheses itself.
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return _ProcessStat(fields[0].decode("ascii"), int(fields[19]), int(fields[6]), int(fields[28]))
