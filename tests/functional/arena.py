"""Where sandboxes are attacked: a victim, a neighbour that is not to notice, and a host that is to lose nothing."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from harness import DEADLINE, await_true

from katapy import KilledBy, Sandbox
from katapy.sdk.process import Chunk, Process
from katapy.sdk.result import Result

# All but what makes a VM another shape, and so takes another template.
TIGHT: Final[dict[str, Any]] = {
    "disk": "48M",
    "inodes": 600,
    "processes": 24,
    "output": "1M",
    "file_size": "2T",
    "timeout": DEADLINE,
    "pool": "",
}


class Arena:
    """A victim and its neighbour, with a state directory and a directory for temporary files of their own."""

    def __init__(self, state: Path, temporary: Path, held: ExitStack) -> None:
        self.state, self.temporary, self._held = state, temporary, held
        self._victim: Sandbox | None = None
        self._neighbour = self.sandbox()
        self._echo: Process = held.enter_context(self._neighbour.start(["cat"], timeout=None))
        self.check_neighbour()

    def sandbox(self, **options: Any) -> Sandbox:
        """Return another sandbox, which ends with the arena at the latest."""
        return self._held.enter_context(Sandbox(**{**TIGHT, "state_dir": self.state, **options}))

    def victim(self) -> Sandbox:
        """Return a sandbox whose VM runs: that of the test before, or its successor."""
        if self._victim is None or not self._victim.alive:
            if self._victim is not None:
                self._victim.close()
            self._victim = self.sandbox()
        return self._victim

    def check(self) -> None:
        """Assert that the neighbour, and the victim or a successor, go on, and that nothing else is left."""
        self.check_neighbour()
        assert self._victim is not None
        sandboxes = [self._neighbour]
        if self._victim.alive:
            sandboxes.append(self._victim)
            assert self._victim.run(["echo", "on"]).check().stdout == "on\n"
        else:
            self._victim.close()
            with Sandbox(**TIGHT, state_dir=self.state) as successor:
                assert successor.run(["echo", "on"]).check().stdout == "on\n"
        expected = {each.id for each in sandboxes} | {f"{self._neighbour.id}-1"}
        await_true(lambda: set(os.listdir(self.state)) == expected)
        await_true(lambda: not os.listdir(self.temporary))

    def check_neighbour(self) -> None:
        """Assert that the neighbour answers."""
        self._echo.write(b"ping\n")
        assert self._echo.read(DEADLINE) == Chunk("stdout", b"ping\n")


@contextmanager
def arena(directory: Path) -> Iterator[Arena]:
    """Make an arena in ``directory``; afterwards all of it has gone."""
    state, temporary = directory / "state", directory / "temporary"
    for each in (state, temporary):
        each.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(temporary))
        with ExitStack() as held:
            yield Arena(state, temporary, held)
        assert os.listdir(state) == []
        assert os.listdir(temporary) == []


def python(code: str) -> list[str]:
    """Return a command that runs a program."""
    return ["python3", "-c", code]


def helpers(state: Path, sandbox_id: str) -> dict[str, int]:
    """Return the pids of what serves a sandbox on the host, by name."""
    found = json.loads((state / sandbox_id / "state.json").read_text())
    return {each["name"]: each["pid"] for each in (found["shim"], *found["helpers"])}


def assert_ended(
    result: Result[Any], by: KilledBy, *, trusted: bool = True, exit_code: int | None = None, signal: int | None = None
) -> None:
    """Assert the whole of a verdict that has no numbers in it but these."""
    verdict = result.verdict
    shown = (result.stdout[-300:], result.stderr[-300:])
    found = (verdict.killed_by, verdict.trusted, verdict.exit_code, verdict.signal)
    assert found == (by, trusted, exit_code, signal), shown
