"""Where the time went: phases of several tasks and threads, put in order, and shown."""

from __future__ import annotations

import asyncio
import time
from contextvars import copy_context

import pytest

from katapy import timing
from katapy.timing import Phase

PHASES = [Phase("inner", 10.2, 10.4), Phase("outer", 10.0, 11.0)]


def test_phases_of_tasks_and_threads_come_together() -> None:
    async def work() -> timing.Timeline:
        timeline = timing.record()
        with timing.phase("all"):
            await asyncio.gather(step("one"), asyncio.to_thread(sleepless, "two"))
        return timeline

    async def step(name: str) -> None:
        with timing.phase(name):
            await asyncio.sleep(0)

    def sleepless(name: str) -> None:
        with timing.phase(name):
            pass

    timeline = copy_context().run(asyncio.run, work())
    assert sorted(each.name for each in timeline.phases) == ["all", "one", "two"]
    assert all(each.start <= each.end <= time.monotonic() for each in timeline.phases)


def test_a_phase_that_fails_is_noted() -> None:
    def work() -> timing.Timeline:
        timeline = timing.record()
        with pytest.raises(ValueError, match="wrong"), timing.phase("failing"):
            raise ValueError("wrong")
        return timeline

    assert [each.name for each in copy_context().run(work).phases] == ["failing"]


def test_nothing_is_noted_where_nobody_asks() -> None:
    with timing.phase("unseen"):
        pass


def test_json_begins_at_zero() -> None:
    assert timing.as_json(PHASES) == {
        "phases": [{"name": "outer", "start": 0.0, "end": 1.0}, {"name": "inner", "start": 0.2, "end": 0.4}],
        "total": 1.0,
    }
    assert timing.as_json([]) == {"phases": [], "total": 0.0}


def test_text_shows_when_and_how_long() -> None:
    assert timing.as_text(PHASES).splitlines() == [
        "   at ms     took",
        "     0.0   1000.0 |########################################| outer",
        "   200.0    200.0 |        ########                        | inner",
        "  1000.0 in all",
    ]


def test_the_start_of_this_process_is_in_its_past() -> None:
    assert 0 < time.monotonic() - timing.process_start() < 24 * 3600
