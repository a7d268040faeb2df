"""What a process may do: limits, scheduling, user, capabilities, filters. Steps only; ``child`` orders them.

Each acts on the calling process and raises KatapyError, naming itself.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat
from collections.abc import Sequence
from typing import Final

from katapy_agent import linux
from katapy_agent.config import Capabilities, IOPriority, Personality, Rlimit, Scheduler, User
from katapy_agent.errors import doing

_LARGEST_LIMIT: Final = 2**63 - 1
_MAX_PASSWD_BYTES: Final = 1 << 20
_DEFAULT_UMASK: Final = 0o022


def set_oom_score_adj(value: int) -> None:
    """Set how willingly the kernel kills this process, -1000 to 1000 (proc(5))."""
    with doing(f"set oomScoreAdj to {value}"):
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, str(value).encode())
        finally:
            os.close(fd)


def raise_hard_limits(limits: Sequence[Rlimit]) -> None:
    """Raise hard limits where asked: that takes the VM's capabilities, which a user namespace does not give."""
    for limit in limits:
        soft, hard = resource.getrlimit(limit.number)
        if hard != resource.RLIM_INFINITY and limit.hard > hard:
            with doing(f"set {limit.type} to {limit.hard}"):
                _set_limit(limit.number, soft, limit.hard)


def set_limits(limits: Sequence[Rlimit]) -> None:
    """Set the limits (setrlimit(2)). Late, for a low one would hinder what builds the container."""
    for limit in limits:
        with doing(f"set {limit.type} to {limit.soft}:{limit.hard}"):
            _set_limit(limit.number, limit.soft, limit.hard)


def _set_limit(number: int, soft: int, hard: int) -> None:
    # Python takes no larger numbers; to the kernel they are as good as none.
    limits = [value if value <= _LARGEST_LIMIT else resource.RLIM_INFINITY for value in (soft, hard)]
    try:
        resource.setrlimit(number, (limits[0], limits[1]))
    except ValueError as error:  # how Python reports EPERM and EINVAL here
        raise OSError(errno.EPERM, os.strerror(errno.EPERM)) from error


def set_scheduler(scheduler: Scheduler) -> None:
    """Set policy and priority (sched_setattr(2))."""
    flags = sum(1 << Scheduler.FLAGS.index(flag) for flag in set(scheduler.flags))
    times = (scheduler.runtime, scheduler.deadline, scheduler.period)
    with doing(f"set scheduler {scheduler.policy}"):
        policy = Scheduler.POLICIES.index(scheduler.policy)
        linux.sched_setattr(policy, flags, scheduler.nice, scheduler.priority, times)


def set_io_priority(priority: IOPriority) -> None:
    """Set class and priority of I/O (ioprio_set(2))."""
    with doing(f"set ioPriority {priority.class_}"):
        linux.ioprio_set(IOPriority.CLASSES.index(priority.class_), priority.priority)


def set_personality(personality: Personality) -> None:
    """Set the execution domain (personality(2))."""
    with doing(f"set personality {personality.domain}"):
        linux.personality(Personality.DOMAINS[personality.domain])


def set_no_new_privileges() -> None:
    """Give up gaining privileges by execve(2), for good."""
    with doing("set noNewPrivileges"):
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)


def load_filter(program: bytes, flags: int) -> None:
    """Load a compiled seccomp filter."""
    with doing("load the seccomp filter"):
        linux.seccomp_load(program, flags)


def give_streams(streams: Sequence[int], uid: int) -> None:
    """Make the user owner of its standard streams, so that it can open /dev/stdout again; never of /dev/null."""
    for fd in streams:
        status = os.fstat(fd)
        if status.st_uid == uid or (stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(1, 3)):
            continue
        # Some streams cannot be given away (a file on a read-only volume); they can still be used.
        with contextlib.suppress(OSError):
            os.fchown(fd, uid, -1)


def switch_user(user: User, capabilities: Capabilities | None, cwd: str, *, kept: tuple[str, ...] = ()) -> None:
    """Become the user, in the working directory, with exactly these capabilities; None is none at all.

    Until it executes its program this process has those in ``kept``, too. The directory is entered as root where the
    user may not but as the user where only it may (a network file system), as in runc.
    """
    sets = capabilities or Capabilities()
    mask = Capabilities.mask
    with doing("drop capabilities from the bounding set"):
        _drop_bounding(mask(sets.bounding))
    entered = False
    with contextlib.suppress(PermissionError):
        entered = _enter(cwd)
    with doing(f"become user {user.uid}:{user.gid}"):
        linux.prctl(linux.PR_SET_KEEPCAPS, 1)
        os.setgroups(list(user.additional_gids))
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
        linux.prctl(linux.PR_SET_KEEPCAPS, 0)
    os.umask(_DEFAULT_UMASK if user.umask is None else user.umask)
    if not entered:
        with doing(f"enter the working directory {cwd}"):
            _enter(cwd)
    with doing("set capabilities"):
        more = mask(kept)
        linux.capset(mask(sets.effective) | more, mask(sets.permitted) | more, mask(sets.inheritable))
        linux.prctl(linux.PR_CAP_AMBIENT, linux.PR_CAP_AMBIENT_CLEAR_ALL)
        # The kernel has no ambient capability that is not permitted and inheritable. `runc spec` writes such ones,
        # and runc passes over them.
        for number in _bits(mask(sets.ambient) & mask(sets.inheritable) & mask(sets.permitted)):
            linux.prctl(linux.PR_CAP_AMBIENT, linux.PR_CAP_AMBIENT_RAISE, number)


def _drop_bounding(keep: int) -> None:
    for number in range(64):
        if not keep >> number & 1:
            try:
                linux.prctl(linux.PR_CAPBSET_DROP, number)
            except OSError as error:
                if error.errno != errno.EINVAL:  # the kernel has no more
                    raise
                return


def _enter(cwd: str) -> bool:
    # No magic link: /proc/self/fd/N must not lead to a directory outside the container.
    resolve = linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_MAGICLINKS
    try:
        fd = linux.openat2(linux.AT_FDCWD, cwd, os.O_PATH | os.O_DIRECTORY, resolve=resolve)
    except PermissionError:
        raise
    except OSError as error:
        with doing(f"enter the working directory {cwd}"):
            raise error
    try:
        os.fchdir(fd)
    finally:
        os.close(fd)
    return True


def _bits(mask: int) -> list[int]:
    return [number for number in range(mask.bit_length()) if mask >> number & 1]


def find_home(uid: int) -> str:
    """Return the home directory that the container's /etc/passwd gives a user; "/" where it gives none."""
    resolve = linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_MAGICLINKS
    try:
        # An image may put a pipe there, or a file without end.
        fd = linux.openat2(linux.AT_FDCWD, "/etc/passwd", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY, resolve=resolve)
    except OSError:
        return "/"
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return "/"
        return parse_home(os.pread(fd, _MAX_PASSWD_BYTES, 0), uid)
    finally:
        os.close(fd)


def parse_home(passwd: bytes, uid: int) -> str:
    """Return the home directory of a numeric user in the text of a passwd(5) file, or "/"."""
    wanted = str(uid).encode()
    for line in passwd.split(b"\n"):
        fields = line.split(b":")
        if len(fields) >= 6 and fields[2] == wanted and fields[5].startswith(b"/") and b"\0" not in fields[5]:
            return os.fsdecode(fields[5])
    return "/"
