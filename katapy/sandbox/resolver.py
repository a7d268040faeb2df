"""Name queries of a guest to a resolver on the loopback of the pod's network namespace, as docker has it.

The loopback of a VM is another than that of the namespace. So the agent listens at the resolver's address in the guest,
and what is asked there comes over a stream, each message preceded by its length in two bytes (RFC 1035, 4.2.2); from
here it goes on as a datagram, from a socket that is in the namespace and can reach nothing but the resolver.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import struct
from contextlib import suppress
from typing import Final

from katapy.oci.spec import Spec

_RESOLV_CONF: Final = "/etc/resolv.conf"
_RESOLV_CONF_MAX: Final = 64 << 10
_PORT: Final = 53
_LENGTH: Final = struct.Struct("!H")
_MESSAGE_MAX: Final = 65535


def open_resolv_conf(spec: Spec) -> int | None:
    """Return a descriptor of the resolv.conf that the engine mounts, a file of the host's; None where there is none."""
    sources = [bind.source for bind in spec.bind_mounts if bind.destination == _RESOLV_CONF]
    try:
        return os.open(sources[-1], os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC) if sources else None
    except OSError:
        return None


def find_resolver(resolv_conf: int) -> str:
    """Return the first IPv4 address of the loopback that a resolv.conf, now, names; empty where there is none."""
    try:
        text = os.pread(resolv_conf, _RESOLV_CONF_MAX, 0).decode(errors="replace")
    except OSError:
        return ""
    for line in text.splitlines():
        words = line.split()
        if words[:1] == ["nameserver"] and len(words) > 1:
            with suppress(ValueError):
                address = ipaddress.IPv4Address(words[1])
                if address.is_loopback:
                    return str(address)
    return ""


async def relay(stream: socket.socket, datagrams: socket.socket, address: str) -> None:
    """Relay until the guest hangs up. ``datagrams`` is an unconnected UDP socket; both stay the caller's."""
    datagrams.connect((address, _PORT))
    async with asyncio.TaskGroup() as both:
        answering = both.create_task(_answer(stream, datagrams))
        await _ask(stream, datagrams)
        answering.cancel()


async def _ask(stream: socket.socket, datagrams: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    while length := await _exactly(stream, _LENGTH.size):
        query = await _exactly(stream, *_LENGTH.unpack(length))
        with suppress(OSError):  # nobody listens there any more: the client asks again, or somebody else
            await loop.sock_sendall(datagrams, query)


async def _answer(stream: socket.socket, datagrams: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    while True:
        try:
            answer = await loop.sock_recv(datagrams, _MESSAGE_MAX)
        except OSError:
            continue
        with suppress(OSError):  # the reader notices the end
            await loop.sock_sendall(stream, _LENGTH.pack(len(answer)) + answer)


async def _exactly(stream: socket.socket, count: int) -> bytes:
    """Return so many bytes, or none where the stream has ended."""
    data = b""
    while len(data) < count:
        try:
            more = await asyncio.get_running_loop().sock_recv(stream, count - len(data))
        except OSError:
            return b""
        if not more:
            return b""
        data += more
    return data
