"""The tests' own list of children, where threads end meanwhile."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator

import pytest
from own_children import children


@pytest.fixture
def threads() -> Iterator[None]:
    """Threads that begin and end all the time."""
    over = threading.Event()

    def go_on() -> None:
        while not over.is_set():
            threading.Thread(target=int).start()

    going = threading.Thread(target=go_on)
    going.start()
    yield
    over.set()
    going.join()


@pytest.mark.usefixtures("threads")
def test_children_beside_threads_that_end() -> None:
    """A thread that ended between the listing and the question was an error of whatever test asked."""
    with subprocess.Popen(["sleep", "1000"]) as sleeper:
        try:
            assert all(sleeper.pid in children() for _ in range(500))
        finally:
            sleeper.kill()
    assert sleeper.pid not in children()
