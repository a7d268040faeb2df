"""Logging: the standard library's, set up once for a process, in the two formats that the engines read from runc.

What is logged may hold text of a guest. A record is always one line: text is quoted as Go's logrus quotes it, which is
also valid JSON.
"""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import suppress
from typing import Final, Literal, TextIO

from katapy.errors import InvalidArgument
from katapy.jsonfile import printable

Format = Literal["text", "json"]
_BARE: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._/@^+")


class _Formatter(logging.Formatter):
    """One record as ``level``, ``msg`` and ``time`` (RFC 3339, UTC); with a traceback where there is one."""

    def __init__(self, format: Format) -> None:  # noqa: A002
        super().__init__()
        self._json = format == "json"

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.exc_info:
            message = f"{message}\n{self.formatException(record.exc_info)}"
        level = record.levelname.lower()
        moment = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03}Z"
        if self._json:
            return json.dumps({"level": level, "msg": message, "time": moment}, separators=(",", ":"))
        return f'time="{moment}" level={level} msg={_quoted(message)}'


def setup(*, debug: bool = False, file: str | None = None, format: Format = "text") -> None:  # noqa: A002
    """Send the log to ``file``, appended to (mode 0600 where it is new), or to stderr; warnings and worse.

    ``debug`` sends everything. Replaces what was set up before. Raises InvalidArgument where the file cannot be opened.
    """
    handler = logging.StreamHandler(None if file is None else _open(file))
    handler.setFormatter(_Formatter(format))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if debug else logging.WARNING)


def copy_to_fifo(path: str) -> None:
    """Send the log to a fifo, too, for as long as somebody reads it; without a reader now there is no copy."""
    with suppress(OSError):
        handler = _Fifo(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY))
        handler.setFormatter(_Formatter("text"))
        logging.getLogger().addHandler(handler)


class _Fifo(logging.Handler):
    """A reader that is slow, or has left for a while, misses records: nobody waits for it."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            os.write(self._fd, f"{self.format(record)}\n".encode(errors="backslashreplace"))


def _open(file: str) -> TextIO:
    try:
        fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY, 0o600)
    except OSError as error:
        raise InvalidArgument(f"log {printable(file)}: cannot be opened: {(error.strerror or '').lower()}") from error
    except ValueError as error:  # NUL in the path
        raise InvalidArgument(f"log {printable(file)}: not a valid path") from error
    return os.fdopen(fd, "a", encoding="utf-8", errors="backslashreplace")


def _quoted(text: str) -> str:
    return text if text and _BARE.issuperset(text) else json.dumps(text)
