"""The shim's side of the attach protocol, which client/attach.py describes: streams are given away, signals come in.

It owns the connections of attach.sock. What processes, streams and signals are belongs to its AttachHandler.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, NamedTuple, Protocol

from katapy.client.attach import DATAGRAM_MAX
from katapy.errors import Internal, InvalidArgument, KatapyError, Timeout, codes_of
from katapy.run import readable
from katapy.transport.accept import accepting
from katapy.transport.unix import receive_from

_HELLO_SECONDS: Final = 10.0
_SEND_SECONDS: Final = 10.0
_RELAY_SECONDS: Final = 5.0
_SIGNALS: Final = range(1, 65)
_SIZES: Final = range(1, 1 << 16)  # struct winsize
_log = logging.getLogger(__name__)


class Attached(NamedTuple):
    """The streams of a process, by name; with a terminal only ("stdout", socket). Whoever gets them closes them."""

    terminal: bool
    streams: list[tuple[str, socket.socket]]


class AttachHandler(Protocol):
    """What the server asks of a sandbox. ``exec_id`` is "" for init. Each may raise a KatapyError."""

    async def attach(self, container_id: str, exec_id: str, pid: int) -> Attached:
        """Give the streams of a process to the host process ``pid`` that stands for it, 0 where none does.

        May wait for the process to be created.
        """

    async def signal(self, container_id: str, exec_id: str, number: int) -> None:
        """Send a signal."""

    async def resize(self, container_id: str, exec_id: str, columns: int, rows: int) -> None:
        """Set the window size."""

    async def wait(self, container_id: str, exec_id: str) -> tuple[int, int]:
        """Wait for the end; return the exit status, 0 to 255, and the signal, 0 for none. Raise when it was lost."""

    async def detached(self, container_id: str, exec_id: str) -> None:
        """Whoever had the streams of a process has done with them."""


class AttachServer:
    """While entered, serves attach connections on a listening SOCK_SEQPACKET socket, as accept.py says."""

    def __init__(self, listening: socket.socket, handler: AttachHandler) -> None:
        self._handler = handler
        self._accepting = accepting(listening, self._serve)

    async def __aenter__(self) -> None:
        await self._accepting.__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._accepting.__aexit__(kind, error, trace)

    async def _serve(self, sock: socket.socket) -> None:
        try:
            async with asyncio.timeout(_HELLO_SECONDS):
                await readable(sock.fileno())
            data, pid = receive_from(sock, DATAGRAM_MAX + 1)
            if not data:
                return
            session = _Session(sock, pid, self._handler, _parse(data))
        except TimeoutError:
            await _send(sock, _error(Timeout(f"attach: nothing came within {_HELLO_SECONDS:g} s")))
        except InvalidArgument as error:
            await _send(sock, _error(error))
        else:
            await session.run()


class _Session:
    """One attachment."""

    def __init__(self, sock: socket.socket, pid: int, handler: AttachHandler, message: dict[str, Any]) -> None:
        match message:
            case {"attach": str(container_id), "exec": str(exec_id)} if len(message) == 2:
                self._process = container_id, exec_id
            case {"attach": str(container_id), "exec": str(exec_id), "only": "streams"} if len(message) == 3:
                self._process, pid = (container_id, exec_id), 0
            case _:
                raise InvalidArgument("attach: the first message is none")
        self._sock = sock
        self._pid = pid
        self._handler = handler
        self._attached = False

    async def run(self) -> None:
        """Give the streams away and tell the end, listening meanwhile."""
        async with asyncio.TaskGroup() as tasks:
            carrying = tasks.create_task(self._carry())
            # Also after the end was told: closing a socket with unread messages would take what it sent with it.
            with suppress(OSError):
                await self._listen()
            carrying.cancel()
        if self._attached:
            await self._handler.detached(*self._process)

    async def _carry(self) -> None:
        await _send(self._sock, await self._outcome())
        # A peer that did not take it learns of the end by this; its own end is then heard by _listen().
        with suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    async def _outcome(self) -> dict[str, Any]:
        """Give the streams away, wait for the end, and return the message that tells it."""
        try:
            self._give(*await self._handler.attach(*self._process, self._pid))
            self._attached = True
            status, signal = await self._handler.wait(*self._process)
            return {"exit": status, **({"signal": signal} if signal else {})}
        except KatapyError as error:
            return _error(error)
        except Exception as error:
            _log.exception("attach of %s failed", self._process)
            return _error(Internal(f"attach failed: {type(error).__name__}: {error}"))

    def _give(self, terminal: bool, streams: list[tuple[str, socket.socket]]) -> None:
        """Send the streams; on this fresh connection that never blocks. A peer that has left is heard by _listen()."""
        data = json.dumps({"terminal": terminal, "streams": [name for name, _ in streams]}).encode()
        with suppress(OSError):
            socket.send_fds(self._sock, [data], [stream.fileno() for _, stream in streams])
        for _, stream in streams:
            stream.close()

    async def _listen(self) -> None:
        """Relay until the peer closes."""
        try:
            while (message := await _receive(self._sock)) is not None:
                await self._relay(message)
        except InvalidArgument as error:
            await _send(self._sock, _error(error))

    async def _relay(self, message: dict[str, Any]) -> None:
        match message:
            case {"signal": int(number)} if len(message) == 1 and number in _SIGNALS and self._attached:
                relayed = self._handler.signal(*self._process, number)
            case {"resize": [int(columns), int(rows)]} if (
                len(message) == 1 and columns in _SIZES and rows in _SIZES and self._attached
            ):
                relayed = self._handler.resize(*self._process, columns, rows)
            case _:
                raise InvalidArgument("attach: not a message that may come now")
        # Nobody waits for an answer; a process that has just ended is the usual reason for an error.
        try:
            # A guest that does not answer must not keep us from hearing what comes next.
            await asyncio.wait_for(relayed, _RELAY_SECONDS)
        except (KatapyError, TimeoutError) as error:
            _log.debug("cannot relay %s to %s: %s", message, self._process, error)
        except Exception:
            _log.exception("relaying to %s failed", self._process)


async def _receive(sock: socket.socket) -> dict[str, Any] | None:
    """Return the next message, None when the peer has closed. Raises InvalidArgument."""
    # One byte more than is allowed, so that a datagram that was cut off shows.
    data = await asyncio.get_running_loop().sock_recv(sock, DATAGRAM_MAX + 1)
    return _parse(data) if data else None


def _parse(data: bytes) -> dict[str, Any]:
    try:
        message = json.loads(data) if len(data) <= DATAGRAM_MAX else None
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise InvalidArgument("attach: a message is not a JSON object of at most 64 KiB")
    return message


async def _send(sock: socket.socket, message: dict[str, Any]) -> None:
    """Send a message to a peer that may be slow, or gone."""
    with suppress(OSError):
        async with asyncio.timeout(_SEND_SECONDS):
            await asyncio.get_running_loop().sock_sendall(sock, json.dumps(message).encode())


def _error(error: KatapyError) -> dict[str, Any]:
    # A sixth of a datagram: JSON may need six bytes for one character.
    text = str(error)[: DATAGRAM_MAX // 6 - 100]
    return {"error": text, "kind": type(error).__name__, "code": codes_of(error).rpc}
