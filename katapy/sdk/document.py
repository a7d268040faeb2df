"""The config.json of what runs in a sandbox: one container that holds the VM, and one for each run.

A run has namespaces and a cgroup of its own, the default root file system's writable layer in common with the others,
few capabilities, and no system call that a program needs only to attack the kernel of its VM.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from katapy.oci.default import OCI_VERSION, default_spec
from katapy.oci.layer import INODES, SIZE
from katapy.sdk.limits import Limits

_PERIOD: Final = 100_000  # microseconds, the kernel's
# What root may do there: its own files and processes. A VM is around it.
_CAPABILITIES: Final = [
    f"CAP_{name}"
    for name in ("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "NET_BIND_SERVICE")
]
_REFUSED: Final = [
    "add_key", "bpf", "clock_adjtime", "clock_settime", "delete_module", "finit_module", "fsconfig", "fsmount",
    "fsopen", "fspick", "init_module", "io_uring_enter", "io_uring_register", "io_uring_setup", "kexec_file_load",
    "kexec_load", "keyctl", "mount", "mount_setattr", "move_mount", "open_by_handle_at", "open_tree", "perf_event_open",
    "pivot_root", "quotactl", "reboot", "request_key", "setdomainname", "sethostname", "setns", "settimeofday",
    "swapoff", "swapon", "umount2", "unshare", "userfaultfd",
]  # fmt: skip
ENVIRONMENT: Final = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
# A program that is pid 1 cannot be ended by its own signals: abort(3) would end it by another, kill(2) not at all.
_INIT: Final = "io.katapy.init"
HOLDER: Final = "/dev/busybox"  # busybox is called by its name


@dataclass(frozen=True)
class User:
    """Whom a command runs as."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()


ROOT: Final = User()


@dataclass(frozen=True)
class Shared:
    """A directory or file of the host, ``source``, that a run sees at ``destination``."""

    source: str
    destination: str
    read_only: bool


@dataclass(frozen=True)
class Base:
    """What every run in a sandbox begins with: its root file system ``rootfs``, an absolute path of the host.

    ``process`` is that of a bundle's config.json and ``mounts`` are the bundle's, both plain JSON; else they are empty.
    """

    rootfs: str
    limits: Limits
    environment: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/"
    user: User = ROOT
    shared: tuple[Shared, ...] = ()
    network: str | None = None
    process: Mapping[str, Any] = field(default_factory=dict)
    mounts: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Command:
    """What a run executes."""

    args: Sequence[str]
    environment: Mapping[str, str]
    cwd: str
    user: User
    terminal: bool = False


def holder(base: Base, busybox: str) -> dict[str, Any]:
    """Return the configuration of the container that holds the VM: as large as a run may become."""
    mount = {"destination": HOLDER, "type": "bind", "source": busybox, "options": ["bind", "ro"]}
    document = _document(base, [HOLDER, "sleep", "infinity"])
    document["mounts"].append(mount)
    network = {"type": "network", **({"path": base.network} if base.network else {})}
    document["linux"]["namespaces"].append(network)
    document["linux"]["readonlyPaths"].append("/dev")
    return document


def run(base: Base, command: Command, sandbox_id: str) -> dict[str, Any]:
    """Return the configuration of one run."""
    document = _document(base, list(command.args))
    document["process"] |= {
        "terminal": command.terminal,
        "cwd": command.cwd,
        "env": [f"{name}={value}" for name, value in command.environment.items()],
        "user": {
            **document["process"]["user"],
            "uid": command.user.uid,
            "gid": command.user.gid,
            "additionalGids": list(command.user.groups),
        },
    }
    document["mounts"] += [dict(mount) for mount in base.mounts]
    document["mounts"] += [
        {
            "destination": shared.destination,
            "type": "bind",
            "source": shared.source,
            "options": ["rbind", "nosuid", "nodev", "ro" if shared.read_only else "rw"],
        }
        for shared in base.shared
    ]
    document["annotations"] |= {
        _INIT: "true",
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.sandbox-id": sandbox_id,
    }
    return document


def _document(base: Base, args: list[str]) -> dict[str, Any]:
    limits, default = base.limits, default_spec()
    linux = default["linux"]
    linux["namespaces"] = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "cgroup")]
    linux["resources"] |= {
        "memory": {"limit": limits.memory, "swap": limits.memory},
        "cpu": {"quota": max(1000, math.ceil(limits.cpus * _PERIOD)), "period": _PERIOD},
        # One more is there for the others.
        "pids": {"limit": limits.processes + 1},
    }
    linux["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [{"names": list(_REFUSED), "action": "SCMP_ACT_ERRNO", "errnoRet": 1}],
    }
    sets = ("bounding", "effective", "permitted")
    process = {
        "user": {"uid": 0, "gid": 0},
        "cwd": "/",
        "env": [f"{name}={value}" for name, value in ENVIRONMENT.items()],
        "capabilities": {name: list(_CAPABILITIES) for name in sets},
        "noNewPrivileges": True,
        **base.process,
        "terminal": False,
        "args": args,
        "rlimits": [
            {"type": "RLIMIT_NOFILE", "soft": limits.open_files, "hard": limits.open_files},
            {"type": "RLIMIT_FSIZE", "soft": limits.file_size, "hard": limits.file_size},
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
        ],
    }
    return {
        "ociVersion": OCI_VERSION,
        "process": process,
        "root": {"path": base.rootfs, "readonly": False},
        "hostname": "sandbox",
        "mounts": list(default["mounts"]),
        "linux": linux,
        "annotations": {SIZE: str(limits.disk), INODES: str(limits.inodes)},
    }


def check_network(network: str | None) -> str | None:
    """Return the path of a network namespace, None for no network; ``network`` may be a name of `ip netns`."""
    if network is None or network == "none":
        return None
    return network if "/" in network else os.path.join("/run/netns", network)
