"""Events: one subscriber, which loses its stream when it is slow or another one comes; and the watch on files."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from katapy_agent.events import Events, Exit, SubscriberTooSlow
from katapy_agent.oom import FileWatch


def end(number: int) -> Exit:
    return Exit("c", "", number)


async def test_events_from_the_subscription_on() -> None:
    events = Events()
    events.publish(end(0))
    stream = events.subscribe()
    events.publish(end(1))
    events.publish(end(2))
    assert [await anext(stream), await anext(stream)] == [end(1), end(2)]


async def test_a_new_subscriber_ends_the_older_stream() -> None:
    events = Events()
    older = events.subscribe()
    newer = events.subscribe()
    events.publish(end(1))
    assert [event async for event in older] == []
    assert await anext(newer) == end(1)


async def test_a_slow_subscriber_gets_what_was_kept_and_then_an_error() -> None:
    events = Events()
    stream = events.subscribe()
    for number in range(3000):
        events.publish(end(number))
    assert [await anext(stream) for _ in range(1024)] == [end(number) for number in range(1024)]
    with pytest.raises(SubscriberTooSlow):
        await anext(stream)
    # The next one starts anew.
    stream = events.subscribe()
    events.publish(end(1))
    assert await anext(stream) == end(1)


async def test_file_watch_calls_back_for_the_file_that_changed(tmp_path: Path) -> None:
    files, changed = FileWatch(), asyncio.Queue[str]()
    for name in ("a", "b"):
        (tmp_path / name).touch()
        files.add(str(tmp_path / name), lambda name=name: changed.put_nowait(name))  # type: ignore[misc]
    (tmp_path / "b").write_text("x")
    assert await asyncio.wait_for(changed.get(), 30) == "b"
    (tmp_path / "b").unlink()
    (tmp_path / "a").write_text("x")
    while await asyncio.wait_for(changed.get(), 30) != "a":
        pass
