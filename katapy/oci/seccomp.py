"""The ``linux.seccomp`` section of config.json (runtime-spec 1.2, config-linux.md, "Seccomp").

The filter is compiled in the guest; the host checks its form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from katapy.oci.node import Node, absolute_path, integer, matching, one_of, required_text, text, uint64

_action: Final = matching("SCMP_ACT_[A-Z_]{1,32}", "a seccomp action (SCMP_ACT_...)")
_architecture: Final = matching("SCMP_ARCH_[A-Z0-9_]{1,32}", "a seccomp architecture (SCMP_ARCH_...)")
_flag: Final = matching("SECCOMP_FILTER_FLAG_[A-Z_]{1,48}", "a seccomp flag (SECCOMP_FILTER_FLAG_...)")
OPERATORS: Final = tuple(f"SCMP_CMP_{name}" for name in ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"))
_operator: Final = one_of(OPERATORS)
# MAX_ERRNO: what a system call can return.
_errno: Final = integer(0, 4095)


@dataclass(frozen=True)
class Argument:
    """A condition on one argument of a system call."""

    index: int
    value: int
    value_two: int
    operator: str


class Rule(NamedTuple):
    """What happens to some system calls, where all arguments match."""

    names: tuple[str, ...]
    action: str
    errno: int | None
    arguments: tuple[Argument, ...]


class Seccomp(NamedTuple):
    """A seccomp filter."""

    default_action: str
    default_errno: int | None
    architectures: tuple[str, ...]
    flags: tuple[str, ...]
    listener_path: str | None
    listener_metadata: str
    rules: tuple[Rule, ...]


def parse_seccomp(node: Node) -> Seccomp:
    """Parse ``linux.seccomp``."""
    return Seccomp(
        default_action=node.need("defaultAction", _action),
        default_errno=node.find("defaultErrnoRet", _errno),
        architectures=node.each("architectures", _architecture),
        flags=node.each("flags", _flag),
        listener_path=node.find("listenerPath", absolute_path),
        listener_metadata=node.get("listenerMetadata", text, ""),
        rules=node.each("syscalls", _rule),
    )


def _rule(node: Node) -> Rule:
    names = node.each("names", required_text)
    if not names:
        node.child("names").fail("is empty")
    return Rule(names, node.need("action", _action), node.find("errnoRet", _errno), node.each("args", _argument))


def _argument(node: Node) -> Argument:
    return Argument(
        node.need("index", integer(0, 5)),
        node.need("value", uint64),
        node.get("valueTwo", uint64, 0),
        node.need("op", _operator),
    )
