"""What the lab says of its tests while they run, and where it is when it says nothing more."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final

from outcomes import DIED, LabError, Outcomes

_EVENTS_MAX: Final = 16 << 20


@dataclass
class Progress:
    """What one lab says of its tests, line by line."""

    outcomes: Outcomes = field(default_factory=Outcomes)
    run: str = ""
    text: bytearray = field(default_factory=bytearray)
    running: str = ""
    since: float = 0.0
    status: int | None = None

    def take(self, data: bytes) -> None:
        """Take bytes as they come; lines that make no sense are left out."""
        lines = (self.text[self.text.rfind(b"\n") + 1 :] + data).split(b"\n")[:-1]
        if len(self.text) + len(data) > _EVENTS_MAX:
            raise LabError("the lab says more of its tests than there is to say")
        self.text += data
        for line in lines:
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    self._take(event)

    def _take(self, event: dict[str, Any]) -> None:
        self.run = str(event.get("run", self.run))
        self.outcomes.take(self.run, event)
        if "began" in event:
            self.running, self.since = str(event["began"]), monotonic()
        if "ended" in event:
            self.running = ""
        if "status" in event:
            self.status = int(event["status"])

    def died(self) -> None:
        """Note that the lab has ended where it was."""
        if self.running:
            self.outcomes.take(self.run, {"test": self.running, "outcome": DIED})

    def place(self) -> str:
        """Return where the lab is."""
        if self.running:
            return f"in {self.running}, for {monotonic() - self.since:.0f} s"
        return "between two tests" if self.text else "before the first test"
