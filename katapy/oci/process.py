"""The ``process`` object of config.json (runtime-spec 1.2, config.md, "Process"), for `create` and for `exec`.

A process keeps the document that it was parsed from: the guest agent gets that, not a copy that lost what this
version does not know; only capabilities that Linux does not have are taken out. Names of users are not looked up: like
runc, katapy takes numbers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

from katapy.errors import InvalidArgument
from katapy.jsonfile import check, dump, parse, shown
from katapy.oci.features import CAPABILITIES
from katapy.oci.node import (
    Node,
    absolute_path,
    array,
    boolean,
    identity,
    integer,
    matching,
    one_of,
    text,
    uint16,
    uint64,
)

RLIMITS: Final = (
    *("RLIMIT_AS", "RLIMIT_CORE", "RLIMIT_CPU", "RLIMIT_DATA", "RLIMIT_FSIZE", "RLIMIT_LOCKS", "RLIMIT_MEMLOCK"),
    *("RLIMIT_MSGQUEUE", "RLIMIT_NICE", "RLIMIT_NOFILE", "RLIMIT_NPROC", "RLIMIT_RSS", "RLIMIT_RTPRIO"),
    *("RLIMIT_RTTIME", "RLIMIT_SIGPENDING", "RLIMIT_STACK"),
)
_POLICIES: Final = [f"SCHED_{name}" for name in ("OTHER", "FIFO", "RR", "BATCH", "ISO", "IDLE", "DEADLINE")]
_IO_CLASSES: Final = [f"IOPRIO_CLASS_{name}" for name in ("RT", "BE", "IDLE")]
_CAPABILITY: Final = matching("CAP_[A-Z0-9_]{1,32}", "a capability (CAP_...)")
# The kernel's NGROUPS_MAX.
_GROUPS: Final = array(identity, at_most=65_536)


class ConsoleSize(NamedTuple):
    """Size of the terminal in characters; 0 is left to the kernel."""

    height: int
    width: int


class User(NamedTuple):
    """Who the process runs as, in the container's user namespace; ``umask`` of None is the default."""

    uid: int
    gid: int
    umask: int | None
    additional_gids: tuple[int, ...]


class Capabilities(NamedTuple):
    """The five capability sets."""

    bounding: tuple[str, ...]
    effective: tuple[str, ...]
    inheritable: tuple[str, ...]
    permitted: tuple[str, ...]
    ambient: tuple[str, ...]

    @property
    def names(self) -> set[str]:
        """What is in any of them."""
        return {*self.bounding, *self.effective, *self.inheritable, *self.permitted, *self.ambient}


class Rlimit(NamedTuple):
    """A resource limit."""

    type: str
    soft: int
    hard: int


class Scheduler(NamedTuple):
    """Scheduling policy; times in nanoseconds."""

    policy: str
    nice: int
    priority: int
    flags: tuple[str, ...]
    runtime: int
    deadline: int
    period: int


class IoPriority(NamedTuple):
    """I/O scheduling class and priority."""

    io_class: str
    priority: int


@dataclass(frozen=True)
class ProcessSpec:
    """A process to run in a container."""

    terminal: bool
    console_size: ConsoleSize | None
    user: User
    args: tuple[str, ...]
    env: tuple[str, ...]
    cwd: str
    capabilities: Capabilities | None
    rlimits: tuple[Rlimit, ...]
    no_new_privileges: bool
    apparmor_profile: str
    selinux_label: str
    oom_score_adj: int | None
    scheduler: Scheduler | None
    io_priority: IoPriority | None
    document: dict[str, Any] = field(repr=False)

    @property
    def unknown_capabilities(self) -> tuple[str, ...]:
        """The names of capabilities that Linux does not have, which nobody gets: a warning, not an error."""
        return tuple(sorted(self.capabilities.names - set(CAPABILITIES))) if self.capabilities else ()

    def to_guest(self) -> bytes:
        """Return the ``process`` object as the guest agent's ExecProcess takes it."""
        return dump(self.document)

    def with_limits(self, limits: Sequence[Rlimit]) -> ProcessSpec:
        """Return this process with those of ``limits`` that it does not name itself."""
        if not limits:
            return self
        named = {limit.type for limit in self.rlimits}
        rlimits = (*self.rlimits, *(limit for limit in limits if limit.type not in named))
        document = {**self.document, "rlimits": [limit._asdict() for limit in rlimits]}
        return replace(self, rlimits=rlimits, document=document)

    def with_exec_flags(
        self,
        args: Sequence[str],
        *,
        env: Sequence[str] = (),
        cwd: str | None = None,
        user: str | None = None,
        terminal: bool = False,
        capabilities: Sequence[str] = (),
        additional_gids: Sequence[int] = (),
        no_new_privileges: bool | None = None,
        console_size: tuple[int, int] | None = None,
    ) -> ProcessSpec:
        """Return the process of `exec`: this one, the container's own, changed by the flags as runc changes it.

        ``args`` replaces, ``env`` (``KEY=VALUE``), ``capabilities`` and ``additional_gids`` add, ``user`` is
        ``uid[:gid]``, ``console_size`` is columns and rows; None leaves what the container has. Raises InvalidArgument.
        """
        document = {**self.document, "args": list(args), "terminal": terminal}
        # A later value of a variable wins in the guest, so the container's own is dropped here.
        given = {entry.partition("=")[0] for entry in env}
        document["env"] = [entry for entry in self.env if entry.partition("=")[0] not in given] + list(env)
        if cwd is not None:
            document["cwd"] = cwd
        document["user"] = _merge_user(document.get("user") or {}, user, additional_gids)
        if capabilities:
            document["capabilities"] = _merge_capabilities(document.get("capabilities") or {}, capabilities)
        if no_new_privileges is not None:
            document["noNewPrivileges"] = no_new_privileges
        if console_size is not None:
            document["consoleSize"] = {"width": console_size[0], "height": console_size[1]}
        check(document, what="exec")
        return process(Node(document, "exec"))


def parse_process(data: bytes, *, what: str) -> ProcessSpec:
    """Parse a ``process`` object, the form of `exec --process FILE`. ``what`` names it in errors.

    Raises InvalidArgument.
    """
    return process(Node(parse(data, what=what), what))


def process(node: Node) -> ProcessSpec:
    """Parse the ``process`` object of a config.json."""
    return ProcessSpec(
        terminal=node.get("terminal", boolean, False),
        console_size=node.find("consoleSize", _console_size),
        user=node.get("user", _user, User(0, 0, None, ())),
        args=node.need("args", _args),
        env=node.each("env", _variable),
        cwd=node.need("cwd", absolute_path),
        capabilities=node.find("capabilities", _capabilities),
        rlimits=node.get("rlimits", _rlimits, ()),
        no_new_privileges=node.get("noNewPrivileges", boolean, False),
        apparmor_profile=node.get("apparmorProfile", text, ""),
        selinux_label=node.get("selinuxLabel", text, ""),
        oom_score_adj=node.find("oomScoreAdj", integer(-1000, 1000)),
        scheduler=node.find("scheduler", _scheduler),
        io_priority=node.find("ioPriority", _io_priority),
        document=_without_unknown(node.members()),
    )


def _args(node: Node) -> tuple[str, ...]:
    args = array(text)(node)
    if not args:
        node.fail("is empty")
    if not args[0]:
        node.items()[0].fail("is empty")
    return args


def _variable(node: Node) -> str:
    entry = text(node)
    name, equals, _ = entry.partition("=")
    if not (name and equals):
        node.fail(f"{shown(entry)} is not KEY=VALUE")
    return entry


def _console_size(node: Node) -> ConsoleSize:
    return ConsoleSize(node.get("height", uint16, 0), node.get("width", uint16, 0))


def _user(node: Node) -> User:
    return User(
        uid=node.get("uid", identity, 0),
        gid=node.get("gid", identity, 0),
        umask=node.find("umask", integer(0, 0o777)),
        additional_gids=node.get("additionalGids", _GROUPS, ()),
    )


def _capabilities(node: Node) -> Capabilities:
    return Capabilities(
        bounding=node.each("bounding", _CAPABILITY),
        effective=node.each("effective", _CAPABILITY),
        inheritable=node.each("inheritable", _CAPABILITY),
        permitted=node.each("permitted", _CAPABILITY),
        ambient=node.each("ambient", _CAPABILITY),
    )


def _without_unknown(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document without the capabilities that Linux does not have (config.md, "Linux Process")."""
    sets = document.get("capabilities") or {}
    known = {
        name: [each for each in value if each in CAPABILITIES] if isinstance(value, list) else value
        for name, value in sets.items()
    }
    return document if known == sets else {**document, "capabilities": known}


def _rlimits(node: Node) -> tuple[Rlimit, ...]:
    found: dict[str, Rlimit] = {}
    for item in node.items():
        limit = Rlimit(item.need("type", one_of(RLIMITS)), item.need("soft", uint64), item.need("hard", uint64))
        if limit.type in found:
            item.fail(f"{limit.type} is given twice")
        if limit.soft > limit.hard:
            item.fail(f"soft {limit.soft} is above hard {limit.hard}")
        found[limit.type] = limit
    return tuple(found.values())


def _scheduler(node: Node) -> Scheduler:
    return Scheduler(
        policy=node.need("policy", one_of(_POLICIES)),
        nice=node.get("nice", integer(-20, 19), 0),
        priority=node.get("priority", integer(0, 99), 0),
        flags=node.each("flags", matching("SCHED_FLAG_[A-Z_]{1,32}", "a scheduler flag (SCHED_FLAG_...)")),
        runtime=node.get("runtime", uint64, 0),
        deadline=node.get("deadline", uint64, 0),
        period=node.get("period", uint64, 0),
    )


def _io_priority(node: Node) -> IoPriority:
    return IoPriority(node.need("class", one_of(_IO_CLASSES)), node.get("priority", integer(0, 7), 0))


def _merge_user(base: dict[str, Any], user: str | None, additional_gids: Sequence[int]) -> dict[str, Any]:
    merged = {**base, "additionalGids": [*(base.get("additionalGids") or ()), *additional_gids]}
    if user is not None:
        # Eleven digits hold more than any id; the range is checked with the document.
        match = re.fullmatch(r"(\d{1,11})(?::(\d{1,11}))?", user, re.ASCII)
        if match is None:
            raise InvalidArgument(f"exec: user {shown(user)} is not uid[:gid], in numbers")
        merged["uid"] = int(match[1])
        if match[2]:
            merged["gid"] = int(match[2])
    return merged


def _merge_capabilities(base: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    # Not inheritable: that would hand them to every program with file capabilities (CVE-2022-29162); and a
    # capability that is not inheritable cannot be ambient.
    added = {key: [*(base.get(key) or ()), *names] for key in ("bounding", "effective", "permitted")}
    return {**base, **{key: list(dict.fromkeys(value)) for key, value in added.items()}}
