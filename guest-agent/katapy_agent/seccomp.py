"""Seccomp filters: the specification's profile, compiled by libseccomp to the program that the kernel takes.

Compiling and loading are apart: the agent compiles (and remembers the last few, for a pod's containers share theirs),
the container's process loads with one system call, so that a narrow filter cannot cut down what surrounds its loading.
As in runc, unknown system call names are skipped: a profile names those of many kernels and architectures. And as in
runc, calls newer than all that a profile names do not exist for the program, whatever libseccomp makes of them.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import struct
from typing import Final

from katapy_agent import linux
from katapy_agent.config import Seccomp, SeccompSyscall
from katapy_agent.errors import Internal, InvalidArgument, Unsupported

# seccomp.h of libseccomp. An action whose low bits carry a number, and what it is when the profile gives none.
_ACTIONS: Final = {
    "SCMP_ACT_KILL": 0x00000000,
    "SCMP_ACT_KILL_THREAD": 0x00000000,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
    "SCMP_ACT_TRAP": 0x00030000,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_ALLOW": 0x7FFF0000,
}
_ACTIONS_WITH_NUMBER: Final = {"SCMP_ACT_ERRNO": 0x00050000, "SCMP_ACT_TRACE": 0x7FF00000}
_OPERATORS: Final = {
    "SCMP_CMP_NE": 1,
    "SCMP_CMP_LT": 2,
    "SCMP_CMP_LE": 3,
    "SCMP_CMP_EQ": 4,
    "SCMP_CMP_GE": 5,
    "SCMP_CMP_GT": 6,
    "SCMP_CMP_MASKED_EQ": 7,
}
_FLAGS: Final = {
    "SECCOMP_FILTER_FLAG_TSYNC": linux.SECCOMP_FILTER_FLAG_TSYNC,
    "SECCOMP_FILTER_FLAG_LOG": linux.SECCOMP_FILTER_FLAG_LOG,
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW": linux.SECCOMP_FILTER_FLAG_SPEC_ALLOW,
}
_NR_ERROR: Final = -1
_ERRNO: Final = _ACTIONS_WITH_NUMBER["SCMP_ACT_ERRNO"]

# linux/filter.h, and where struct seccomp_data has the number of the system call and the architecture
_LOAD: Final = 0x20
_JUMP_IF_EQUAL: Final = 0x15
_JUMP_IF_GREATER: Final = 0x25
_JUMP_IF_NOT_LESS: Final = 0x35
_RETURN: Final = 0x06
_NUMBER, _ARCHITECTURE = 0, 4
# From here on are the system calls of x32, whose architecture is that of x86-64.
_X32: Final = 0x40000000


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_arch_resolve_name.restype = ctypes.c_uint32
    library.seccomp_arch_native.restype = ctypes.c_uint32
    return library


@functools.lru_cache(maxsize=8)
def compile_filter(profile: Seccomp) -> bytes:
    """Return the program for a profile, an array of struct sock_filter.

    Raises InvalidArgument or Unsupported for an unknown action, operator or architecture, naming it.
    """
    library = _library()
    default = _action(profile.default_action, profile.default_errno_ret)
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(default)))
    if not context:
        raise InvalidArgument(f"seccomp defaultAction {profile.default_action!r} is refused by libseccomp")
    try:
        # The native architecture is there from the start.
        architectures = {int(library.seccomp_arch_native())}
        for name in profile.architectures:
            architectures.add(_add_architecture(library, context, name))
        for rule in profile.syscalls:
            _add_rule(library, context, rule, default)
        program = _export(library, context)
        if default & ~0xFFFF == _ERRNO and default != _ERRNO | errno.ENOSYS:
            program = _assemble_stub(_newest_calls(library, profile, architectures)) + program
        return program
    finally:
        library.seccomp_release(context)


def filter_flags(profile: Seccomp) -> int:
    """Return the SECCOMP_FILTER_FLAG_* bits of a profile. Raises Unsupported for one that katapy does not know."""
    for name in profile.flags:
        if name not in _FLAGS:
            raise Unsupported(f"seccomp flag {name[:64]!r} is not supported")
    return sum(_FLAGS[name] for name in set(profile.flags))


def _action(name: str, number: int | None) -> int:
    if name in _ACTIONS_WITH_NUMBER:
        return _ACTIONS_WITH_NUMBER[name] | (errno.EPERM if number is None else number)
    if name not in _ACTIONS:
        raise Unsupported(f"seccomp action {name[:64]!r} is not supported")
    if number:
        raise InvalidArgument(f"seccomp action {name} takes no errnoRet")
    return _ACTIONS[name]


def _add_architecture(library: ctypes.CDLL, context: ctypes.c_void_p, name: str) -> int:
    token = library.seccomp_arch_resolve_name(name.removeprefix("SCMP_ARCH_").lower().encode())
    if not token:
        raise InvalidArgument(f"seccomp architecture {name[:64]!r} is unknown")
    _check(library.seccomp_arch_add(context, ctypes.c_uint32(token)), f"architecture {name}", errno.EEXIST)
    return int(token)


def _add_rule(library: ctypes.CDLL, context: ctypes.c_void_p, rule: SeccompSyscall, default: int) -> None:
    action = _action(rule.action, rule.errno_ret)
    comparisons = [_comparison(arg.index, arg.op, arg.value, arg.value_two) for arg in rule.args]
    if action == default:
        return
    indices = [arg.index for arg in rule.args]
    # Conditions on different arguments must all hold; several on the same one, as in runc, are alternatives.
    alternatives = [comparisons] if len(set(indices)) == len(indices) else [[each] for each in comparisons]
    for name in rule.names:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number == _NR_ERROR:
            continue
        for each in alternatives:
            array = (_Comparison * len(each))(*each)
            code = library.seccomp_rule_add_array(context, ctypes.c_uint32(action), number, len(each), array)
            _check(code, f"rule for {name}")


def _newest_calls(library: ctypes.CDLL, profile: Seccomp, architectures: set[int]) -> dict[int, int]:
    """Return the highest number of a system call that the profile names, for each architecture that has one."""
    names = {name.encode() for rule in profile.syscalls for name in rule.names}
    resolve = library.seccomp_syscall_resolve_name_arch
    newest = {
        token: max((resolve(ctypes.c_uint32(token), name) for name in names), default=-1) for token in architectures
    }
    return {token: number for token, number in newest.items() if number >= 0}


def _assemble_stub(newest: dict[int, int]) -> bytes:
    """Return instructions, to be put before a filter, that answer ENOSYS to all calls above these numbers.

    A program, or its C library, then falls back on older calls. At the EPERM of the filter it would give up.
    """
    stub = [_instruction(_LOAD, _ARCHITECTURE)]
    for left, (token, number) in zip(range(len(newest) - 1, -1, -1), newest.items(), strict=True):
        stub += [
            _instruction(_JUMP_IF_EQUAL, token, otherwise=4),
            _instruction(_LOAD, _NUMBER),
            _instruction(_JUMP_IF_NOT_LESS, _X32, then=2 + 5 * left),
            _instruction(_JUMP_IF_GREATER, number, otherwise=1 + 5 * left),
            _instruction(_RETURN, _ERRNO | errno.ENOSYS),
        ]
    return b"".join(stub)


def _instruction(code: int, value: int, *, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("=HBBI", code, then, otherwise, value)


def _comparison(index: int, op: str, value: int, value_two: int) -> _Comparison:
    if op not in _OPERATORS:
        raise InvalidArgument(f"seccomp operator {op[:64]!r} is unknown")
    return _Comparison(index, _OPERATORS[op], value, value_two)


def _check(code: int, what: str, *accepted: int) -> None:
    if code < 0 and -code not in accepted:
        raise InvalidArgument(f"seccomp {what} is refused by libseccomp: {os.strerror(-code).lower()}")


def _export(library: ctypes.CDLL, context: ctypes.c_void_p) -> bytes:
    memory = os.memfd_create("seccomp", os.MFD_CLOEXEC)
    try:
        if library.seccomp_export_bpf(context, memory) < 0:
            raise Internal("cannot compile the seccomp profile")
        return os.pread(memory, os.fstat(memory).st_size, 0)
    finally:
        os.close(memory)
