"""`katapy sandbox` with standard streams that somebody who shares them has made non-blocking."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import cast

import pytest

from katapy.cli import sandbox
from katapy.sdk.process import Process


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Both ends of one, neither of which blocks."""
    reading, writing = os.pipe2(os.O_NONBLOCK)
    yield reading, writing
    for fd in (reading, writing):
        os.close(fd)


def test_output_that_is_not_taken_at_once(pipe: tuple[int, int]) -> None:
    """It was an internal error, and the command was killed."""
    reading, writing = pipe
    data = os.urandom(1 << 20)
    thread = threading.Thread(target=sandbox._write, args=(writing, data))
    thread.start()
    os.set_blocking(reading, True)
    got = bytearray()
    while len(got) < len(data):
        got += os.read(reading, 1 << 16)
    thread.join()
    assert got == data


def test_input_that_is_not_there_yet() -> None:
    """It was taken for the end, and the command had none."""
    reading, writing = os.pipe2(os.O_NONBLOCK)
    heard, began = bytearray(), threading.Event()

    class Listening:
        def write(self, data: bytes) -> None:
            heard.extend(data)
            began.set()

        def close_stdin(self) -> None:
            heard.extend(b".")

    thread = threading.Thread(target=sandbox._copy_input, args=(reading, cast(Process, Listening())))
    thread.start()
    os.write(writing, b"first")
    assert began.wait(60)
    os.write(writing, b" second")
    os.close(writing)
    thread.join()
    os.close(reading)
    assert heard == b"first second."
