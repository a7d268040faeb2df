"""Which tests have passed in the lab, and another lab for those that have not.

An emulated SVM is not perfect: now and then a VM in the lab dies, or the lab itself does. Where the hardware path is
broken more fails, or the same again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final

_LABS: Final = 4
_FAILED_MAX: Final = 1
_TESTS_FAILED: Final = 1  # pytest.ExitCode

DIED: Final = "died"
"""The outcome of a test in which a lab has died."""
Run = Mapping[str, object]
"""One of pytest: its name, its tests, and katapy's configuration."""


class LabError(Exception):
    """The lab did not come to its end; the text is fit for a user."""


class Interrupted(LabError):
    """Somebody wants the lab to end."""


@dataclass
class Outcomes:
    """What became of the tests of each run of pytest, by its name, in all labs so far."""

    collected: dict[str, list[str]] = field(default_factory=dict)
    passed: set[tuple[str, str]] = field(default_factory=set)
    failed: set[tuple[str, str]] = field(default_factory=set)
    died: set[tuple[str, str]] = field(default_factory=set)
    """Those in which a lab has died."""

    def left(self, run: str) -> list[str] | None:
        """Return the tests of a run that have not passed; None where it has not come so far as to find them."""
        found = self.collected.get(run)
        return None if found is None else [test for test in found if (run, test) not in self.passed]

    def take(self, run: str, event: dict[str, Any]) -> None:
        """Take what one lab said of its run."""
        if "collected" in event:
            self.collected.setdefault(run, [str(test) for test in event["collected"]])
        if "test" in event:
            test = (run, str(event["test"]))
            if event["outcome"] == "passed":
                self.passed.add(test)
            else:
                # Perhaps when all was over, after it had passed.
                self.passed.discard(test)
                (self.died if event["outcome"] == DIED else self.failed).add(test)

    def left_of(self, runs: Sequence[Run]) -> list[Run]:
        """Return the runs that have tests which have not passed, with these alone."""
        found = [(run, self.left(str(run["name"]))) for run in runs]
        return [run if left is None else {**run, "tests": left} for run, left in found if left is None or left]


def run_until_passed(runs: Sequence[Run], lab: Callable[[Sequence[Run], Outcomes], int], ends: float) -> int:
    """Run tests in a lab, and those that have not passed in another one; return the exit status.

    ``lab`` is given runs, and notes what becomes of their tests; it returns pytest's exit status. Where two tests fail
    they are not tried again, nor is anything after ``ends``, a time of `time.monotonic`. Raises what the last lab
    raises.
    """
    outcomes = Outcomes()
    for number in range(1, _LABS + 1):
        died: LabError | None = None
        try:
            status = lab(runs, outcomes)
        except Interrupted:
            raise
        except LabError as error:
            status, died = _TESTS_FAILED, error
        runs = outcomes.left_of(runs)
        if status == 0:
            break
        final = number == _LABS or len(outcomes.failed) > _FAILED_MAX or monotonic() > ends
        if status != _TESTS_FAILED or not runs or final:
            if died is not None:
                raise died
            return status
        print(f"lab: {died or 'tests have failed'}\nlab: another one, for what has not passed", flush=True)
    for run, test in sorted(outcomes.failed | outcomes.died):
        print(f"lab: passed at a later attempt only: {test} ({run})", flush=True)
    return 0
