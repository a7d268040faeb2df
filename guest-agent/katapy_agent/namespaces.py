"""Namespaces of a container: making and joining them, mapping user ids.

A process that has been here is in all of its namespaces but the new PID and time ones: those begin with its child.
The network namespace is always the VM's, whatever the specification's entry says.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Final

from katapy_agent import linux
from katapy_agent.config import IDMapping, Namespace, NamespaceType, TimeOffset, sysctl_path
from katapy_agent.errors import Internal, doing

# User first: it owns those that are made after it.
_FLAGS: Final = {
    NamespaceType.USER: linux.CLONE_NEWUSER,
    NamespaceType.MOUNT: linux.CLONE_NEWNS,
    NamespaceType.UTS: linux.CLONE_NEWUTS,
    NamespaceType.IPC: linux.CLONE_NEWIPC,
    NamespaceType.CGROUP: linux.CLONE_NEWCGROUP,
    NamespaceType.TIME: linux.CLONE_NEWTIME,
    NamespaceType.PID: linux.CLONE_NEWPID,
}


def enter(
    namespaces: Sequence[Namespace],
    uid_mappings: Sequence[IDMapping],
    gid_mappings: Sequence[IDMapping],
    time_offsets: Mapping[str, TimeOffset],
    *,
    joined: Sequence[str] = (),
) -> None:
    """Make the namespaces that the container has for itself: all but those ``joined``. Raises KatapyError."""
    # Opened now: in a user namespace the file is another user's, and what counts is who has opened it.
    offsets = os.open("/proc/self/timens_offsets", os.O_WRONLY | os.O_CLOEXEC) if time_offsets else -1
    for type_ in types_of(namespaces):
        if type_ in joined:
            continue
        if type_ is NamespaceType.USER:
            _enter_new_user_namespace(uid_mappings, gid_mappings)
            continue
        with doing(f"make a {type_} namespace"):
            linux.unshare(_FLAGS[type_])
    for clock, offset in time_offsets.items():
        with doing(f"set the {clock} clock of the time namespace"):
            os.write(offsets, f"{clock} {offset.secs} {offset.nanosecs}".encode())


def join(pidfd: int, types: Sequence[str]) -> None:
    """Join the namespaces of these types of the process ``pidfd``, in one step. Raises KatapyError."""
    with doing("join the namespaces of the container"):
        linux.setns(pidfd, sum(_FLAGS[type_] for type_ in _FLAGS if type_ in types))
    if NamespaceType.USER in types:
        become_root()


def types_of(namespaces: Sequence[Namespace]) -> tuple[NamespaceType, ...]:
    """Return the types of namespace that a container with these entries does not share with the VM, in making order."""
    # Without one of its own it would see every other container's cgroup, and could kill the agent, and the VM with it.
    types = {NamespaceType(each.type) for each in namespaces} | {NamespaceType.CGROUP, NamespaceType.PID}
    return tuple(type_ for type_ in _FLAGS if type_ in types)


def become_root() -> None:
    """Become user and group 0 of the user namespace that was just entered."""
    with doing("become root of the user namespace"):
        os.setresgid(0, 0, 0)
        os.setgroups([])
        os.setresuid(0, 0, 0)


def write_sysctls(proc_sys: int, values: Mapping[str, str], *, network: bool) -> None:
    """Set kernel parameters of the namespaces that this process is in: the network's, or all others.

    The network's take the VM's privileges: its namespace is the VM's, over which a user namespace has no rights.
    ``proc_sys`` is the VM's own /proc/sys, opened before anything of the container existed. Raises KatapyError.
    """
    resolve = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS | linux.RESOLVE_NO_XDEV
    for name, value in values.items():
        if sysctl_path(name).startswith("net/") is not network:
            continue
        with doing(f"set sysctl {name}"):
            fd = linux.openat2(proc_sys, sysctl_path(name), os.O_WRONLY, resolve=resolve)
            try:
                if linux.fstatfs_type(fd) != linux.PROC_SUPER_MAGIC:
                    raise Internal(f"cannot set sysctl {name}: /proc/sys is not a proc file system")
                os.write(fd, value.encode())
            finally:
                os.close(fd)


def _enter_new_user_namespace(uid_mappings: Sequence[IDMapping], gid_mappings: Sequence[IDMapping]) -> None:
    # The maps are written by a process that stays behind, for it keeps its capabilities over the parent namespace;
    # so setgroups(2) stays allowed.
    ready, entered = os.pipe()
    me = os.getpid()
    mapper = os.fork()
    if mapper == 0:
        status = 1
        with contextlib.suppress(BaseException):
            os.close(entered)
            if os.read(ready, 1):
                _write(f"/proc/{me}/uid_map", _map_lines(uid_mappings))
                _write(f"/proc/{me}/gid_map", _map_lines(gid_mappings))
                status = 0
        os._exit(status)
    os.close(ready)
    with doing("make a user namespace"):
        linux.unshare(linux.CLONE_NEWUSER)
    os.write(entered, b".")
    os.close(entered)
    # The launcher, which ignores SIGCHLD, has reset that for us: the status is not lost.
    if os.waitpid(mapper, 0)[1]:
        raise Internal("cannot write the id maps of the user namespace")
    become_root()


def _map_lines(mappings: Sequence[IDMapping]) -> str:
    return "".join(f"{each.container_id} {each.host_id} {each.size}\n" for each in mappings)


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
