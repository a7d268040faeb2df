"""The container's configuration: config.json of the OCI runtime specification 1.2, for Linux, as frozen dataclasses.

The host has checked the document and rewritten its paths; it is checked again here, once, and nothing half-parsed
travels further. Fields that are only the host's (hooks that run there, cgroupsPath, annotations) are accepted. What
the specification has and katapy does not honour is in REFUSED of its class. What a type cannot say about one field is
refused in its class, too; what takes knowledge of the kernel (mount options, syscalls) in that module.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, ClassVar, Final

from katapy_agent import schema
from katapy_agent.errors import InvalidArgument, Unsupported
from katapy_agent.resources import Resources
from katapy_agent.schema import Range

MAX_SPEC_BYTES: Final = 4 << 20

_U16 = Annotated[int, Range(0, 2**16 - 1)]
_U32 = Annotated[int, Range(0, 2**32 - 1)]
# An id of 2^32-1 means "leave it alone" to setresuid(2).
_Id = Annotated[int, Range(0, 2**32 - 2)]
_I64 = Annotated[int, Range(-(2**63), 2**63 - 1)]
_U64 = Annotated[int, Range(0, 2**64 - 1)]
_DeviceNumber = Annotated[int, Range(0, 2**31 - 1)]

# In the order of their numbers: asm-generic/resource.h, linux/capability.h
# fmt: off
_RLIMITS: Final = (
    "CPU", "FSIZE", "DATA", "STACK", "CORE", "RSS", "NPROC", "NOFILE", "MEMLOCK", "AS",
    "LOCKS", "SIGPENDING", "MSGQUEUE", "NICE", "RTPRIO", "RTTIME",
)
_CAPABILITIES: Final = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL",
    "SETGID", "SETUID", "SETPCAP", "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST",
    "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO",
    "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE",
    "AUDIT_CONTROL", "SETFCAP", "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM",
    "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF", "CHECKPOINT_RESTORE",
)
# fmt: on
_CAPABILITY_BIT: Final = {f"CAP_{name}": 1 << number for number, name in enumerate(_CAPABILITIES)}
_IPC_SYSCTLS: Final = frozenset(("msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced"))
_SYSCTL: Final = re.compile(r"[A-Za-z0-9_./:@-]{1,256}")
_VERSION: Final = re.compile(r"1\.\d{1,4}\.\d{1,4}([-+.][0-9A-Za-z.+-]{1,64})?")
_PROPAGATIONS: Final = ("", "private", "shared", "slave", "unbindable")
_PROFILES_OF_NONE: Final = ("", "unconfined")


class NamespaceType(StrEnum):
    """linux.namespaces[].type"""

    PID = "pid"
    NETWORK = "network"
    MOUNT = "mount"
    IPC = "ipc"
    UTS = "uts"
    USER = "user"
    CGROUP = "cgroup"
    TIME = "time"


def _one_of(name: str, value: str, known: Container[str]) -> None:
    if value not in known:
        raise InvalidArgument(f"{name} {value[:64]!r} is unknown")


def _absolute(name: str, path: str) -> None:
    if not path.startswith("/"):
        raise InvalidArgument(f"{name} {path[:256]!r} is not an absolute path")


@dataclass(frozen=True)
class Root:
    """Where the root file system is in the guest."""

    path: str
    readonly: bool = False

    def __post_init__(self) -> None:
        _absolute("path", self.path)


@dataclass(frozen=True)
class Mount:
    """One mount, made in order."""

    destination: str
    type: str = ""
    source: str = ""
    options: tuple[str, ...] = ()

    REFUSED: ClassVar = ("gidMappings", "uidMappings")

    def __post_init__(self) -> None:
        if not self.destination:
            raise InvalidArgument("destination is empty")


@dataclass(frozen=True)
class Box:
    """Size of a terminal, in characters."""

    height: _U16 = 0
    width: _U16 = 0


@dataclass(frozen=True)
class User:
    """Numeric identity of a process."""

    uid: _Id = 0
    gid: _Id = 0
    umask: Annotated[int, Range(0, 0o777)] | None = None
    additional_gids: tuple[_Id, ...] = ()


@dataclass(frozen=True)
class Capabilities:
    """The five capability sets (capabilities(7)), by name."""

    bounding: tuple[str, ...] = ()
    effective: tuple[str, ...] = ()
    inheritable: tuple[str, ...] = ()
    permitted: tuple[str, ...] = ()
    ambient: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in {*self.bounding, *self.effective, *self.inheritable, *self.permitted, *self.ambient}:
            _one_of("capability", name, _CAPABILITY_BIT)

    @staticmethod
    def mask(names: tuple[str, ...]) -> int:
        """Return a set as the kernel's bit mask."""
        return sum(_CAPABILITY_BIT[name] for name in set(names))


@dataclass(frozen=True)
class Rlimit:
    """One resource limit (getrlimit(2))."""

    type: str
    soft: _U64
    hard: _U64

    def __post_init__(self) -> None:
        _one_of("type", self.type.removeprefix("RLIMIT_"), _RLIMITS)
        if self.soft > self.hard:
            raise InvalidArgument(f"soft limit of {self.type} is above its hard limit")

    @property
    def number(self) -> int:
        """The kernel's RLIMIT_* number."""
        return _RLIMITS.index(self.type.removeprefix("RLIMIT_"))


@dataclass(frozen=True)
class Scheduler:
    """sched_setattr(2); times in nanoseconds."""

    policy: str
    nice: Annotated[int, Range(-20, 19)] = 0
    priority: Annotated[int, Range(0, 99)] = 0
    flags: tuple[str, ...] = ()
    runtime: _U64 = 0
    deadline: _U64 = 0
    period: _U64 = 0

    POLICIES = ("SCHED_OTHER", "SCHED_FIFO", "SCHED_RR", "SCHED_BATCH", "SCHED_ISO", "SCHED_IDLE", "SCHED_DEADLINE")
    FLAGS = (
        "SCHED_FLAG_RESET_ON_FORK",
        "SCHED_FLAG_RECLAIM",
        "SCHED_FLAG_DL_OVERRUN",
        "SCHED_FLAG_KEEP_POLICY",
        "SCHED_FLAG_KEEP_PARAMS",
        "SCHED_FLAG_UTIL_CLAMP_MIN",
        "SCHED_FLAG_UTIL_CLAMP_MAX",
    )

    def __post_init__(self) -> None:
        _one_of("policy", self.policy, self.POLICIES)
        for flag in self.flags:
            _one_of("flag", flag, self.FLAGS)


@dataclass(frozen=True)
class IOPriority:
    """ioprio_set(2)"""

    class_: str
    priority: Annotated[int, Range(0, 7)] = 0

    CLASSES = ("IOPRIO_CLASS_NONE", "IOPRIO_CLASS_RT", "IOPRIO_CLASS_BE", "IOPRIO_CLASS_IDLE")

    def __post_init__(self) -> None:
        _one_of("class", self.class_, self.CLASSES)


@dataclass(frozen=True)
class Process:
    """One process of a container: its init, or one that is added to it."""

    cwd: str
    args: tuple[str, ...]
    env: tuple[str, ...] = ()
    user: User = User()
    terminal: bool = False
    console_size: Box = Box()
    capabilities: Capabilities | None = None
    rlimits: tuple[Rlimit, ...] = ()
    no_new_privileges: bool = False
    oom_score_adj: Annotated[int, Range(-1000, 1000)] | None = None
    scheduler: Scheduler | None = None
    io_priority: IOPriority | None = None
    apparmor_profile: str = ""
    selinux_label: str = ""

    REFUSED: ClassVar = ("execCPUAffinity",)

    def __post_init__(self) -> None:
        _absolute("cwd", self.cwd)
        if not self.args:
            raise InvalidArgument("args is empty")
        for entry in self.env:
            if entry.find("=") < 1:
                raise InvalidArgument(f"env entry {entry[:64]!r} is not NAME=value")
        types = [limit.type for limit in self.rlimits]
        if len(set(types)) != len(types):
            raise InvalidArgument("rlimits names a limit twice")
        for name, value in (("apparmorProfile", self.apparmor_profile), ("selinuxLabel", self.selinux_label)):
            if value not in _PROFILES_OF_NONE:
                raise Unsupported(f"{name} {value[:64]!r} is not supported")


@dataclass(frozen=True)
class Namespace:
    """A new namespace. The network namespace is always the VM's."""

    type: str
    path: str = ""

    def __post_init__(self) -> None:
        _one_of("type", self.type, set(NamespaceType))
        if self.path:
            raise Unsupported("path is not supported: a container joins no other namespace")


@dataclass(frozen=True)
class IDMapping:
    """One line of /proc/<pid>/uid_map or gid_map (user_namespaces(7))."""

    container_id: _Id
    host_id: _Id
    size: _U32


@dataclass(frozen=True)
class TimeOffset:
    """Offset of a clock in a time namespace (time_namespaces(7))."""

    secs: _I64 = 0
    nanosecs: Annotated[int, Range(0, 999_999_999)] = 0


@dataclass(frozen=True)
class Device:
    """A device node to make in the container."""

    path: str
    type: str
    major: _DeviceNumber = 0
    minor: _DeviceNumber = 0
    file_mode: _U32 = 0o666  # bits beyond the permissions are ignored
    uid: _Id = 0
    gid: _Id = 0

    def __post_init__(self) -> None:
        _absolute("path", self.path)
        _one_of("type", self.type, ("c", "b", "u", "p"))


@dataclass(frozen=True)
class SeccompArg:
    """A condition on one argument of a system call."""

    index: Annotated[int, Range(0, 5)]
    value: _U64
    op: str
    value_two: _U64 = 0


@dataclass(frozen=True)
class SeccompSyscall:
    """What happens at some system calls."""

    names: tuple[str, ...]
    action: str
    errno_ret: _U16 | None = None
    args: tuple[SeccompArg, ...] = ()


@dataclass(frozen=True)
class Seccomp:
    """The system call filter."""

    default_action: str
    default_errno_ret: _U16 | None = None
    architectures: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    syscalls: tuple[SeccompSyscall, ...] = ()

    REFUSED: ClassVar = ("listenerMetadata", "listenerPath")


@dataclass(frozen=True)
class Personality:
    """personality(2)"""

    domain: str

    DOMAINS: ClassVar = {"LINUX": 0, "LINUX32": 8}
    REFUSED: ClassVar = ("flags",)

    def __post_init__(self) -> None:
        _one_of("domain", self.domain, self.DOMAINS)


@dataclass(frozen=True)
class Linux:
    """The Linux part of a container's configuration."""

    uid_mappings: tuple[IDMapping, ...] = ()
    gid_mappings: tuple[IDMapping, ...] = ()
    sysctl: Mapping[str, str] = field(default_factory=dict)
    resources: Resources = field(default_factory=Resources)
    cgroups_path: str = ""
    namespaces: tuple[Namespace, ...] = ()
    devices: tuple[Device, ...] = ()
    seccomp: Seccomp | None = None
    rootfs_propagation: str = ""
    masked_paths: tuple[str, ...] = ()
    readonly_paths: tuple[str, ...] = ()
    personality: Personality | None = None
    time_offsets: Mapping[str, TimeOffset] = field(default_factory=dict)

    REFUSED: ClassVar = ("intelRdt", "memoryPolicy", "mountLabel", "netDevices")

    def __post_init__(self) -> None:
        for path in (*self.masked_paths, *self.readonly_paths):
            _absolute("masked or read-only path", path)
        _one_of("rootfsPropagation", self.rootfs_propagation.removeprefix("r"), _PROPAGATIONS)
        for clock in self.time_offsets:
            _one_of("clock in timeOffsets", clock, ("monotonic", "boottime"))
        self._check_namespaces()
        for name in self.sysctl:
            self._check_sysctl(name)

    def has(self, type_: NamespaceType) -> bool:
        """Return whether the container has a namespace of this type."""
        return any(namespace.type == type_ for namespace in self.namespaces)

    def host_uid(self, uid: int) -> int | None:
        """Return the VM's id of a user of the container; None where its user namespace does not map it."""
        if not self.has(NamespaceType.USER):
            return uid
        found = (each for each in self.uid_mappings if 0 <= uid - each.container_id < each.size)
        return next((each.host_id + uid - each.container_id for each in found), None)

    def _check_namespaces(self) -> None:
        types = [namespace.type for namespace in self.namespaces]
        if len(set(types)) != len(types):
            raise InvalidArgument("namespaces has a type twice")
        if not self.has(NamespaceType.MOUNT):
            raise Unsupported("namespaces without a mount namespace is not supported")
        if self.has(NamespaceType.USER):
            for name, mappings in (("uidMappings", self.uid_mappings), ("gidMappings", self.gid_mappings)):
                if not any(mapping.container_id == 0 and mapping.size for mapping in mappings):
                    raise InvalidArgument(f"{name} does not map id 0 of the new user namespace")
        elif self.uid_mappings or self.gid_mappings:
            raise InvalidArgument("uidMappings and gidMappings need a new user namespace")
        if self.time_offsets and not self.has(NamespaceType.TIME):
            raise InvalidArgument("timeOffsets needs a new time namespace")

    def _check_sysctl(self, name: str) -> None:
        group, _, rest = sysctl_path(name).partition("/")
        if group == "net":
            return
        if (group == "kernel" and rest in _IPC_SYSCTLS) or (group == "fs" and rest.startswith("mqueue/")):
            type_ = NamespaceType.IPC
        elif (group, rest) == ("kernel", "domainname"):
            type_ = NamespaceType.UTS
        else:
            raise Unsupported(f"sysctl {name!r} is not supported: it belongs to no namespace")
        if not self.has(type_):
            raise InvalidArgument(f"sysctl {name!r} needs a namespace of type {type_}")


def sysctl_path(name: str) -> str:
    """Return the path below /proc/sys of a sysctl; where "." separates, "/" is a dot, as in sysctl.d(5).

    Raises InvalidArgument for what is no name.
    """
    separator = next((character for character in name if character in "./"), "")
    path = name if separator == "/" else name.translate(str.maketrans("./", "/."))
    parts = path.split("/")
    if not _SYSCTL.fullmatch(name) or len(parts) < 2 or not {"", ".", ".."}.isdisjoint(parts):
        raise InvalidArgument(f"sysctl {name[:64]!r} is no name of a sysctl")
    return path


@dataclass(frozen=True)
class Hook:
    """A program that runs in the container; ``timeout`` in seconds, without ``env`` it has the process's."""

    path: str
    args: tuple[str, ...] = ()
    env: tuple[str, ...] | None = None
    timeout: Annotated[int, Range(1, 86_400)] | None = None

    def __post_init__(self) -> None:
        _absolute("path", self.path)
        for entry in self.env or ():
            if entry.find("=") < 1:
                raise InvalidArgument(f"env entry {entry[:64]!r} is not NAME=VALUE")


@dataclass(frozen=True)
class Hooks:
    """The hooks that run in the guest; the others are the host's."""

    start_container: tuple[Hook, ...] = ()


@dataclass(frozen=True)
class Spec:
    """config.json"""

    oci_version: str
    root: Root
    linux: Linux
    process: Process | None = None
    hostname: str = ""
    domainname: str = ""
    mounts: tuple[Mount, ...] = ()
    hooks: Hooks = Hooks()
    annotations: Mapping[str, str] = field(default_factory=dict)

    REFUSED: ClassVar = ("vm",)

    def __post_init__(self) -> None:
        if not _VERSION.fullmatch(self.oci_version):
            raise Unsupported(f"ociVersion {self.oci_version[:64]!r} is not supported: it is not 1.x.y")
        if (self.hostname or self.domainname) and not self.linux.has(NamespaceType.UTS):
            raise InvalidArgument("hostname and domainname need a uts namespace")
        for name, value in (("hostname", self.hostname), ("domainname", self.domainname)):
            if len(value.encode()) > 64:
                raise InvalidArgument(f"{name} is longer than 64 bytes")


def parse_spec(data: bytes) -> Spec:
    """Parse config.json. Raises InvalidArgument, or Unsupported for a field that is not honoured, naming it."""
    return schema.parse(Spec, data, what="config.json", max_bytes=MAX_SPEC_BYTES)


def parse_process(data: bytes) -> Process:
    """Parse the "process" object of a config.json. Raises as ``parse_spec`` does."""
    return schema.parse(Process, data, what="the process", max_bytes=MAX_SPEC_BYTES)


def parse_resources(data: bytes) -> Resources:
    """Parse the "resources" object of a config.json. Raises as ``parse_spec`` does."""
    return schema.parse(Resources, data, what="the resources", max_bytes=MAX_SPEC_BYTES)
