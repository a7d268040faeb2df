"""What has not passed in a lab gets another one; what keeps failing, or fails too often, fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic

import pytest
from outcomes import Interrupted, LabError, Outcomes, Run, run_until_passed
from progress import Progress

RUNS: list[Run] = [{"name": "kernel", "tests": ["t.py"]}, {"name": "user", "tests": ["u.py"]}]
Lab = Callable[[Progress], int]


def _line(progress: Progress, **event: object) -> None:
    text = str(event).replace("'", '"')
    progress.take(f"{text}\n".encode())


def _run(progress: Progress, run: str, *tests: tuple[str, str], collected: Sequence[str] = ()) -> None:
    _line(progress, run=run)
    _line(progress, collected=list(collected) or [name for name, _ in tests])
    for name, outcome in tests:
        _line(progress, began=name)
        _line(progress, test=name, outcome=outcome)
        _line(progress, ended=name)


def _play(*labs: Lab, seconds: float = 60) -> tuple[int, list[list[Run]]]:
    """Return the status, and what each lab was given to run."""
    given: list[list[Run]] = []

    def lab(runs: Sequence[Run], outcomes: Outcomes) -> int:
        given.append(list(runs))
        progress = Progress(outcomes)
        try:
            return labs[len(given) - 1](progress)
        except LabError:
            progress.died()
            raise

    return run_until_passed(RUNS, lab, monotonic() + seconds), given


def _all_pass(progress: Progress) -> int:
    _run(progress, "kernel", ("a", "passed"), ("b", "passed"))
    _run(progress, "user", ("c", "passed"))
    return 0


def _one_fails(progress: Progress) -> int:
    _run(progress, "kernel", ("a", "passed"), ("b", "failed"))
    _run(progress, "user", ("c", "passed"))
    return 1


def _dies_in_b(progress: Progress) -> int:
    _run(progress, "kernel", ("a", "passed"), collected=["a", "b", "d"])
    _line(progress, began="b")
    # It has passed, but what comes after it has not ended.
    _line(progress, test="b", outcome="passed")
    raise LabError("the lab has ended by itself")


def test_one_lab_is_enough_where_all_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert _play(_all_pass) == (0, [RUNS])
    assert capsys.readouterr().out == ""


def test_what_has_failed_gets_another_lab(capsys: pytest.CaptureFixture[str]) -> None:
    def second(progress: Progress) -> int:
        _run(progress, "kernel", ("b", "passed"))
        return 0

    assert _play(_one_fails, second) == (0, [RUNS, [{"name": "kernel", "tests": ["b"]}]])
    assert "lab: passed at a later attempt only: b (kernel)\n" in capsys.readouterr().out


def test_a_lab_that_dies_is_followed_by_one_for_the_rest() -> None:
    def second(progress: Progress) -> int:
        _run(progress, "kernel", ("b", "passed"), ("d", "passed"))
        _run(progress, "user", ("c", "passed"))
        return 0

    assert _play(_dies_in_b, second) == (0, [RUNS, [{"name": "kernel", "tests": ["b", "d"]}, RUNS[1]]])


def test_what_keeps_failing_fails() -> None:
    def again(progress: Progress) -> int:
        _run(progress, "kernel", ("b", "failed"))
        return 1

    status, given = _play(_one_fails, again, again, again)
    assert (status, len(given)) == (1, 4)


def test_a_lab_that_always_dies_says_why() -> None:
    with pytest.raises(LabError, match="ended by itself"):
        _play(_dies_in_b, _dies_in_b, _dies_in_b, _dies_in_b)


def test_two_failures_are_no_accident() -> None:
    def broken(progress: Progress) -> int:
        _run(progress, "kernel", *((name, "failed") for name in "ab"))
        return 1

    assert _play(broken) == (1, [RUNS])


def test_a_failure_in_the_fixtures_after_a_test_counts() -> None:
    def first(progress: Progress) -> int:
        _run(progress, "kernel", ("a", "passed"), ("a", "failed"), collected=["a"])
        _run(progress, "user", ("c", "passed"))
        return 1

    def second(progress: Progress) -> int:
        _run(progress, "kernel", ("a", "passed"))
        return 0

    assert _play(first, second)[1][1] == [{"name": "kernel", "tests": ["a"]}]


def test_what_no_other_lab_would_mend_ends_it() -> None:
    def usage(progress: Progress) -> int:
        return 4

    def interrupted(progress: Progress) -> int:
        raise Interrupted("interrupted by signal 15")

    assert _play(usage) == (4, [RUNS])
    assert _play(_one_fails, seconds=-1) == (1, [RUNS])
    with pytest.raises(Interrupted):
        _play(interrupted)
