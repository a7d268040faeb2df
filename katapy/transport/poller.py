"""A bare epoll loop for the device process: asyncio would cost it more memory than all the rest together."""

from __future__ import annotations

import select
from collections.abc import Callable

Handler = Callable[[int], None]


class Poller:
    """Calls one handler per descriptor with the EPOLL* bits that came up."""

    __slots__ = ("_epoll", "_handlers")

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}

    def add(self, fd: int, events: int, handler: Handler) -> None:
        """Watch ``fd``. Raises OSError where it cannot be watched."""
        self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def remove(self, fd: int) -> None:
        """Stop watching ``fd``, just before it is closed."""
        del self._handlers[fd]
        self._epoll.unregister(fd)

    def wait(self, timeout: float | None) -> None:
        """Wait for events, ``timeout`` seconds at most, and handle them. A handler may remove others."""
        for fd, events in self._epoll.poll(timeout):
            handler = self._handlers.get(fd)
            if handler is not None:
                handler(events)

    def close(self) -> None:
        """Let go of the epoll descriptor, not of those it watched."""
        self._epoll.close()
