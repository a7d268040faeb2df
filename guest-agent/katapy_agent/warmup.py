"""Has everything done once that a container's start does, before the VM becomes a template.

Whoever restores the template then starts with modules that are imported, caches that are filled and pages that are
there, and with as little memory in use as can be: what is free holds zeros, which a template does not keep. Nothing
here may ask for what must differ between VMs: no boot id, no machine id, no TCP.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import mmap
import os
import socket
import struct
from pathlib import Path
from typing import Any, Final

from google.protobuf.message import Message

from katapy_agent import agent_pb2 as pb
from katapy_agent import hpack, http2
from katapy_agent.errors import Internal
from katapy_agent.exchange import Exchange
from katapy_agent.rpc import Server

_ID: Final = "warm-up"
_DEADLINE: Final = 120.0
_NO_PROGRAM: Final = "/lib64/ld-linux-x86-64.so.2"  # the smallest that there is: it prints its version
_MIB: Final = 1 << 20
# What stays available while free memory is filled, and the most that is.
_MARGIN: Final = 8 * _MIB
_FILL_MAX: Final = 512 * _MIB
_MADV_POPULATE_WRITE: Final = 23
_SERVICE: Final = pb.DESCRIPTOR.services_by_name["Agent"].full_name


async def warm_up(server: Server, exchange: Exchange) -> None:
    """Run a container to its end by the agent's own calls, over a connection to ``server``; then give back memory.

    Raises what fails: a VM that cannot do this is no template.
    """
    from katapy_agent import forward, network, routes  # noqa: F401 - else only a pod with a network has them

    async with _Client(server) as client:
        await _run_container(client, exchange)
    gc.collect()
    gc.freeze()
    _clear_free_memory()


async def _run_container(client: _Client, exchange: Exchange) -> None:
    await client.call("CreateSandbox", pb.CreateSandboxRequest())
    events = client.begin("Events", pb.Empty())
    async with _Streams(exchange, _ID) as streams:
        request = pb.CreateContainerRequest(container_id=_ID, spec=json.dumps(_spec()).encode(), stdio=streams.stdio)
        await client.call("CreateContainer", request)
        ending = client.begin("WaitProcess", pb.WaitProcessRequest(container_id=_ID))
        await client.call("StartContainer", pb.StartContainerRequest(container_id=_ID))
        await ending
        await client.call("StatsContainer", pb.StatsContainerRequest(container_id=_ID))
        await client.call("RemoveContainer", pb.RemoveContainerRequest(container_id=_ID))
    events.cancel()
    await client.call("DestroySandbox", pb.Empty())


class _Client:
    """The host's side of a connection, with no more than these calls need."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._calls: dict[int, asyncio.Future[None]] = {}
        self._last = -1

    async def __aenter__(self) -> _Client:
        self._socket, theirs = socket.socketpair()
        for end in (self._socket, theirs):
            end.setblocking(False)
        await self._server.take(theirs)
        self._socket.send(http2.PREFACE + http2.frame(http2.SETTINGS, 0, 0))
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_error: object) -> None:
        self._reading.cancel()
        await asyncio.wait([self._reading])
        self._socket.close()

    async def call(self, method: str, request: Message) -> None:
        """Call and wait for the end. Raises Internal where that is not success."""
        await asyncio.wait_for(self.begin(method, request), _DEADLINE)

    def begin(self, method: str, request: Message) -> asyncio.Future[None]:
        """Call, and return what tells of the end."""
        self._last += 2
        headers = [(b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"localhost")]
        headers += [(b":path", f"/{_SERVICE}/{method}".encode()), (b"te", b"trailers")]
        headers += [(b"content-type", b"application/grpc"), (b"grpc-timeout", b"%dS" % _DEADLINE)]
        data = request.SerializeToString()
        self._socket.send(
            http2.frame(http2.HEADERS, http2.END_HEADERS, self._last, hpack.encode(headers))
            + http2.frame(http2.DATA, http2.END_STREAM, self._last, b"\0" + len(data).to_bytes(4, "big") + data)
        )
        ended = self._calls[self._last] = asyncio.get_running_loop().create_future()
        return ended

    async def _read(self) -> None:
        decoder = hpack.Decoder()
        while True:
            high, low, kind, flags, number = struct.unpack("!HBBBI", await self._exactly(9))
            payload = await self._exactly(high << 8 | low)
            if kind == http2.HEADERS:
                headers = dict(decoder.decode(payload, size_max=http2.HEADERS_MAX))
                if flags & http2.END_STREAM and not self._calls[number].done():
                    self._end(self._calls[number], headers)

    def _end(self, call: asyncio.Future[None], headers: dict[bytes, bytes]) -> None:
        if headers[b"grpc-status"] == b"0":
            call.set_result(None)
        else:
            call.set_exception(Internal(f"warm-up: {headers.get(b'grpc-message', b'').decode()}"))

    async def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            data += await asyncio.get_running_loop().sock_recv(self._socket, count - len(data))
        return data


class _Streams:
    """The streams of a process, as the host would connect them, and read to their end."""

    def __init__(self, exchange: Exchange, token: str) -> None:
        self.stdio = pb.Stdio(stdin=f"{token}/stdin", stdout=f"{token}/stdout", stderr=f"{token}/stderr")
        self._exchange = exchange
        self._ours: list[socket.socket] = []

    async def __aenter__(self) -> _Streams:
        for name in (self.stdio.stdin, self.stdio.stdout, self.stdio.stderr):
            ours, theirs = socket.socketpair()
            for end in (ours, theirs):
                end.setblocking(False)
            ours.send(bytes([len(name)]) + name.encode())
            self._ours.append(ours)
            await self._exchange.introduce(theirs)
        self._ours[0].shutdown(socket.SHUT_WR)
        return self

    async def __aexit__(self, *_error: object) -> None:
        loop = asyncio.get_running_loop()
        for ours in self._ours:
            while ours is not self._ours[0] and await loop.sock_recv(ours, 4096):
                pass
            ours.close()


def _spec() -> dict[str, Any]:
    """Return a configuration like those that engines write, with the VM's own root."""
    sets = ("bounding", "effective", "permitted")
    capabilities = ["CAP_CHOWN", "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_NET_BIND_SERVICE"]
    pts = {"newinstance": None, "ptmxmode": "0666", "mode": "0620", "gid": "5"}
    denied = {"names": ["kexec_load", "swapon", "swapoff"], "action": "SCMP_ACT_ERRNO"}
    return {
        "ociVersion": "1.2.0",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": [_NO_PROGRAM, "--version"],
            "env": ["PATH=/usr/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": dict.fromkeys(sets, capabilities),
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
        },
        "root": {"path": "/", "readonly": True},
        "hostname": _ID,
        "mounts": [
            _mount("/proc", "proc", ["nosuid", "noexec", "nodev"]),
            _mount("/dev", "tmpfs", ["nosuid", "strictatime", "mode=755", "size=65536k"]),
            _mount("/dev/pts", "devpts", ["nosuid", "noexec", *(f"{k}={v}" if v else k for k, v in pts.items())]),
            _mount("/dev/shm", "tmpfs", ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            _mount("/dev/mqueue", "mqueue", ["nosuid", "noexec", "nodev"]),
            _mount("/sys", "sysfs", ["nosuid", "noexec", "nodev", "ro"]),
            _mount("/sys/fs/cgroup", "cgroup", ["nosuid", "noexec", "nodev", "relatime", "ro"]),
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "cgroup", "network")],
            "resources": {
                "devices": [{"allow": False, "access": "rwm"}],
                "memory": {"limit": 64 * _MIB},
                "cpu": {"shares": 1024},
                "pids": {"limit": 64},
            },
            "seccomp": {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [denied]},
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    }


def _mount(destination: str, kind: str, options: list[str]) -> dict[str, Any]:
    return {"destination": destination, "type": kind, "source": kind, "options": options}


def _clear_free_memory() -> None:
    """Drop what the page cache holds, then let free pages hold zeros: by taking them all once."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")
    available = os.sysconf("SC_AVPHYS_PAGES") * mmap.PAGESIZE
    size = min(available - _MARGIN, _FILL_MAX)
    if size > 0:
        # Pages of the smallest size: those are the ones that were in use before.
        with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            with contextlib.suppress(OSError):  # a kernel without huge pages
                memory.madvise(mmap.MADV_NOHUGEPAGE)
            memory.madvise(_MADV_POPULATE_WRITE)
