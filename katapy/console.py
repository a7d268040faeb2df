"""Owns what a guest or a helper prints: keeps the end of it in memory and a bounded part of it in a file.

The other side is hostile: it may print without end, or control sequences for the terminal of whoever reads. So the
descriptor is always drained, memory and file are bounded, and only ``tail`` gives text out, printable.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path
from typing import Final

KEPT_BYTES: Final = 64 << 10
LOG_BYTES: Final = 1 << 20
_READ_BYTES: Final = 64 << 10
_LINE_MAX: Final = 512


class Console:
    """Drains a socket from now until it ends or ``close``; needs a running event loop."""

    def __init__(self, source: socket.socket, log: Path | None = None) -> None:
        """Take over ``source``; ``log`` is a file to write, created with mode 0600 and emptied.

        Raises OSError when ``log`` cannot be opened.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        self._log = os.open(log, flags, 0o600) if log is not None else -1
        self._logged = 0
        self._kept = bytearray()
        self._source = source
        self._source.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(source.fileno(), self._read)

    def tail(self, lines: int) -> str:
        """Return the last ``lines`` lines, at most 512 characters of each, control characters escaped.

        Empty if nothing was printed. What was kept is at most 64 KiB, however many lines that is.
        """
        self._drain()
        text = self._kept.decode(errors="backslashreplace").replace("\r\n", "\n").rstrip("\n")
        return "\n".join(_printable(line) for line in text.split("\n")[-lines:]) if text else ""

    def close(self) -> None:
        """Take what is still there, and stop; idempotent. ``tail`` works afterwards."""
        self._drain()
        self._stop_reading()
        if self._log >= 0:
            os.close(self._log)
            self._log = -1

    def _drain(self) -> None:
        """Read what is there now, at most the size of what is kept: the writer may be faster than the reader."""
        for _ in range(KEPT_BYTES // _READ_BYTES + 1):
            if self._source.fileno() < 0 or not self._read():
                return

    def _read(self) -> bool:
        try:
            data = self._source.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:  # the other side ended with unread data
            data = b""
        if not data:
            self._stop_reading()
            return False
        self._kept += data
        del self._kept[:-KEPT_BYTES]
        # A full disk must not stop the guest: the file is a copy, the memory is not.
        with contextlib.suppress(OSError):
            self._append(data)
        return True

    def _append(self, data: bytes) -> None:
        if self._log < 0:
            return
        if self._logged + len(data) > LOG_BYTES:
            os.ftruncate(self._log, 0)
            self._logged = 0
            data = bytes(self._kept)
        self._logged += os.write(self._log, data)

    def _stop_reading(self) -> None:
        if self._source.fileno() >= 0:
            self._loop.remove_reader(self._source.fileno())
            self._source.close()


def _printable(line: str) -> str:
    shown = "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in line)
    return shown if len(shown) <= _LINE_MAX else f"{shown[:_LINE_MAX]}..."
