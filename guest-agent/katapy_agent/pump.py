"""Moves bytes from one descriptor to another in a thread of its own, until there are no more.

A thread per direction that sleeps in poll(2) costs the event loop nothing and keeps no byte in Python for long. Ends
of pipes, sockets and terminals are all the same here. Whichever side ends first, the other learns it by the close of
its descriptor, as two ends of one pipe would.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import threading
import traceback
from collections.abc import Callable
from enum import Enum, auto
from typing import Final

from katapy_agent.errors import Unavailable

PIPE_SIZE: Final = 1 << 20
_CHUNK: Final = 256 << 10
_GONE: Final = select.POLLERR | select.POLLHUP | select.POLLNVAL
# The ways in which a peer is gone; EIO is how the master of a terminal says that it was hung up.
_BROKEN: Final = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ETIMEDOUT, errno.EIO})


class _Order(Enum):
    RUN = auto()
    DRAIN = auto()
    STOP = auto()


def _poller(events: dict[int, int]) -> select.poll:
    poller = select.poll()
    for fd, mask in events.items():
        poller.register(fd, mask)
    return poller


def _is_socket(fd: int) -> bool:
    return stat.S_ISSOCK(os.fstat(fd).st_mode)


def _is_pipe(fd: int) -> bool:
    return stat.S_ISFIFO(os.fstat(fd).st_mode)


def _half_close(fd: int) -> None:
    if not _is_socket(fd):
        return
    end = socket.socket(fileno=fd)
    try:
        end.shutdown(socket.SHUT_WR)
    except OSError as error:
        if error.errno not in _BROKEN:
            raise
    finally:
        end.detach()


class Pump:
    """Copies ``source`` to ``sink``, owns both descriptors (non-blocking) and closes them when either has ended.

    A sink that is a socket is told of the end even where another descriptor of it is open for the other direction.
    ``ended`` is called in the pump's thread as its last act. Raises Unavailable where there is no room for a thread.
    """

    def __init__(self, name: str, source: int, sink: int, ended: Callable[[], object] = lambda: None) -> None:
        self._source = source
        self._sink = sink
        self._ended = ended
        self._order = _Order.RUN
        self._lock = threading.Lock()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._left = PIPE_SIZE  # no pipe holds more when a drain begins
        splices = _is_socket(source) and _is_pipe(sink)
        self._move = self._splice if splices else self._copy
        self._buffer = bytearray(0 if splices else _CHUNK)
        self._poller = _poller({self._wake: select.POLLIN, source: select.POLLIN, sink: 0})
        self._room = _poller({self._wake: select.POLLIN, sink: select.POLLOUT})
        try:
            threading.Thread(target=self._run, name=name, daemon=True).start()
        except RuntimeError as error:
            for fd in (self._wake, source, sink):
                os.close(fd)
            raise Unavailable("cannot start a thread: the VM has too many processes, or too little memory") from error

    def drain(self) -> None:
        """Hand on what is there now, then end: for a source that others may hold open for ever."""
        self._command(_Order.DRAIN)

    def stop(self) -> None:
        """End now; what was not handed on is lost."""
        self._command(_Order.STOP)

    def _command(self, order: _Order) -> None:
        with self._lock:
            if self._wake >= 0 and self._order is not _Order.STOP:
                self._order = order
                os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        # A batch thread does not preempt who wakes it: a process that writes little at a time fills its pipe first.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        try:
            while self._step():
                pass
        except OSError as error:
            if error.errno not in _BROKEN:
                traceback.print_exc()
        finally:
            with self._lock:
                os.close(self._wake)
                self._wake = -1
            os.close(self._source)
            _half_close(self._sink)
            os.close(self._sink)
            # What has ended is kept for as long as its container.
            self._buffer = bytearray()
            self._ended()

    def _step(self) -> bool:
        """Wait, and hand on one chunk. Returns False at the end."""
        draining = self._order is _Order.DRAIN
        ready = dict(self._poller.poll(0 if draining else None))
        self._acknowledge(ready)
        if self._order is _Order.STOP or ready.get(self._sink, 0) & _GONE:
            return False
        if self._source not in ready:
            return not draining
        try:
            count = self._move()
        except BlockingIOError:
            return True
        if draining:
            self._left -= count
        return count > 0 and self._left > 0

    def _splice(self) -> int:
        try:
            return os.splice(self._source, self._sink, PIPE_SIZE, flags=os.SPLICE_F_NONBLOCK)
        except BlockingIOError:
            self._wait_for_room()
            raise

    def _copy(self) -> int:
        count = os.readv(self._source, [self._buffer])
        self._write(memoryview(self._buffer)[:count])
        return count

    def _write(self, data: memoryview) -> None:
        while data and self._order is not _Order.STOP:
            try:
                data = data[os.write(self._sink, data) :]
            except BlockingIOError:
                self._wait_for_room()

    def _wait_for_room(self) -> None:
        self._acknowledge(dict(self._room.poll()))

    def _acknowledge(self, ready: dict[int, int]) -> None:
        if self._wake in ready:
            os.eventfd_read(self._wake)
