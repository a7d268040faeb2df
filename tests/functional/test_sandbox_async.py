"""``AsyncSandbox`` with real VMs: what runs at once, what is cancelled, and where callbacks are called.

Whether a command is gone is told by a name that all its processes hold: see ``_HOLD``.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import pytest

from katapy import AsyncProcess, AsyncSandbox, CommandNotFound, InvalidState, KilledBy, Timeout
from katapy.state import DEFAULT_ROOT

SECONDS = 120.0
# Of a socket in the VM's network namespace, which all runs of a sandbox have in common.
_NAME = "import socket; name = socket.socket(socket.AF_UNIX); name.bind('\\0held')"
# The child has left the process group, and holds the name too.
_HOLD = [
    "python3",
    "-c",
    f"""
import os, signal
{_NAME}
if os.fork():
    print("held", flush=True)
else:
    os.setsid()
signal.pause()
""",
]


@pytest.fixture
async def sandbox(host: None) -> AsyncIterator[AsyncSandbox]:
    """One that is started; afterwards nothing of it is left."""
    async with AsyncSandbox(timeout=SECONDS) as started:
        state = Path(DEFAULT_ROOT, started.id)
        assert state.is_dir()
        yield started
    assert not state.exists()


async def _is_free(sandbox: AsyncSandbox) -> bool:
    """Tell whether no process of ``_HOLD`` is left."""
    return (await sandbox.run(["python3", "-c", _NAME])).ok


async def test_runs_in_one_sandbox_are_there_at_once(sandbox: AsyncSandbox) -> None:
    """Each of them waits for all the others."""
    wait = "mkdir -p /met; touch /met/$0; until [ $(ls /met | wc -l) = 4 ]; do sleep 0.1; done; echo $0"
    results = await asyncio.gather(*(sandbox.run(["sh", "-c", wait, str(number)]) for number in range(4)))
    assert [(result.stdout, result.killed_by) for result in results] == [
        (f"{number}\n", KilledBy.NONE) for number in range(4)
    ]


async def test_sandboxes_are_there_at_once(host: None) -> None:
    """Both have printed before either may end; two VMs have two kernels."""
    async with AsyncSandbox(timeout=SECONDS) as one, AsyncSandbox(timeout=SECONDS) as other:
        command = ["sh", "-c", "cat /proc/sys/kernel/random/boot_id; read line; echo $line"]
        processes = await asyncio.gather(one.start(command), other.start(command))
        kernels = await asyncio.gather(*(process.read() for process in processes))
        for number, process in enumerate(processes):
            await process.write(b"%d\n" % number)
        assert [await process.read() for process in processes] == [("stdout", b"0\n"), ("stdout", b"1\n")]
        assert [(await process.wait()).exit_code for process in processes] == [0, 0]
        assert None not in kernels
        assert kernels[0] != kernels[1]


async def test_a_run_that_is_cancelled_has_been_killed(sandbox: AsyncSandbox) -> None:
    held = asyncio.Event()
    run = asyncio.create_task(sandbox.run(_HOLD, on_stdout=lambda _: held.set()))
    await held.wait()
    assert not await _is_free(sandbox)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert await _is_free(sandbox)


async def test_a_run_that_is_cancelled_twice_has_been_killed(sandbox: AsyncSandbox) -> None:
    """The second time while the first is being heeded."""
    held = asyncio.Event()
    run = asyncio.create_task(sandbox.run(_HOLD, on_stdout=lambda _: held.set()))
    await held.wait()
    run.cancel()
    await asyncio.sleep(0)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert await _is_free(sandbox)


async def test_a_run_that_is_cancelled_while_it_starts_has_been_killed(host: None) -> None:
    """Its VM had not started either, and serves the next one."""
    async with AsyncExitStack() as stack:
        sandbox = AsyncSandbox(timeout=SECONDS)
        stack.push_async_callback(sandbox.close)
        run = asyncio.create_task(sandbox.run(_HOLD))
        await asyncio.sleep(0)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert sandbox.alive
        assert await _is_free(sandbox)


async def test_a_sandbox_whose_start_is_cancelled_is_closed(host: None) -> None:
    sandbox = AsyncSandbox()

    async def enter() -> None:
        async with sandbox:
            pytest.fail("it was cancelled before")

    task = asyncio.create_task(enter())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(InvalidState, match="closed"):
        await sandbox.run(["true"])


async def test_a_deadline_of_asyncio_s_kills_too(sandbox: AsyncSandbox) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await sandbox.run(_HOLD)
    assert await _is_free(sandbox)


async def test_output_streams_and_leaving_the_loop_ends_the_command(sandbox: AsyncSandbox) -> None:
    said = [chunk async for chunk in sandbox.stream(["sh", "-c", "echo out; read line; echo $line >&2"], input="in\n")]
    assert sorted(said) == [("stderr", b"in\n"), ("stdout", b"out\n")]

    async with aclosing(sandbox.stream(_HOLD)) as stream:
        async for chunk in stream:
            assert chunk == ("stdout", b"held\n")
            break
    assert await _is_free(sandbox)


async def test_much_output_comes_whole_and_leaves_the_loop_its_turns(sandbox: AsyncSandbox) -> None:
    """Who takes it more slowly than it is printed makes the command wait: it is not ended for that."""
    turns, size = 0, 8 << 20

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    taken = before = 0
    async for chunk in sandbox.stream(["head", "-c", str(size), "/dev/zero"]):
        assert turns > before
        before = turns
        taken += len(chunk.data)
    counting.cancel()
    assert taken == size


async def test_a_process_is_talked_with(sandbox: AsyncSandbox) -> None:
    async with await sandbox.start(["cat"]) as process:
        with pytest.raises(Timeout, match=r"nothing was printed for 0.2 s"):
            await process.read(timeout=0.2)
        with pytest.raises(Timeout, match=r"has not ended after 0.2 s"):
            await process.wait(timeout=0.2)
        await process.write(b"one\n")
        assert await process.read() == ("stdout", b"one\n")
        await process.write(b"two\n")
        process.close_stdin()
        assert [chunk async for chunk in process] == [("stdout", b"two\n")]
        assert (await process.wait()).exit_code == 0
        assert not process.running
        with pytest.raises(InvalidState):
            await process.write(b"three\n")


async def test_a_read_that_is_cancelled_loses_nothing(sandbox: AsyncSandbox) -> None:
    async with await sandbox.start(["cat"]) as process:
        reading = asyncio.create_task(process.read())
        await asyncio.wait([reading], timeout=0.2)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        readers = [asyncio.create_task(process.read()) for _ in range(2)]
        await process.write(b"one\n")
        await asyncio.wait(readers, return_when=asyncio.FIRST_COMPLETED)
        await process.write(b"two\n")
        assert [await reader for reader in readers] == [("stdout", b"one\n"), ("stdout", b"two\n")]


async def test_signals_and_the_size_of_a_terminal(sandbox: AsyncSandbox) -> None:
    script = "trap 'stty size' WINCH; trap 'echo ended; exit 7' TERM; echo ready; while :; do sleep 0.1; done"
    async with await sandbox.start(["sh", "-c", script], tty=True) as process:
        assert await _line(process) == b"ready\r\n"
        process.resize(columns=101, rows=31)
        assert await _line(process) == b"31 101\r\n"
        process.send_signal(signal.SIGTERM)
        assert await _line(process) == b"ended\r\n"
        assert (await process.wait()).exit_code == 7

    async with await sandbox.start(["sleep", "infinity"]) as process:
        process.kill()
        assert (await process.wait()).killed_by is KilledBy.SIGNAL


async def test_callbacks_are_called_on_the_loop_s_thread(sandbox: AsyncSandbox) -> None:
    """Also such as are coroutine functions, which are awaited in order."""
    said: list[tuple[str, str, bool]] = []
    thread = threading.current_thread()

    async def take(text: str) -> None:
        await asyncio.sleep(0)
        said.append(("stdout", text, threading.current_thread() is thread))

    result = await sandbox.run(
        ["sh", "-c", "echo out; echo error >&2"],
        on_stdout=take,
        on_stderr=lambda text: said.append(("stderr", text, threading.current_thread() is thread)),
    )
    assert sorted(said) == [("stderr", "error\n", True), ("stdout", "out\n", True)]
    assert (result.stdout, result.stderr) == ("out\n", "error\n")


async def test_a_callback_that_raises_ends_the_run(sandbox: AsyncSandbox) -> None:
    async def refuse(text: str) -> None:
        raise ValueError(text)

    with pytest.raises(ValueError, match="held"):
        await sandbox.run(_HOLD, on_stdout=refuse)
    assert await _is_free(sandbox)


async def test_files_results_and_errors_are_those_of_the_blocking_one(host: None) -> None:
    async with AsyncExitStack() as stack:
        sandbox = AsyncSandbox(timeout=SECONDS, output="1K")
        stack.push_async_callback(sandbox.close)
        with pytest.raises(InvalidState):
            _ = sandbox.accelerator
        await sandbox.files.write("/data/in", "text\n")  # starts the VM
        assert sandbox.accelerator in ("kvm", "tcg")
        result = await sandbox.run(["sh", "-c", "tr a-z A-Z </data/in >/data/out; cat /data/out"], text=False)
        assert (result.stdout, result.ok) == (b"TEXT\n", True)
        assert await sandbox.files.read("/data/out") == b"TEXT\n"
        assert [entry.name for entry in await sandbox.files.list("/data")] == ["in", "out"]
        fresh = await sandbox.run(["ls", "/data"], fresh=True)
        assert (fresh.stdout, fresh.exit_code) == ("", 1)
        loud = await sandbox.run(["head", "-c", "2000", "/dev/zero"])
        assert (loud.killed_by, loud.truncated, len(loud.stdout)) == (KilledBy.OUTPUT, True, 1024)
        with pytest.raises(CommandNotFound):
            await sandbox.run(["no-such-program"])


async def _line(process: AsyncProcess) -> bytes:
    """Read a line, in however many pieces it comes."""
    line = b""
    while not line.endswith(b"\n"):
        chunk = await process.read()
        assert chunk is not None
        line += chunk.data
    return line
