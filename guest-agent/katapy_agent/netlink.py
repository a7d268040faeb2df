"""A socket to the kernel's links, addresses, routes and neighbours (rtnetlink(7)), and the form of its messages.

Like ``linux`` it knows the kernel and nothing of pods. Every function raises OSError: with the kernel's errno, and the
kernel's own words where it has some to say; with EBADMSG where the bytes are no netlink messages. Constants carry the
kernel's names (linux/netlink.h, linux/rtnetlink.h).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

RTM_NEWLINK: Final = 16
RTM_GETLINK: Final = 18
RTM_NEWADDR: Final = 20
RTM_DELADDR: Final = 21
RTM_GETADDR: Final = 22
RTM_NEWROUTE: Final = 24
RTM_DELROUTE: Final = 25
RTM_GETROUTE: Final = 26
RTM_NEWNEIGH: Final = 28

NLM_F_REPLACE: Final = 0x100
NLM_F_CREATE: Final = 0x400
NLM_F_APPEND: Final = 0x800

RTMGRP_LINK: Final = 1

_NLM_F_REQUEST: Final = 0x01
_NLM_F_ACK: Final = 0x04
_NLM_F_DUMP_INTR: Final = 0x10
_NLM_F_DUMP: Final = 0x300
_NLM_F_CAPPED: Final = 0x100
_NLM_F_ACK_TLVS: Final = 0x200
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_NLMSGERR_ATTR_MSG: Final = 1
_SOL_NETLINK: Final = 270
_NETLINK_EXT_ACK: Final = 11
_NLA_TYPE_MASK: Final = 0x3FFF

_HEADER: Final = struct.Struct("=IHHII")  # struct nlmsghdr
_ATTRIBUTE: Final = struct.Struct("=HH")  # struct rtattr
_BUFFER: Final = 32 << 10  # the kernel fills no more at once (af_netlink.c)
_DUMP_MAX: Final = 16 << 20
_DUMPS_MAX: Final = 16
_STRANGERS_MAX: Final = 1024
_ANSWER_SECONDS: Final = 10.0
# Each answer takes up to a KiB of a receive buffer of some 200.
_BATCH: Final = 32


class Message(NamedTuple):
    """A netlink message without its header."""

    kind: int
    flags: int
    sequence: int
    body: bytes


class Request(NamedTuple):
    """What to send: RTM_*, the fixed part with the attributes, NLM_F_*."""

    kind: int
    body: bytes
    flags: int = 0


class Socket:
    """A netlink socket; ``groups`` (RTMGRP_*) is what the kernel shall tell of by itself. A context manager."""

    def __init__(self, groups: int = 0) -> None:
        self._sequence = 0
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        try:
            self._socket.settimeout(_ANSWER_SECONDS)
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
            if groups:
                self._socket.bind((0, groups))
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *_error: object) -> None:
        self._socket.close()

    def request(self, kind: int, body: bytes, flags: int = 0) -> None:
        """Send one request and wait until it is done."""
        (error,) = self.request_all([Request(kind, body, flags)])
        if error:
            raise error

    def request_all(self, requests: Sequence[Request]) -> list[OSError | None]:
        """Send requests, many at a time, and return the outcome of each; one that fails does not stop the rest."""
        outcomes: list[OSError | None] = []
        for start in range(0, len(requests), _BATCH):
            outcomes += self._batch(requests[start : start + _BATCH])
        return outcomes

    def dump(self, kind: int, body: bytes) -> list[bytes]:
        """Return all objects that the RTM_GET* ``kind`` asks for, each the body of its message."""
        for _ in range(_DUMPS_MAX):
            found = self._dump(kind, body)
            if found is not None:
                return found
        raise OSError(errno.EAGAIN, "what is listed changes all the time")

    def wait(self, seconds: float) -> bool:
        """Wait until the kernel tells of something in this socket's groups; False where it does not in ``seconds``.

        What it tells may have been too much to keep: look for yourself.
        """
        if seconds <= 0:
            return False
        self._socket.settimeout(seconds)
        try:
            self._receive()
        except TimeoutError:
            return False
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
        return True

    def _batch(self, requests: Sequence[Request]) -> list[OSError | None]:
        first = self._sequence + 1
        parts = [self._message(each.kind, each.body, each.flags | _NLM_F_ACK) for each in requests]
        self._socket.send(b"".join(parts))
        outcomes: dict[int, OSError | None] = {}
        while len(outcomes) < len(requests):
            for message in self._receive():
                if message.kind == _NLMSG_ERROR and first <= message.sequence <= self._sequence:
                    outcomes[message.sequence] = parse_error(message)
        return [outcomes[number] for number in range(first, self._sequence + 1)]

    def _dump(self, kind: int, body: bytes) -> list[bytes] | None:
        """Return what is there, or None where it changed meanwhile."""
        self._socket.send(self._message(kind, body, _NLM_F_DUMP))
        found: list[bytes] = []
        size, interrupted = 0, False
        while True:
            for message in self._receive():
                if message.sequence != self._sequence:
                    continue
                interrupted = interrupted or bool(message.flags & _NLM_F_DUMP_INTR)
                if message.kind in (_NLMSG_DONE, _NLMSG_ERROR):
                    if error := parse_error(message):
                        raise error
                    return None if interrupted else found
                found.append(message.body)
                size += len(message.body)
            if size > _DUMP_MAX:
                raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))

    def _message(self, kind: int, body: bytes, flags: int) -> bytes:
        self._sequence += 1
        size = _HEADER.size + len(body)
        return _HEADER.pack(size, kind, flags | _NLM_F_REQUEST, self._sequence, 0) + body + bytes(-size % 4)

    def _receive(self) -> list[Message]:
        for _ in range(_STRANGERS_MAX):
            data, _ancillary, flags, (port, _groups) = self._socket.recvmsg(_BUFFER)
            if port:  # not the kernel: in this network namespace are the containers, too
                continue
            if flags & socket.MSG_TRUNC:
                raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
            return parse_messages(data)
        raise OSError(errno.EBADMSG, "others than the kernel answer")


def parse_messages(data: bytes) -> list[Message]:
    """Split what was received at once."""
    messages = []
    offset, end = 0, len(data)
    while offset < end:
        if end - offset < _HEADER.size:
            raise _malformed()
        size, kind, flags, sequence, _port = _HEADER.unpack_from(data, offset)
        if not _HEADER.size <= size <= end - offset:
            raise _malformed()
        messages.append(Message(kind, flags, sequence, data[offset + _HEADER.size : offset + size]))
        offset += size + 3 & ~3
    return messages


def parse_error(message: Message) -> OSError | None:
    """Return what NLMSG_ERROR, or the end of a dump, says: the failure, or None for success."""
    if len(message.body) < 4:
        raise _malformed()
    code = -int.from_bytes(message.body[:4], "little", signed=True)
    if code <= 0:
        return None
    text = os.strerror(code)
    if message.flags & _NLM_F_ACK_TLVS:
        offset = 4
        if message.kind == _NLMSG_ERROR:
            # The request comes back, its header alone or all of it.
            size = int.from_bytes(message.body[4:8], "little")
            offset += _HEADER.size if message.flags & _NLM_F_CAPPED else size + 3 & ~3
        if said := parse_attributes(message.body, offset).get(_NLMSGERR_ATTR_MSG):
            text += f" ({said.rstrip(bytes(1)).decode(errors='replace')})"
    return OSError(code, text)


def parse_attributes(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """Return the attributes from ``offset`` on by their types; of a type that is there twice the last one."""
    found = {}
    end = len(data)
    while offset < end:
        if end - offset < _ATTRIBUTE.size:
            raise _malformed()
        size, kind = _ATTRIBUTE.unpack_from(data, offset)
        if not _ATTRIBUTE.size <= size <= end - offset:
            raise _malformed()
        found[kind & _NLA_TYPE_MASK] = data[offset + _ATTRIBUTE.size : offset + size]
        offset += size + 3 & ~3
    return found


def attribute(kind: int, value: bytes | int) -> bytes:
    """Return an attribute with its padding; a number is one of 32 bits."""
    if isinstance(value, int):
        value = value.to_bytes(4, "little")
    size = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(size, kind) + value + bytes(-size % 4)


def unpack(fixed: struct.Struct, body: bytes) -> tuple[int, ...]:
    """Return the fields of the fixed part that a body begins with."""
    if len(body) < fixed.size:
        raise _malformed()
    return fixed.unpack_from(body)


def number(attributes: dict[int, bytes], kind: int, default: int = 0) -> int:
    """Return an attribute that is a number, of whatever width."""
    value = attributes.get(kind)
    return default if value is None else int.from_bytes(value[:8], "little")


def _malformed() -> OSError:
    return OSError(errno.EBADMSG, "malformed netlink message")
