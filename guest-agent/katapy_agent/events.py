"""What happens in the sandbox, told to one subscriber: ends of processes, and out-of-memory kills.

Nothing here waits for the subscriber: one that is too slow loses its stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

_BACKLOG: Final = 1024


@dataclass(frozen=True)
class Exit:
    """A process has ended; ``exec_id`` is empty for the container's init."""

    container_id: str
    exec_id: str
    exit_status: int


@dataclass(frozen=True)
class OutOfMemory:
    """The kernel killed a process of the container because of a memory limit."""

    container_id: str


Event = Exit | OutOfMemory


class SubscriberTooSlow(Exception):
    """The subscriber left more events unread than are kept for it."""


class _Superseded(Exception):
    """Another subscriber has come."""


_Item = Event | SubscriberTooSlow | _Superseded


class Events:
    """Hands events to the subscriber, if there is one."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[_Item] | None = None

    def publish(self, event: Event) -> None:
        """Tell the subscriber; without one, the event is lost."""
        if self._queue is None:
            return
        if self._queue.qsize() < _BACKLOG:
            self._queue.put_nowait(event)
        else:
            self._end(SubscriberTooSlow())

    def subscribe(self) -> AsyncIterator[Event]:
        """Return what happens from now on. An older subscriber's stream ends.

        The iterator raises SubscriberTooSlow after the events that were kept.
        """
        self._end(_Superseded())
        self._queue = asyncio.Queue()
        return self._read(self._queue)

    def _end(self, reason: _Item) -> None:
        if self._queue is not None:
            self._queue.put_nowait(reason)
            self._queue = None

    async def _read(self, queue: asyncio.Queue[_Item]) -> AsyncIterator[Event]:
        try:
            while True:
                item = await queue.get()
                if isinstance(item, _Superseded):
                    return
                if isinstance(item, SubscriberTooSlow):
                    raise item
                yield item
        finally:
            if self._queue is queue:
                self._queue = None
