"""Leads what connects to the loopback of a pod's network namespace to a listener, whatever the port.

Engines forward a port by dialling it there, and in a VM's pod nobody listens. A BPF program sees every lookup of a
listening socket in the namespace (BPF_PROG_TYPE_SK_LOOKUP, Linux 5.9 and later; the kernel's bpf/prog_sk_lookup.rst),
and names ours for TCP to 127.0.0.1 and ::1, one for each family; all other lookups take their usual way. The program,
its map with the listeners and its link to the namespace last as long as the link's descriptor: with a process that is
killed the kernel removes them, so nothing is left to clean up.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from contextlib import ExitStack
from typing import Final, NamedTuple

from katapy import linux

_BACKLOG: Final = 64
# Each family's loopback, its key in the map, and its level and option for a bind to an address that is not there yet.
_FAMILIES: Final = (
    (socket.AF_INET, "127.0.0.1", 0, socket.IPPROTO_IP, 15),  # IP_FREEBIND
    (socket.AF_INET6, "::1", 1, socket.IPPROTO_IPV6, 78),  # IPV6_FREEBIND
)

# linux/bpf.h
_BPF_MAP_CREATE, _BPF_MAP_UPDATE_ELEM, _BPF_PROG_LOAD, _BPF_LINK_CREATE = 0, 2, 5, 28
_BPF_MAP_TYPE_SOCKMAP, _BPF_PROG_TYPE_SK_LOOKUP, _BPF_SK_LOOKUP = 15, 30, 36
_MAP_CREATE: Final = struct.Struct("=5I8x16s")
_MAP_UPDATE: Final = struct.Struct("=I4x3Q")
_PROG_LOAD: Final = struct.Struct("=2I2Q2IQ2I16s2I")
_LINK_CREATE: Final = struct.Struct("=4I")
_NAME: Final = b"katapy_loopback"  # as bpftool shows it

# struct bpf_sk_lookup
_PROTOCOL, _LOCAL_IP4, _LOCAL_IP6 = 12, 40, 44

# Instructions and helpers of BPF.
_INSTRUCTION: Final = struct.Struct("=BBhi")
_LOAD, _STORE_IMMEDIATE, _LOAD_MAP = 0x61, 0x62, 0x18
_ADD_IMMEDIATE, _SET_IMMEDIATE, _SET_REGISTER = 0x07, 0xB7, 0xBF
_JUMP_EQUAL, _JUMP_UNEQUAL, _CALL, _EXIT = 0x15, 0x55, 0x85, 0x95
_PSEUDO_MAP_FD: Final = 1
_MAP_LOOKUP_ELEM, _SK_RELEASE, _SK_ASSIGN = 1, 86, 124
_SK_PASS: Final = 1
_R0, _R1, _R2, _R3, _CONTEXT, _SOCKET, _FRAME = 0, 1, 2, 3, 6, 7, 10
_KEY: Final = -4  # in the frame


class _Step(NamedTuple):
    """One instruction; ``to`` is the label that a jump leads to."""

    code: int
    register: int = 0
    source: int = 0
    offset: int = 0
    value: int = 0
    to: str = ""


def assemble(sockets: int) -> bytes:
    """Return the program, with the descriptor of its map. In C::

        u32 key = 0;
        if (ctx->protocol != IPPROTO_TCP)
            return SK_PASS;
        if (ctx->local_ip4 != LOOPBACK4) {
            if (ctx->local_ip6 != LOOPBACK6)
                return SK_PASS;
            key = 1;
        }
        struct bpf_sock *sk = bpf_map_lookup_elem(&sockets, &key);
        if (sk) {
            bpf_sk_assign(ctx, sk, 0);
            bpf_sk_release(sk);
        }
        return SK_PASS;

    An address of the other family reads as zeros.
    """
    (ip4,) = struct.unpack("=I", socket.inet_pton(socket.AF_INET, "127.0.0.1"))
    ip6 = struct.unpack("=4I", socket.inet_pton(socket.AF_INET6, "::1"))
    steps: list[_Step | str] = [
        _Step(_SET_REGISTER, _CONTEXT, _R1),
        _Step(_STORE_IMMEDIATE, _FRAME, offset=_KEY, value=0),
        _Step(_LOAD, _R2, _CONTEXT, _PROTOCOL),
        _Step(_JUMP_UNEQUAL, _R2, value=socket.IPPROTO_TCP, to="pass"),
        _Step(_LOAD, _R2, _CONTEXT, _LOCAL_IP4),
        _Step(_JUMP_EQUAL, _R2, value=ip4, to="assign"),
    ]
    for number, word in enumerate(ip6):
        steps += [
            _Step(_LOAD, _R2, _CONTEXT, _LOCAL_IP6 + 4 * number),
            _Step(_JUMP_UNEQUAL, _R2, value=word, to="pass"),
        ]
    steps += [
        _Step(_STORE_IMMEDIATE, _FRAME, offset=_KEY, value=1),
        "assign",
        _Step(_SET_REGISTER, _R2, _FRAME),
        _Step(_ADD_IMMEDIATE, _R2, value=_KEY),
        # A 64-bit constant: two instructions' place.
        _Step(_LOAD_MAP, _R1, _PSEUDO_MAP_FD, value=sockets),
        _Step(0),
        _Step(_CALL, value=_MAP_LOOKUP_ELEM),
        _Step(_JUMP_EQUAL, _R0, value=0, to="pass"),
        _Step(_SET_REGISTER, _SOCKET, _R0),
        _Step(_SET_REGISTER, _R1, _CONTEXT),
        _Step(_SET_REGISTER, _R2, _SOCKET),
        _Step(_SET_IMMEDIATE, _R3, value=0),
        _Step(_CALL, value=_SK_ASSIGN),
        _Step(_SET_REGISTER, _R1, _SOCKET),
        _Step(_CALL, value=_SK_RELEASE),
        "pass",
        _Step(_SET_IMMEDIATE, _R0, value=_SK_PASS),
        _Step(_EXIT),
    ]
    return _encode(steps)


def _encode(steps: list[_Step | str]) -> bytes:
    """Return instructions as the kernel wants them; a text among the steps is the label of the one after it."""
    places: dict[str, int] = {}
    instructions: list[_Step] = []
    for step in steps:
        if isinstance(step, str):
            places[step] = len(instructions)
        else:
            instructions.append(step)
    encoded = b""
    for number, step in enumerate(instructions):
        offset = places[step.to] - number - 1 if step.to else step.offset
        encoded += _INSTRUCTION.pack(step.code, step.source << 4 | step.register, offset, step.value)
    return encoded


def lead(stack: ExitStack) -> list[int]:
    """Lead connections to the loopback of this thread's network namespace to listeners, until the link is closed.

    Returns the descriptors of the link and of a listener for each family, which ``stack`` closes. Raises OSError; see
    ``reason``.
    """
    with ExitStack() as own:

        def keep(fd: int) -> int:
            own.callback(os.close, fd)
            return fd

        sockets = keep(_create_map())
        listeners = []
        for family, address, key, level, option in _FAMILIES:
            try:
                listener = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            except OSError as error:
                if error.errno == errno.EAFNOSUPPORT:  # a kernel without IPv6
                    continue
                raise
            # Its place is of no use to anybody, and need not exist: the namespace's loopback may come up later.
            listener.setsockopt(level, option, 1)
            listener.bind((address, 0))
            listener.listen(_BACKLOG)
            _put(sockets, key, listener.fileno())
            listeners.append(listener.fileno())
        program = keep(_load(assemble(sockets)))
        namespace = keep(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        attributes = _LINK_CREATE.pack(program, namespace, _BPF_SK_LOOKUP, 0)
        link = _do("BPF link to a network namespace", _BPF_LINK_CREATE, attributes)
    stack.callback(os.close, link)
    return [link, *listeners]


def reason(error: OSError) -> str:
    """Return why ``lead`` has failed."""
    return f"cannot make a {error.filename or 'listener'}: {(error.strerror or str(error)).lower()}"


def _create_map() -> int:
    attributes = _MAP_CREATE.pack(_BPF_MAP_TYPE_SOCKMAP, 4, 4, len(_FAMILIES), 0, _NAME)
    return _do("BPF map of sockets", _BPF_MAP_CREATE, attributes)


def _put(sockets: int, key: int, listener: int) -> None:
    index, value = ctypes.c_uint32(key), ctypes.c_uint32(listener)
    attributes = _MAP_UPDATE.pack(sockets, ctypes.addressof(index), ctypes.addressof(value), 0)
    _do("BPF map of a listener", _BPF_MAP_UPDATE_ELEM, attributes)


def _load(program: bytes) -> int:
    instructions = ctypes.create_string_buffer(program, len(program))
    license_ = ctypes.create_string_buffer(b"Apache-2.0")
    count = len(program) // _INSTRUCTION.size
    pointers = ctypes.addressof(instructions), ctypes.addressof(license_)
    attributes = _PROG_LOAD.pack(_BPF_PROG_TYPE_SK_LOOKUP, count, *pointers, 0, 0, 0, 0, 0, _NAME, 0, _BPF_SK_LOOKUP)
    return _do("BPF program for socket lookups", _BPF_PROG_LOAD, attributes)


def _do(what: str, command: int, attributes: bytes) -> int:
    try:
        return linux.bpf(command, attributes)
    except OSError as error:
        raise OSError(error.errno, error.strerror, what) from error
