"""Says what is going on when it takes longer than two seconds, on a terminal only."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Final, Self

_PATIENCE: Final = 2.0
_INTERVAL: Final = 0.5
_CLEAR: Final = "\r\x1b[K"


class Progress:
    """A line on stderr with what is done and for how long; gone when it is done."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True)

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _show(self) -> None:
        began = time.monotonic()
        shown = False
        while not self._done.wait(_INTERVAL if shown else _PATIENCE):
            sys.stderr.write(f"{_CLEAR}{self._what} ({time.monotonic() - began:.0f} s)")
            sys.stderr.flush()
            shown = True
        if shown:
            sys.stderr.write(_CLEAR)
            sys.stderr.flush()
