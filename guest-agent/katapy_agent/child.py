"""The process that becomes a container's init, or one more process in it: everything between fork and execve.

The agent makes a plan (``plan_init``, ``plan_exec``), the launcher forks, and the fork follows the plan (``run``). It
talks with the agent by JSON datagrams over the control socket: {"pid"}, {"console"} with a descriptor, {"ready"}, then
waits for {"start"}; the socket's end says that the program runs; {"error"} says that and why it does not. The order
of the steps is here, in ``_build_container``, ``_join_container`` and ``_execute``; the steps are in the modules below.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import signal
import socket
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, NoReturn

from katapy_agent import cgroups, hooks, linux, mounts, namespaces, privileges, rootfs, schema, seccomp, terminal
from katapy_agent.config import Hooks, NamespaceType, Personality, Process, Spec
from katapy_agent.errors import (
    CommandNotExecutable,
    CommandNotFound,
    Internal,
    InvalidArgument,
    InvalidState,
    KatapyError,
    doing,
)
from katapy_agent.resources import Resources
from katapy_agent.schema import Range

# In a container's annotations, "true": its program is not pid 1, so that signals end it as they end any other.
INIT: Final = "io.katapy.init"
_MESSAGE_MAX: Final = 65536
_TEXT_MAX: Final = 4096
_DESCRIPTORS_MAX: Final = 1 << 20
_NO_HOOKS: Final = Hooks()
_Size = Annotated[int, Range(0, 2**16 - 1)]
_Uid = Annotated[int, Range(0, 2**32 - 2)]


@dataclass(frozen=True)
class Filter:
    """A compiled seccomp filter, in base64, and its SECCOMP_FILTER_FLAG_* bits."""

    program: str
    flags: Annotated[int, Range(0, 2**32 - 1)]


@dataclass(frozen=True)
class InitPlan:
    """How a container and its init are made."""

    cgroup: str
    spec: Spec
    terminal: bool
    rows: _Size
    columns: _Size
    filter: Filter | None = None
    joined: tuple[str, ...] = ()  # namespaces of another container's
    below_init: bool = False
    state: str = "{}"  # what the hooks are told, without the pid


@dataclass(frozen=True)
class ExecPlan:
    """How one more process comes into the container of the init ``pid``; the VM's ``stdio_uid`` owns its streams."""

    cgroup: str
    process: Process
    terminal: bool
    rows: _Size
    columns: _Size
    pid: Annotated[int, Range(1, 2**31 - 1)]
    namespaces: tuple[str, ...]
    stdio_uid: _Uid | None = None
    filter: Filter | None = None
    personality: Personality | None = None


# Made here, so that every fork of the launcher has them.
_decode_init = schema.decoder(InitPlan)
_decode_exec = schema.decoder(ExecPlan)


def plan_init(
    spec: Spec,
    *,
    container_id: str,
    cgroup: str,
    rows: int,
    columns: int,
    bundle: str = "",
    joined: Sequence[str] = (),
) -> dict[str, object]:
    """Return the plan, plain JSON, that makes a container and its init.

    ``cgroup`` is the directory of its leaf, ``rows`` and ``columns`` are the terminal's (0: consoleSize, if any),
    ``bundle`` is for hooks, and ``joined`` are the types of the namespaces that are another container's.
    Raises InvalidArgument and Unsupported for what katapy does not do, before anything exists.
    """
    if spec.process is None:
        raise InvalidArgument(f"container {container_id} has no process")
    rootfs.check(spec)
    size = spec.process.console_size
    # runtime-spec, runtime.md, "State"
    state = {"ociVersion": spec.oci_version, "id": container_id, "status": "created", "bundle": bundle}
    plan = InitPlan(
        cgroup=cgroup,
        # What is the agent's and the host's does not travel.
        spec=dataclasses.replace(
            spec, annotations={}, linux=dataclasses.replace(spec.linux, resources=Resources(), seccomp=None)
        ),
        terminal=spec.process.terminal,
        rows=rows or size.height,
        columns=columns or size.width,
        filter=_compile(spec),
        joined=tuple(joined),
        below_init=spec.annotations.get(INIT) == "true" and NamespaceType.PID not in joined,
        state=json.dumps({**state, "annotations": dict(spec.annotations)}),
    )
    return {"init": schema.encode(plan), "terminal": plan.terminal}


def plan_exec(
    process: Process, *, spec: Spec, init_pid: int, cgroup: str, rows: int, columns: int
) -> dict[str, object]:
    """Return the plan, plain JSON, for one more process in the container ``spec`` whose init is ``init_pid``.

    What the process does not say (capabilities, rlimits, oomScoreAdj) is the container's, as in runc.
    """
    own = spec.process or process
    process = dataclasses.replace(
        process,
        capabilities=process.capabilities or own.capabilities,
        rlimits=process.rlimits or own.rlimits,
        oom_score_adj=own.oom_score_adj if process.oom_score_adj is None else process.oom_score_adj,
    )
    plan = ExecPlan(
        cgroup=cgroup,
        process=process,
        terminal=process.terminal,
        rows=rows or process.console_size.height,
        columns=columns or process.console_size.width,
        pid=init_pid,
        namespaces=namespaces.types_of(spec.linux.namespaces),
        stdio_uid=spec.linux.host_uid(process.user.uid),
        filter=_compile(spec),
        personality=spec.linux.personality,
    )
    return {"exec": schema.encode(plan), "terminal": plan.terminal}


def _compile(spec: Spec) -> Filter | None:
    profile = spec.linux.seccomp
    if profile is None:
        return None
    return Filter(base64.b64encode(seccomp.compile_filter(profile)).decode(), seccomp.filter_flags(profile))


def run(
    plan: Mapping[str, object], control: int, stdio: tuple[int, int, int] | None, joined: int | None = None
) -> NoReturn:
    """Follow a plan in this process, which has just been forked for it; never returns.

    ``control`` is a connected SOCK_SEQPACKET socket, ``stdio`` the three standard streams, None with a terminal, and
    ``joined`` a pidfd of the process whose namespaces the plan's container shares.
    """
    # Above the standard streams, which are replaced in the end.
    channel = Channel(fcntl.fcntl(control, fcntl.F_DUPFD_CLOEXEC, 3))
    os.close(control)
    try:
        streams = tuple(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3) for fd in stdio or ())
        # Nobody in the container may trace or look into a process that still has the VM's descriptors.
        linux.prctl(linux.PR_SET_DUMPABLE, 0)
        os.umask(0)
        if "init" in plan:
            _build_container(_decode_init(plan["init"], "plan"), channel, streams, joined)
        _join_container(_decode_exec(plan["exec"], "plan"), channel, streams)
    except KatapyError as error:
        channel.fail(error)
    except BaseException as error:
        channel.fail(Internal(f"container process failed: {type(error).__name__}: {error}"))
    finally:
        os._exit(1)


class Channel:
    """The process's end of the control socket."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def say(self, message: Mapping[str, object]) -> None:
        """Send one message."""
        # write(2), like read(2) below, passes seccomp filters that know of no sockets.
        os.write(self.fd, json.dumps(message).encode())

    def send_console(self, master: int) -> None:
        """Send the pty's other side."""
        with socket.socket(fileno=os.dup(self.fd)) as end:
            socket.send_fds(end, [json.dumps({"console": True}).encode()], [master])

    def fail(self, error: KatapyError) -> None:
        """Say why the program will not run; the agent may be gone."""
        try:
            self.say({"error": {"kind": type(error).__name__, "message": str(error)[:_TEXT_MAX]}})
        except OSError:
            os._exit(1)

    def wait_for_start(self) -> None:
        """Report that everything is ready and wait to be started; the process ends when nobody will start it."""
        self.say({"ready": True})
        if not os.read(self.fd, _MESSAGE_MAX):
            os._exit(1)


def _build_container(plan: InitPlan, channel: Channel, streams: tuple[int, ...], joined: int | None) -> NoReturn:
    spec = plan.spec
    process = spec.process
    assert process is not None
    # With the VM's privileges, in the VM's namespaces.
    cgroups.enter(plan.cgroup)
    _prepare(process, streams, spec.linux.host_uid(process.user.uid))
    sources = rootfs.open_sources(spec)
    namespaces.write_sysctls(sources.proc_sys, spec.linux.sysctl, network=True)
    if joined is not None:
        namespaces.join(joined, plan.joined)
        os.close(joined)
    namespaces.enter(
        spec.linux.namespaces,
        spec.linux.uid_mappings,
        spec.linux.gid_mappings,
        spec.linux.time_offsets,
        joined=plan.joined,
    )
    _fork(channel, below_init=plan.below_init)
    # From here on as the container's init.
    root = rootfs.build(spec, sources)
    if plan.terminal:
        streams = _open_terminal(root, plan.rows, plan.columns, channel)
        terminal.bind_console(root, streams[0])
    rootfs.protect(spec, root)
    with doing("change the root directory"):
        mounts.pivot(root)
    if spec.linux.rootfs_propagation:
        rootfs.set_propagation(spec.linux.rootfs_propagation)
    if spec.hostname:
        with doing(f"set hostname {spec.hostname}"):
            socket.sethostname(spec.hostname)
    if spec.domainname:
        with doing(f"set domainname {spec.domainname}"):
            linux.setdomainname(spec.domainname)
    namespaces.write_sysctls(sources.proc_sys, spec.linux.sysctl, network=False)
    _execute(process, channel, streams, plan.terminal, plan.filter, spec.linux.personality, spec.hooks, plan.state)


def _join_container(plan: ExecPlan, channel: Channel, streams: tuple[int, ...]) -> NoReturn:
    cgroups.enter(plan.cgroup, beside=plan.pid)
    _prepare(plan.process, streams, plan.stdio_uid)
    with doing(f"find the container's init {plan.pid}"):
        init = os.pidfd_open(plan.pid)
    with mounts.closing(init):
        namespaces.join(init, plan.namespaces)
    _fork(channel)
    if plan.terminal:
        with mounts.closing(os.open("/", os.O_PATH | os.O_CLOEXEC)) as root:
            streams = _open_terminal(root, plan.rows, plan.columns, channel)
    _execute(plan.process, channel, streams, plan.terminal, plan.filter, plan.personality)


def _prepare(process: Process, streams: tuple[int, ...], stdio_uid: int | None) -> None:
    """Do what takes the VM's privileges: lower the OOM score, raise hard limits, give the pipes to the user."""
    if process.oom_score_adj is not None:
        privileges.set_oom_score_adj(process.oom_score_adj)
    privileges.raise_hard_limits(process.rlimits)
    if stdio_uid is not None:
        privileges.give_streams(streams, stdio_uid)


def _fork(channel: Channel, *, below_init: bool = False) -> None:
    """Go on in a child, which is in the new PID and time namespaces; the parent reports its pid and ends.

    With ``below_init`` another child is the first process of that PID namespace, and reaps for it.
    """
    ended, end = os.pipe()
    with doing("fork into the container"):
        if below_init:
            # The root directory of both is soon another.
            with mounts.closing(os.open("/proc", os.O_PATH | os.O_CLOEXEC)) as proc:
                if os.fork() == 0:
                    _reap_only(proc)
        pid = os.fork()
    if pid:
        channel.say({"pid": pid})
        os._exit(0)
    # The pid is reported before anything else is.
    os.close(end)
    os.read(ended, 1)
    os.close(ended)
    os.setsid()


def _reap_only(proc: int) -> NoReturn:
    """Be the init of a PID namespace, until the agent kills all that is in the container. ``proc`` is /proc."""
    os.setsid()
    # Where memory runs out, what uses it is to end, and not all at once. Refused in a user namespace.
    with contextlib.suppress(PermissionError):
        os.write(os.open("self/oom_score_adj", os.O_WRONLY, dir_fd=proc), b"-1000")
    # From within, only a signal that has a handler reaches an init: those of faults do, where faulthandler is on.
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    # The kernel reaps for who ignores this.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # Only now: the program begins when its pipe is closed. Above all the control socket, whose end says that it runs.
    os.closerange(0, _DESCRIPTORS_MAX)
    while True:
        signal.pause()


def _open_terminal(root: int, rows: int, columns: int, channel: Channel) -> tuple[int, ...]:
    master, slave = terminal.open_pty(root, rows, columns)
    with mounts.closing(master):
        channel.send_console(master)
    return (slave,)


def _execute(
    process: Process,
    channel: Channel,
    streams: tuple[int, ...],
    has_terminal: bool,
    filter_: Filter | None,
    personality: Personality | None,
    own_hooks: Hooks = _NO_HOOKS,
    state: str = "{}",
) -> NoReturn:
    if has_terminal:
        terminal.adopt(streams[0])
        privileges.give_streams(streams, process.user.uid)
    else:
        for fd, stream in enumerate(streams):
            os.dup2(stream, fd)
    environment = _environment(process)
    arguments = [os.fsencode(argument) for argument in process.args]
    program = base64.b64decode(filter_.program) if filter_ else b""
    if personality:
        privileges.set_personality(personality)
    if process.scheduler:
        privileges.set_scheduler(process.scheduler)
    if process.io_priority:
        privileges.set_io_priority(process.io_priority)
    if process.no_new_privileges:
        privileges.set_no_new_privileges()
    # Without no_new_privs loading a filter takes this capability. execve(2) works the sets out anew, without it.
    kept = ("CAP_SYS_ADMIN",) if filter_ and not process.no_new_privileges else ()
    privileges.switch_user(process.user, process.capabilities, process.cwd, kept=kept)
    # After what needs descriptors and memory; hard limits were raised at the very beginning.
    privileges.set_limits(process.rlimits)
    path = find_program(process.args[0], environment.get(b"PATH", b""))
    _reset_signals()
    linux.close_range_cloexec(3)
    channel.wait_for_start()

    def confine() -> None:
        if filter_:
            privileges.load_filter(program, filter_.flags)

    hooks.run(own_hooks.start_container, state, environment, confine)
    # As late as can be, so that the filter need allow nothing but the program's own calls.
    confine()
    try:
        os.execve(path, arguments, environment)
    except OSError as error:
        raise _not_executed(process.args[0], error) from error


def _environment(process: Process) -> dict[bytes, bytes]:
    environment = dict(os.fsencode(entry).split(b"=", 1) for entry in process.env)
    if not environment.get(b"HOME"):
        environment[b"HOME"] = os.fsencode(privileges.find_home(process.user.uid))
    return environment


def find_program(name: str, search_path: bytes) -> bytes:
    """Return the path of a program as this process finds it now, in ``search_path`` where it has no slash.

    An empty or relative entry, which starts from the working directory, is passed over: runc runs nothing from there.
    Raises CommandNotFound and CommandNotExecutable, in runc's words.
    """
    encoded = os.fsencode(name)
    if b"/" in encoded:
        _check_executable(name, encoded)
        return encoded
    for directory in search_path.split(b":"):
        if not directory.startswith(b"/"):
            continue
        candidate = os.path.join(directory, encoded)
        try:
            if stat.S_ISREG(os.stat(candidate).st_mode) and os.access(candidate, os.X_OK, effective_ids=True):
                return candidate
        except OSError:
            continue
    raise CommandNotFound(f'exec: "{name}": executable file not found in $PATH')


def _check_executable(name: str, path: bytes) -> None:
    try:
        mode = os.stat(path).st_mode
    except PermissionError as error:
        raise CommandNotExecutable(f'exec: "{name}": permission denied') from error
    except OSError as error:
        raise CommandNotFound(f'exec: "{name}": stat {name}: {(error.strerror or "").lower()}') from error
    if stat.S_ISDIR(mode):
        raise CommandNotExecutable(f'exec: "{name}": is a directory')
    if not os.access(path, os.X_OK, effective_ids=True):
        raise CommandNotExecutable(f'exec: "{name}": permission denied')


def _not_executed(name: str, error: OSError) -> KatapyError:
    message = f'exec: "{name}": {(error.strerror or "").lower()}'
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return CommandNotFound(message)  # the interpreter of a script, or the dynamic linker
    if error.errno in (errno.EACCES, errno.EPERM, errno.ENOEXEC):
        return CommandNotExecutable(message)
    return InvalidState(message)


def _reset_signals() -> None:
    # An ignored signal stays ignored over execve, and Python ignores some.
    for number in signal.valid_signals():
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
