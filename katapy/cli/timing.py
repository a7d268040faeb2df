"""`--timing`: where the time of a run went, of what the command itself has seen and of what the shim tells."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from katapy import timing
from katapy.errors import KatapyError, Unavailable

if TYPE_CHECKING:
    from katapy.client.pod import Pod


class Report:
    """Records from the start of the process on, where it is wanted: as ``text`` on stderr, as JSON in ``file``."""

    def __init__(self, *, text: bool, file: Path | None) -> None:
        self._text, self._file = text, file
        self._phases: list[timing.Phase] = []
        self._timeline = timing.record() if text or file is not None else None
        if self._timeline is not None:
            self._timeline.add("load the command line", timing.process_start(), time.monotonic())

    def ask(self, pod: Pod) -> None:
        """Take what the shim knows; without it, where it cannot tell."""
        if self._timeline is not None:
            from katapy.client.observe import ShimClient

            try:
                self._phases = ShimClient(pod.client).timing()
            except KatapyError as error:
                click.echo(f"katapy: warning: the shim tells no times: {error}", err=True)

    def give(self) -> None:
        """Print and write it. Raises Unavailable where the file cannot be written."""
        if self._timeline is None:
            return
        phases = [*self._timeline.phases, *self._phases]
        if self._text:
            click.echo(timing.as_text(phases), err=True)
        if self._file is not None:
            from katapy.jsonfile import dump

            try:
                self._file.write_bytes(dump(timing.as_json(phases)) + b"\n")
            except OSError as error:
                raise Unavailable(f"cannot write {self._file}: {error.strerror}") from error
