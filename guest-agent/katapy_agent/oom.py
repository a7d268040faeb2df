"""Learns of out-of-memory kills in cgroups the moment the kernel counts them: inotify on their memory.events.

What a cgroup is belongs to `cgroups`; here it is a file whose change is worth a call.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
from collections.abc import Callable
from typing import Final

_IN_MODIFY: Final = 0x2
_IN_IGNORED: Final = 0x8000
_EVENT: Final = struct.Struct("iIII")

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)
    return result


class FileWatch:
    """Calls back when watched files change. Owns one inotify descriptor for all of them (inotify(7))."""

    def __init__(self) -> None:
        self._fd = _check(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "inotify")
        self._callbacks: dict[int, Callable[[], None]] = {}
        asyncio.get_running_loop().add_reader(self._fd, self._read)

    def add(self, path: str, changed: Callable[[], None]) -> int:
        """Call ``changed`` after every change of ``path``, until the watch that is returned is removed.

        Raises OSError, also where there are no more watches: containers have theirs, of the same number.
        """
        watch = _check(_libc.inotify_add_watch(self._fd, os.fsencode(path), _IN_MODIFY), path)
        self._callbacks[watch] = changed
        return watch

    def remove(self, watch: int) -> None:
        """Forget a watch. The kernel does not, by itself, where the file was a cgroup's."""
        if self._callbacks.pop(watch, None) is not None:
            _libc.inotify_rm_watch(self._fd, watch)

    def _read(self) -> None:
        # All records are without a name, since only files are watched.
        records = os.read(self._fd, _EVENT.size * 256)
        for watch, mask, _cookie, _length in _EVENT.iter_unpack(records):
            if mask & _IN_IGNORED:
                self._callbacks.pop(watch, None)
            elif (changed := self._callbacks.get(watch)) is not None:
                changed()
