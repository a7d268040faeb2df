"""A pod's connection to its network namespace, as the supervisor holds it: taps, changes, and what undoes all of it.

The work is the helper's; here are descriptors and the requests, ready to be sent to the kernel, that remove what would
not go by itself. So this end needs neither pyroute2 nor a thread in the namespace.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import select
import socket
import struct
import sys
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple

import katapy
from katapy import run
from katapy.devices import Nic
from katapy.errors import KatapyError, Unavailable, from_wire
from katapy.interfaces import Network

log = logging.getLogger(__name__)

_BOOT: Final = "import sys; sys.path.extend(sys.argv.pop(1).split(':')); from {} import main; sys.exit(main())"
_UNSHARE: Final = "/usr/bin/unshare"
_MESSAGE_MAX: Final = 200_000
_FDS_MAX: Final = 250  # SCM_MAX_FD is 253
_DEADLINE: Final = 60.0
# One `docker network connect` is a dozen changes.
_QUIET_SECONDS: Final = 0.1
QUEUES_MAX: Final = 8

# rtnetlink(7), as far as it is read here: type and length of a message, and of what it tells of.
_NLMSG: Final = struct.Struct("=IH10x")
_IFINFO: Final = struct.Struct("=4xi8x")
_NDMSG: Final = struct.Struct("=8xH2x")
_RTM_NEWLINK, _RTM_DELLINK, _RTM_NEWADDR, _RTM_DELADDR = 16, 17, 20, 21
_RTM_NEWROUTE, _RTM_DELROUTE, _RTM_NEWNEIGH = 24, 25, 28
_RT_TABLE_LOCAL, _RT_SCOPE_LINK, _NUD_PERMANENT = 255, 253, 0x80
# The first attribute, RTA_DST, and how the address in it begins.
_LINK_LOCAL_DESTINATION: Final = struct.pack("=HH", 20, 1) + b"\xfe\x80"


class Settings(NamedTuple):
    """What is done beside connecting; rates in bytes a second, 0: no limit.

    ``model`` is ``tcfilter`` or ``macvtap``. ``ingress_rate`` and ``egress_rate`` are the host's; what the pod has
    asked for holds too, unless a CNI plugin does it already. ``checked`` lets only frames with the pod's own addresses
    out, ``metadata`` lets clouds' metadata services be reached, ``queues`` is how many a NIC has. ``loopback`` leads
    connections to the namespace's loopback to a listener.
    """

    checked: bool = True
    metadata: bool = False
    model: str = "tcfilter"
    ingress_rate: int = 0
    egress_rate: int = 0
    asked_ingress: int = 0
    asked_egress: int = 0
    queues: int = 1
    vhost: bool = True
    loopback: bool = True


class Change(NamedTuple):
    """What has become of a namespace: NICs to be plugged in, and the permanent addresses of those to be taken out."""

    network: Network
    added: tuple[Nic, ...]
    removed: tuple[str, ...]


class Helper:
    """A helper process that was started and waits for its request, which it answers once."""

    def __init__(self) -> None:
        """Start it. Raises Unavailable."""
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        argv = [*_python("katapy.network.helper"), str(theirs.fileno())]
        with theirs:
            try:
                self._process = run.start(argv, name="network helper", fds=[theirs.fileno()], stderr=2)
            except KatapyError:
                self._control.close()
                raise

    async def ask(self, request: Mapping[str, Any], namespace: int) -> tuple[dict[str, Any], list[int]]:
        """Return the answer about the network namespace behind a descriptor, and the descriptors that come with it.

        Raises what the helper raises, Unavailable where it dies.
        """
        data, fds = b"", list[int]()
        try:
            with contextlib.suppress(OSError):
                socket.send_fds(self._control, [json.dumps(request).encode()], [namespace])
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DEADLINE):
                    await run.readable(self._control.fileno())
                with contextlib.suppress(OSError):
                    data, fds, _flags, _address = socket.recv_fds(self._control, _MESSAGE_MAX, _FDS_MAX)
            await self.close()
        except BaseException:
            for fd in fds:
                os.close(fd)
            await self.close()
            raise
        if not data:
            raise Unavailable("cannot set up the pod's network: the helper died")
        answer = json.loads(data)
        if "error" in answer:
            raise from_wire(answer["code"], answer["kind"], answer["error"])
        return answer, fds

    async def close(self) -> None:
        """End it."""
        self._control.close()
        await self._process.stop(grace=0)


class PodNetwork:
    """The connection; see ``connect``."""

    def __init__(self, namespace: int, settings: Settings) -> None:
        self._namespace, self._settings = os.dup(namespace), settings
        self._stack = ExitStack()
        self._stack.callback(os.close, self._namespace)
        self._state: dict[str, Any] = {}
        self._undo: dict[str, list[bytes]] = {}
        self._watching: socket.socket | None = None
        self._requests: socket.socket | None = None
        self._idle = asyncio.Event()
        self.network = Network()
        self.datagrams: socket.socket | None = None
        """An unconnected UDP socket in the namespace."""
        self.loopback: tuple[socket.socket, ...] = ()
        """Listeners at which all TCP connections to the namespace's loopback arrive, one for each family: what they
        accept says by getsockname(2) to which port. None where that is not wanted, or the host cannot do it."""

    async def connect(self, helper: Helper) -> tuple[Nic, ...]:
        """Connect what the namespace has now, and return its NICs, whose descriptors are the caller's to close.

        Raises KatapyError; nothing has changed then.
        """
        try:
            answer, fds = await helper.ask(self._request(), self._namespace)
        except (Unavailable, asyncio.CancelledError):
            # It may have been killed, for one by us, and then could not undo what it had done.
            with contextlib.suppress(KatapyError):
                await _clean(self._namespace)
            raise
        with ExitStack() as stack:
            for fd in fds:
                stack.callback(os.close, fd)
            watching, requests, datagrams, *others = fds
            self._watching = socket.socket(fileno=os.dup(watching))
            self._requests = socket.socket(fileno=os.dup(requests))
            self.datagrams = socket.socket(fileno=os.dup(datagrams))
            self.datagrams.setblocking(False)
            self._stack.callback(self.datagrams.close)
            if count := answer["loopback"]:
                link, *listeners = others[-count:]
                del others[-count:]
                self._stack.callback(os.close, os.dup(link))
                self.loopback = tuple(socket.socket(fileno=os.dup(fd)) for fd in listeners)
                for listener in self.loopback:
                    self._stack.enter_context(listener).setblocking(False)
            elif self._settings.loopback:
                log.debug("connections to the pod's loopback do not reach its guest: %s", answer["loopback_error"])
            return self._take(answer, [os.dup(fd) for fd in others])

    async def changes(self) -> AsyncIterator[Change]:
        """Give every change of the namespace from now on; the new NICs' descriptors are the caller's to close."""
        assert self._watching is not None
        while True:
            self._idle.set()
            await run.readable(self._watching.fileno())
            self._idle.clear()
            await asyncio.sleep(_QUIET_SECONDS)
            if not _drain(self._watching, self._own()):
                continue
            before = self.network
            try:
                answer, fds = await Helper().ask(self._request(), self._namespace)
            except KatapyError as error:
                # The pod goes on with the network that it has.
                log.warning("%s", error)
                continue
            nics = self._take(answer, fds)
            devices = {each.device for each in self.network.interfaces}
            removed = tuple(each.device for each in before.interfaces if each.device not in devices)
            if self.network != before or nics:
                yield Change(self.network, nics, removed)

    async def settled(self) -> None:
        """Wait until what has happened in the namespace by now was given by ``changes``, and who took it is done."""
        while not self._idle.is_set() or (self._watching is not None and select.select([self._watching], [], [], 0)[0]):
            self._idle.clear()
            await self._idle.wait()

    def close(self) -> None:
        """Leave the namespace as it was found, once the VM has ended and its taps with it. Idempotent."""
        if self._requests is not None:
            for requests in self._undo.values():
                for each in requests:
                    # The kernel has done it when this returns; what is gone already is no error.
                    with contextlib.suppress(OSError):
                        self._requests.send(each)
            self._requests.close()
            self._requests = None
        if self._watching is not None:
            self._watching.close()
            self._watching = None
        self._stack.close()

    def _own(self) -> set[int]:
        """Return the indexes of the interfaces that this end made."""
        return {self._state["sink"], *(each["tap"] for each in self._state["known"].values())}

    def _request(self) -> dict[str, Any]:
        return {"clean": False, "settings": self._settings._asdict(), "state": self._state}

    def _take(self, answer: Mapping[str, Any], fds: list[int]) -> tuple[Nic, ...]:
        if answer["new_sink"]:
            self._stack.callback(os.close, fds.pop(0))
        self._state = answer["state"]
        self.network = Network.from_json(answer["network"])
        for index, requests in answer["undo"].items():
            self._undo[index] = [bytes.fromhex(each) for each in requests]
        self._undo = {index: each for index, each in self._undo.items() if index in self._state["known"]}
        nics = []
        for each in answer["added"]:
            taps, fds = fds[: each["queues"]], fds[each["queues"] :]
            vhost, fds = fds[: each["vhost"]], fds[each["vhost"] :]
            nics.append(Nic(each["device"], tuple(taps), tuple(vhost)))
        return tuple(nics)


def close_nic(nic: Nic) -> None:
    """Close the descriptors of a NIC, of which QEMU has its own."""
    for fd in (*nic.tap_fds, *nic.vhost_fds):
        os.close(fd)


def probe() -> None:
    """Raise Unavailable, with what is missing, where this host cannot connect a pod to a network."""
    run.output([_UNSHARE, "--net", *_python("katapy.network.probe")])


def probe_loopback() -> None:
    """Raise Unavailable, with what is missing, where this host cannot lead a pod's loopback to its guest."""
    run.output([_UNSHARE, "--net", *_python("katapy.network.probe"), "loopback"])


def _python(module: str) -> list[str]:
    """Return the command that runs ``main`` of a module of katapy's, with this process's libraries and no others."""
    paths = [str(Path(katapy.__file__).parent.parent), *(path for path in sys.path if path)]
    return [sys.executable, "-I", "-S", "-c", _BOOT.format(module), ":".join(paths)]


async def clean(path: Path) -> None:
    """Remove from the network namespace at ``path`` what a supervisor that was killed has left. Raises KatapyError."""
    try:
        namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return  # gone, and all that was in it
    try:
        await _clean(namespace)
    finally:
        os.close(namespace)


async def _clean(namespace: int) -> None:
    await Helper().ask({"clean": True, "settings": {}, "state": {}}, namespace)


def _drain(watching: socket.socket, own: Collection[int]) -> bool:
    """Read all that has happened; return whether any of it may matter to a VM whose taps are ``own``."""
    matters = False
    while True:
        try:
            data = watching.recv(1 << 16)
        except BlockingIOError:
            return matters
        except OSError:  # more has happened than fits; the next look sees all of it
            matters = True
            continue
        while len(data) >= _NLMSG.size and not matters:
            length, kind = _NLMSG.unpack_from(data)
            matters = _matters(kind, data[_NLMSG.size : length], own)
            data = data[max(length + 3 & ~3, _NLMSG.size) :]


def _matters(kind: int, body: bytes, own: Collection[int]) -> bool:
    """Whether a message of rtnetlink(7) is about something that a VM is told.

    It is not told of its own taps, of what a kernel does by itself for link-local addresses, and of neighbours that
    come and go.
    """
    if kind in (_RTM_NEWLINK, _RTM_DELLINK):
        return _IFINFO.unpack_from(body)[0] not in own
    if kind in (_RTM_NEWADDR, _RTM_DELADDR):
        return body[0] != socket.AF_INET6 or body[3] != _RT_SCOPE_LINK
    if kind in (_RTM_NEWROUTE, _RTM_DELROUTE):
        link_local = body[0] == socket.AF_INET6 and body[12:18] == _LINK_LOCAL_DESTINATION
        return body[4] != _RT_TABLE_LOCAL and not link_local
    if kind == _RTM_NEWNEIGH:
        return bool(_NDMSG.unpack_from(body)[0] & _NUD_PERMANENT)
    return True
