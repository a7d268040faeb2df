"""Split virtqueues in the memory of a guest, seen from the device (virtio 1.2, section 2.7).

Owns every read and write of guest memory: a descriptor is read once, checked against the memory regions and becomes
memoryviews; nothing that the guest writes later can move them. Knows nothing of what the buffers mean, except that
each starts with a header of fixed size. Whatever breaks the rules raises ProtocolError, after which the queue is
not usable. Indirect tables and event indexes are not offered, so meeting one is such a breach.

Light on purpose (no dataclasses, no asyncio): the device is a process of its own for every VM.
"""

from __future__ import annotations

import mmap
import os
import struct
from _thread import allocate_lock
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Final, NamedTuple

from katapy.errors import KatapyError

MAX_SIZE: Final = 1024

_DESC: Final = struct.Struct("<QIHH")
_USED: Final = struct.Struct("<II")
_NEXT: Final = 1
_WRITE: Final = 2
_INDIRECT: Final = 4
_NO_INTERRUPT: Final = 1
_NO_NOTIFY: Final = 1


class ProtocolError(KatapyError):
    """The guest or QEMU broke the rules of the device; there is no way to go on."""


_fence_lock: Final = allocate_lock()


def _fence() -> None:
    """Keep the stores before it and the loads after it in order: all that x86-64 may swap; a locked operation does.

    Stores among themselves stay in order there, which is what publishing a used index relies on.
    """
    _fence_lock.acquire()
    _fence_lock.release()


class Region(NamedTuple):
    """A stretch of guest memory: where the guest and where QEMU see it, in bytes, and our own view of it."""

    guest: int
    user: int
    size: int
    view: memoryview

    @staticmethod
    def map(fd: int, guest: int, user: int, size: int, offset: int) -> Region:
        """Map ``size`` bytes of ``fd`` from ``offset``. Raises ProtocolError where the file is not that large."""
        try:
            # From the start of the file: huge pages would refuse an offset between two of them.
            whole = memoryview(mmap.mmap(fd, offset + size))
        except (OSError, ValueError, OverflowError) as error:
            raise ProtocolError(f"cannot map {size} bytes of guest memory at {guest:#x}: {error}") from error
        return Region(guest, user, size, whole[offset : offset + size])


class GuestMemory:
    """All regions of the guest's memory."""

    __slots__ = ("_regions", "_latest")

    def __init__(self, regions: Sequence[Region] = ()) -> None:
        self._regions = tuple(regions)
        self._latest = self._regions[0] if regions else Region(0, 0, 0, memoryview(b""))

    def at_guest(self, address: int, size: int) -> memoryview:
        """Return ``size`` bytes at a guest-physical address. Raises ProtocolError unless one region holds them all."""
        region = self._latest
        start = address - region.guest
        if start >= 0 and start + size <= region.size:
            return region.view[start : start + size]
        for region in self._regions:
            start = address - region.guest
            if start >= 0 and start + size <= region.size:
                self._latest = region
                return region.view[start : start + size]
        raise ProtocolError(f"{size} bytes at {address:#x} are not in guest memory")

    def at_user(self, address: int, size: int, alignment: int) -> memoryview:
        """Return ``size`` bytes at an address of QEMU's. Raises ProtocolError as at_guest, and unless aligned."""
        if address % alignment:
            raise ProtocolError(f"ring address {address:#x} is not aligned to {alignment}")
        for region in self._regions:
            start = address - region.user
            if start >= 0 and start + size <= region.size:
                return region.view[start : start + size]
        raise ProtocolError(f"ring of {size} bytes at {address:#x} is not in guest memory")


class Chain(NamedTuple):
    """A buffer that the guest offers: the pieces of its header, those of the rest, and the rest's size in bytes."""

    head: int
    header: list[memoryview]
    body: list[memoryview]
    room: int


def cut(views: Sequence[memoryview], size: int) -> tuple[list[memoryview], list[memoryview]]:
    """Split scattered bytes after ``size`` of them; what is missing is missing from the first part."""
    for count, view in enumerate(views):
        if size < len(view):
            front = [*views[:count], view[:size]] if size else list(views[:count])
            return front, [view[size:], *views[count + 1 :]]
        size -= len(view)
    return list(views), []


def put(views: Sequence[memoryview], data: bytes) -> None:
    """Write ``data`` over scattered bytes that have exactly its size."""
    start = 0
    for view in views:
        end = start + len(view)
        view[:] = data[start:end]
        start = end


class Virtqueue:
    """One running queue.

    Chains are taken in the order offered and given back in that order: ``peek`` shows the oldest ones, ``push`` gives
    the oldest back, ``publish`` tells the guest. ``writable`` says which way its buffers go, ``call`` is the eventfd
    that interrupts the guest (-1: none); it stays the caller's.
    """

    __slots__ = ("call", "_memory", "_size", "_header", "_flag", "_desc", "_avail", "_used", "_ring", "_next", "_done",
                 "_published", "_held")  # fmt: skip

    def __init__(
        self,
        memory: GuestMemory,
        addresses: tuple[int, int, int],
        *,
        size: int,
        base: int,
        header: int,
        writable: bool,
        call: int,
    ) -> None:
        """Attach to the descriptors, available and used ring at QEMU's ``addresses``, starting at index ``base``.

        Raises ProtocolError when they are not in guest memory.
        """
        desc, avail, used = addresses
        self.call = call
        self._memory = memory
        self._size = size
        self._header = header
        self._flag = _WRITE if writable else 0
        self._desc = memory.at_user(desc, 16 * size, 16)
        # Casts read and write an index in one access; byte by byte, the guest could change it in between.
        self._avail = memory.at_user(avail, 4 + 2 * size, 2).cast("H")
        ring = memory.at_user(used, 4 + 8 * size, 4)
        self._used, self._ring = ring[:4].cast("H"), ring[4:]
        self._next = base
        self._done = self._published = self._used[1]
        self._held: deque[Chain] = deque()

    @property
    def base(self) -> int:
        """The index of the first chain that was not given back."""
        return (self._next - len(self._held)) & 0xFFFF

    def peek(self, count: int) -> list[Chain]:
        """Return up to ``count`` of the oldest chains. Raises ProtocolError for one that breaks the rules."""
        held = self._held
        missing = count - len(held)
        if missing > 0:
            offered = (self._avail[1] - self._next) & 0xFFFF
            if offered > self._size:
                raise ProtocolError(f"available index is {offered} ahead in a queue of {self._size}")
            for _ in range(min(missing, offered)):
                held.append(self._chain(self._avail[2 + self._next % self._size]))
                self._next = (self._next + 1) & 0xFFFF
        return list(islice(held, count))

    def push(self, written: int) -> None:
        """Give the oldest chain back, with ``written`` bytes in it."""
        _USED.pack_into(self._ring, self._done % self._size * 8, self._held.popleft().head, written)
        self._done = (self._done + 1) & 0xFFFF

    def publish(self) -> None:
        """Show the guest what was pushed and interrupt it if it wants to be."""
        if self._published == self._done:
            return
        self._used[1] = self._published = self._done
        _fence()
        if self.call >= 0 and not self._avail[0] & _NO_INTERRUPT:
            os.eventfd_write(self.call, 1)

    def want_kicks(self, wanted: bool) -> None:
        """Ask the guest to kick for new chains, or not to; after asking for kicks, look once more before waiting."""
        self._used[0] = 0 if wanted else _NO_NOTIFY
        if wanted:
            _fence()

    def _chain(self, head: int) -> Chain:
        views = self._walk(head)
        header = self._header
        size = sum(map(len, views))
        # One to write into must take a byte more: otherwise data would go out in packets of no bytes, for ever.
        if size < header or (self._flag and size == header):
            raise ProtocolError(f"buffer of {size} bytes has no room beside a header of {header}")
        first = views[0]
        if len(first) > header:
            return Chain(head, [first[:header]], [first[header:], *views[1:]], size - header)
        front, body = cut(views, header)
        return Chain(head, front, body, size - header)

    def _walk(self, index: int) -> list[memoryview]:
        views = []
        for _ in range(self._size):
            if index >= self._size:
                raise ProtocolError(f"descriptor {index} is outside the queue of {self._size}")
            address, length, flags, following = _DESC.unpack_from(self._desc, index * 16)
            if flags & _INDIRECT:
                raise ProtocolError(f"descriptor {index} is indirect, which was not negotiated")
            if flags & _WRITE != self._flag:
                raise ProtocolError(f"descriptor {index} has the wrong direction")
            if length:
                views.append(self._memory.at_guest(address, length))
            if not flags & _NEXT:
                return views
            index = following
        raise ProtocolError("descriptor chain is longer than the queue")
