"""Device access of a container: the specification's rules as an eBPF program for the cgroup.

It owns the rules that every container has and the translation of rules to instructions (struct bpf_insn). Loading
and attaching is ``cgroups``'s; device nodes are ``rootfs``'s.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from katapy_agent.resources import DeviceRule

# What a container may use whatever its rules say, as in runc: making nodes (opening them is another matter), the
# devices that rootfs puts into /dev, and terminals of its own devpts.
DEFAULT_RULES: Final = (
    DeviceRule(True, "c", -1, -1, "m"),
    DeviceRule(True, "b", -1, -1, "m"),
    DeviceRule(True, "c", 1, 3),  # null
    DeviceRule(True, "c", 1, 5),  # zero
    DeviceRule(True, "c", 1, 7),  # full
    DeviceRule(True, "c", 1, 8),  # random
    DeviceRule(True, "c", 1, 9),  # urandom
    DeviceRule(True, "c", 5, 0),  # tty
    DeviceRule(True, "c", 5, 2),  # ptmx
    DeviceRule(True, "c", 136, -1),  # pts/*
)

# linux/bpf.h
_ACCESS: Final = {"m": 1, "r": 2, "w": 4}
_ANY_ACCESS: Final = 7
_ANY: Final = -1
_TYPE: Final = {"": _ANY, "a": _ANY, "b": 1, "c": 2, "u": 2}
_CONTEXT_ACCESS_TYPE, _CONTEXT_MAJOR, _CONTEXT_MINOR = 0, 4, 8

_LOAD_WORD: Final = 0x61
_MOV_IMMEDIATE: Final = 0xB7
_MOV_REGISTER: Final = 0xBF
_AND_IMMEDIATE: Final = 0x57
_SHIFT_RIGHT: Final = 0x77
_JUMP_IF_EQUAL: Final = 0x15
_JUMP_IF_NOT_EQUAL: Final = 0x55
_EXIT: Final = 0x95

_RESULT, _SCRATCH, _KIND, _WANTED, _MAJOR, _MINOR = 0, 1, 2, 3, 4, 5


def assemble(rules: Sequence[DeviceRule]) -> bytes:
    """Return the program (BPF_PROG_TYPE_CGROUP_DEVICE) that answers 1 where the rules, then the defaults, allow.

    Each of the accesses that are asked for at once is decided by the last rule that matches it, and all must be
    allowed; what no rule matches is denied. So the rules are walked from the last, striking out what is allowed.
    """
    program = [
        _instruction(_LOAD_WORD, _KIND, source=_SCRATCH, offset=_CONTEXT_ACCESS_TYPE),
        _instruction(_LOAD_WORD, _MAJOR, source=_SCRATCH, offset=_CONTEXT_MAJOR),
        _instruction(_LOAD_WORD, _MINOR, source=_SCRATCH, offset=_CONTEXT_MINOR),
        # access << 16 | type
        _instruction(_MOV_REGISTER, _WANTED, source=_KIND),
        _instruction(_SHIFT_RIGHT, _WANTED, immediate=16),
        _instruction(_AND_IMMEDIATE, _KIND, immediate=0xFFFF),
    ]
    for rule in reversed([*rules, *DEFAULT_RULES]):
        program += _block(rule)
    return b"".join([*program, *_answer(0)])


def _block(rule: DeviceRule) -> list[bytes]:
    access = _mask(rule)
    if rule.allow:
        verdict = [
            _instruction(_AND_IMMEDIATE, _WANTED, immediate=_ANY_ACCESS & ~access),
            _instruction(_JUMP_IF_NOT_EQUAL, _WANTED, immediate=0, offset=2),
            *_answer(1),
        ]
    else:
        verdict = [
            _instruction(_MOV_REGISTER, _SCRATCH, source=_WANTED),
            _instruction(_AND_IMMEDIATE, _SCRATCH, immediate=access),
            _instruction(_JUMP_IF_EQUAL, _SCRATCH, immediate=0, offset=2),
            *_answer(0),
        ]
    conditions = [(_KIND, _TYPE[rule.type]), (_MAJOR, rule.major), (_MINOR, rule.minor)]
    narrowing = [(register, value) for register, value in conditions if value != _ANY]
    guards = [
        _instruction(_JUMP_IF_NOT_EQUAL, register, immediate=value, offset=len(verdict) + len(narrowing) - index - 1)
        for index, (register, value) in enumerate(narrowing)
    ]
    return guards + verdict


def _mask(rule: DeviceRule) -> int:
    return sum(_ACCESS[letter] for letter in set(rule.access or "rwm"))


def _answer(value: int) -> list[bytes]:
    return [_instruction(_MOV_IMMEDIATE, _RESULT, immediate=value), _instruction(_EXIT)]


def _instruction(opcode: int, destination: int = 0, *, source: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    return struct.pack("<BBhi", opcode, source << 4 | destination, offset, immediate)
