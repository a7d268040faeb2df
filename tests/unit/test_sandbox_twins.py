"""The blocking and the asyncio classes are twins, and `katapy` offers both without loading them."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
import threading
from contextlib import suppress
from typing import cast

import pytest

import katapy
from katapy import errors
from katapy.sdk.aio import AsyncFiles, AsyncProcess, AsyncSandbox, _in_thread, _settle
from katapy.sdk.files import Files
from katapy.sdk.output import Output
from katapy.sdk.process import Chunk, Process
from katapy.sdk.sandbox import Sandbox
from katapy.verdict import KilledBy, Verdict

# Of a process: what its sandbox calls, and what has no value before it is made.
_INTERNAL = {"remove"}
_TWINS = [(Sandbox, AsyncSandbox), (Files, AsyncFiles), (Process, AsyncProcess)]


def _public(cls: type) -> set[str]:
    return {name for name in vars(cls) if not name.startswith("_")} - _INTERNAL


@pytest.mark.parametrize(("blocking", "twin"), _TWINS)
def test_the_twins_have_the_same_names(blocking: type, twin: type) -> None:
    # An attribute that the constructor makes is a property of the twin.
    extra = {"truncated"} if twin is AsyncProcess else set()
    assert _public(twin) - extra == _public(blocking)


@pytest.mark.parametrize(("blocking", "twin"), _TWINS)
def test_the_twins_have_the_same_parameters(blocking: type, twin: type) -> None:
    names = _public(blocking) | ({"__init__"} if blocking is Sandbox else set())
    for name in names:
        ours, theirs = getattr(blocking, name), getattr(twin, name)
        assert isinstance(ours, property) == isinstance(theirs, property), name
        if not isinstance(ours, property):
            assert inspect.signature(theirs).parameters == inspect.signature(ours).parameters, name


def test_what_may_block_is_a_coroutine() -> None:
    at_once = {"close_stdin", "kill", "resize", "send_signal"}
    for _, twin in _TWINS:
        for name in _public(twin) - at_once:
            member = vars(twin)[name]
            kinds = (inspect.iscoroutinefunction(member), inspect.isasyncgenfunction(member))
            assert isinstance(member, property) or any(kinds), name


def test_each_name_is_what_it_says() -> None:
    for name in katapy.__all__:
        assert name == "__version__" or getattr(katapy, name).__name__ == name
    assert set(katapy.__all__) <= set(dir(katapy))
    with pytest.raises(AttributeError, match="no attribute 'Sandbux'"):
        _ = katapy.Sandbux


def test_all_errors_that_a_user_may_meet_are_offered() -> None:
    known = {name for name, each in vars(errors).items() if isinstance(each, type) and issubclass(each, Exception)}
    assert known - {"Internal"} <= set(katapy.__all__)


def test_importing_the_package_loads_nothing_of_it() -> None:
    code = "import sys, katapy; print([name for name in sys.modules if name.startswith('katapy')])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "['katapy']\n"


def test_the_sdk_is_described_without_what_starts_it() -> None:
    """Bad arguments are told, and loading costs little, where nothing is started."""
    code = """
import sys
from katapy import AsyncSandbox, InvalidArgument, Sandbox
for kind in (Sandbox, AsyncSandbox):
    kind(memory="64M")
    try:
        kind(cpus=0)
    except InvalidArgument as error:
        print(error)
print(sorted({"grpc", "google.protobuf", "click", "katapy.client", "katapy.oci"} & set(sys.modules)))
"""
    wanted = "cpus: 0 is not a number from 0.05 to 64\n" * 2 + "[]\n"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == wanted


async def test_a_call_is_made_in_a_thread_and_its_error_is_the_caller_s() -> None:
    assert await _in_thread(threading.current_thread) is not threading.current_thread()
    with pytest.raises(errors.NotFound, match="gone"):
        await _settle(_in_thread(_raise_not_found))


async def test_any_number_of_calls_waits_at_once() -> None:
    """asyncio.to_thread has as many threads as the machine has CPUs and four: then the barrier would never open."""
    barrier = threading.Barrier(100)
    places = await asyncio.gather(*(_in_thread(barrier.wait) for _ in range(100)))
    assert sorted(places) == list(range(100))


async def test_who_is_cancelled_is_told_when_the_call_is_over() -> None:
    begun, go_on, ended = asyncio.Event(), threading.Event(), False
    loop = asyncio.get_running_loop()

    def work() -> None:
        nonlocal ended
        loop.call_soon_threadsafe(begun.set)
        go_on.wait()
        ended = True

    task = asyncio.create_task(_settle(_in_thread(work)))
    await begun.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.wait([task], timeout=0.01)
        assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended


def test_callbacks_get_whole_characters() -> None:
    told: list[str] = []
    output = Output(text=True, on_stdout=told.append, on_stderr=None)
    for piece in (b"\xe2\x82", b"", b"\xac", b"a\xff"):
        output.take(Chunk("stdout", piece))
    output.take(Chunk("stderr", b"unseen"))
    assert told == ["\u20ac", "a\ufffd"]
    result = output.result(("x",), _VERDICT, truncated=False)
    assert (result.stdout, result.stderr) == ("\u20aca\ufffd", "unseen")


def test_callbacks_get_bytes_where_bytes_are_wanted() -> None:
    told: list[bytes] = []
    output = Output(text=False, on_stdout=None, on_stderr=told.append)
    assert output.is_watched
    output.take(Chunk("stderr", b"\xe2"))
    assert told == [b"\xe2"]
    assert output.result(("x",), _VERDICT, truncated=True).stderr == b"\xe2"
    assert not Output(text=False, on_stdout=None, on_stderr=None).is_watched


_VERDICT = Verdict(
    exit_code=0,
    signal=None,
    killed_by=KilledBy.NONE,
    trusted=True,
    wall_seconds=1.0,
    cpu_seconds=None,
    peak_memory_bytes=None,
    host_cpu_seconds=None,
    accelerator="tcg",
)


def _raise_not_found() -> None:
    raise errors.NotFound("gone")


async def test_output_that_is_there_is_not_lost_with_who_waits_for_it() -> None:
    """It was taken, and then others had their turn: whoever was cancelled there, or would not wait, lost a piece."""
    chunks = [Chunk("stdout", bytes([65 + number])) for number in range(3)]

    class Talking:
        def read(self, _timeout: float | None = None) -> Chunk | None:
            return chunks.pop(0)

    process = AsyncProcess(cast(Process, Talking()))
    first = await process.read(timeout=0)
    reading = asyncio.create_task(process.read())
    await asyncio.sleep(0)
    reading.cancel()
    with suppress(asyncio.CancelledError):
        assert await reading is None
    second = await process.read()
    assert [chunk and chunk.data for chunk in (first, second)] == [b"A", b"B"]
