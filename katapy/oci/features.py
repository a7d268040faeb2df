"""What katapy honours of config.json, in the form of the runtime-spec's features.md: the answer of `katapy features`.

Lists that the host's parser has are taken from it. The rest is decided in the guest, whose package the host does not
have: those tables are written down here, and a test compares them with the guest's own.
"""

from __future__ import annotations

from typing import Any, Final

from katapy import __version__
from katapy.oci.default import OCI_VERSION
from katapy.oci.linux import NAMESPACES
from katapy.oci.seccomp import OPERATORS

OCI_VERSION_MIN: Final = "1.0.0"
HOOKS: Final = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")

_ATTRIBUTES: Final = (
    *("ro", "rw", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "symfollow", "nosymfollow"),
    *("atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime", "strictatime", "nostrictatime"),
)
_PROPAGATIONS: Final = ("private", "shared", "slave", "unbindable")
# The kernel's defaults, said aloud.
_DEFAULTS: Final = ("defaults", "async", "loud", "silent", "nolazytime", "nomand", "noiversion")
MOUNT_OPTIONS: Final = tuple(
    sorted((
        *(prefix + name for name in (*_ATTRIBUTES, *_PROPAGATIONS) for prefix in ("", "r")),
        *(*_DEFAULTS, "bind", "rbind", "tmpcopyup"),
    ))
)  # fmt: skip
# fmt: off
CAPABILITIES: Final = tuple(f"CAP_{name}" for name in (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
))
# fmt: on
SECCOMP_ACTIONS: Final = tuple(
    f"SCMP_ACT_{name}" for name in ("ALLOW", "ERRNO", "KILL", "KILL_PROCESS", "KILL_THREAD", "LOG", "TRACE", "TRAP")
)
# An x86-64 guest: libseccomp puts architectures of the other byte order into no filter together with it.
SECCOMP_ARCHITECTURES: Final = tuple(
    f"SCMP_ARCH_{name}"
    for name in (
        *("AARCH64", "ARM", "MIPSEL", "MIPSEL64", "MIPSEL64N32", "PPC64LE", "RISCV64", "X32", "X86", "X86_64"),
    )
)
SECCOMP_FLAGS: Final = tuple(f"SECCOMP_FILTER_FLAG_{name}" for name in ("LOG", "SPEC_ALLOW", "TSYNC"))


def features() -> dict[str, Any]:
    """Return the features structure (runtime-spec 1.2, features.md and features-linux.md)."""
    return {
        "ociVersionMin": OCI_VERSION_MIN,
        "ociVersionMax": OCI_VERSION,
        "hooks": list(HOOKS),
        "mountOptions": list(MOUNT_OPTIONS),
        "linux": {
            "namespaces": list(NAMESPACES),
            "capabilities": list(CAPABILITIES),
            # The first three are the host's, where the VM is put; rdma would be the container's, and is not there.
            "cgroup": {"v1": True, "v2": True, "systemd": True, "systemdUser": False, "rdma": False},
            "seccomp": {
                "enabled": True,
                "actions": list(SECCOMP_ACTIONS),
                "operators": sorted(OPERATORS),
                "archs": list(SECCOMP_ARCHITECTURES),
                # The guest's kernel is katapy's own: what is known is also supported.
                "knownFlags": list(SECCOMP_FLAGS),
                "supportedFlags": list(SECCOMP_FLAGS),
            },
            "apparmor": {"enabled": False},
            "selinux": {"enabled": False},
            "intelRdt": {"enabled": False},
            "mountExtensions": {"idmap": {"enabled": False}},
        },
        "annotations": {"io.katapy.version": __version__},
        "potentiallyUnsafeConfigAnnotations": [],
    }
