"""What one run prints, as its caller wants it."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from katapy.sdk.result import Result

if TYPE_CHECKING:
    from katapy.sdk.process import Chunk
    from katapy.verdict import Verdict

Callback = Callable[[Any], object]


class Output:
    """Text or bytes, told to callbacks piece by piece and kept for the result."""

    def __init__(self, *, text: bool, on_stdout: Callback | None, on_stderr: Callback | None) -> None:
        """Tell the callbacks that there are; with ``text`` they get whole characters only."""
        self._text = text
        self._calls = {name: call for name, call in (("stdout", on_stdout), ("stderr", on_stderr)) if call}
        self._decoders = {name: codecs.getincrementaldecoder("utf-8")("replace") for name in self._calls}
        self._taken: dict[str, list[bytes]] = {"stdout": [], "stderr": []}

    @property
    def is_watched(self) -> bool:
        """Whether somebody wants to be told."""
        return bool(self._calls)

    def take(self, chunk: Chunk) -> object:
        """Keep the next piece, and return what the callback for it returns."""
        self._taken[chunk.stream].append(chunk.data)
        call = self._calls.get(chunk.stream)
        if call is None:
            return None
        piece = self._decoders[chunk.stream].decode(chunk.data) if self._text else chunk.data
        return call(piece) if piece else None

    def result(self, args: tuple[str, ...], verdict: Verdict, *, truncated: bool) -> Result[str] | Result[bytes]:
        """Return the result of the run."""
        stdout, stderr = (b"".join(pieces) for pieces in self._taken.values())
        if not self._text:
            return Result(args, stdout, stderr, verdict, truncated)
        return Result(args, stdout.decode(errors="replace"), stderr.decode(errors="replace"), verdict, truncated)
