"""``AsyncSandbox``: the twin of ``Sandbox`` for asyncio, with the same names and parameters.

    async with AsyncSandbox(memory="256M") as sandbox:
        results = await asyncio.gather(*(sandbox.run(["python3", "-c", code]) for code in codes))

What may block is done by the blocking ones, each call in a thread of its own, so that any number may wait at once. A
call that is cancelled has ended what it began before CancelledError goes on: a run is killed, a VM is closed.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack, overload

from katapy.errors import KatapyError, Timeout
from katapy.sdk.files import READ_MAX
from katapy.sdk.output import Callback, Output
from katapy.sdk.result import Result
from katapy.sdk.sandbox import DEFAULT_TIMEOUT, PathLike, RunOptions, Sandbox

if TYPE_CHECKING:
    from katapy.sdk.files import Entry, Files
    from katapy.sdk.process import Chunk, Process
    from katapy.verdict import Verdict

T = TypeVar("T")


class AsyncSandbox:
    """A VM for untrusted code; it starts with ``open``, with the first run, or where a context is entered.

    Everything is as in ``Sandbox``; it belongs to one event loop, on whose thread callbacks are called.
    """

    def __init__(
        self,
        *,
        rootfs: PathLike | None = None,
        bundle: PathLike | None = None,
        image: str | None = None,
        memory: int | str = "256M",
        cpus: float = 1,
        processes: int = 64,
        disk: int | str = "256M",
        inodes: int = 65536,
        output: int | str = "16M",
        open_files: int = 1024,
        file_size: int | str | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        cpu_time: float | None = None,
        network: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | int | None = None,
        ro: Mapping[PathLike, str] | None = None,
        rw: Mapping[PathLike, str] | None = None,
        fresh: bool = False,
        pool: PathLike | None = None,
        config: PathLike | None = None,
        state_dir: PathLike | None = None,
    ) -> None:
        """Describe a sandbox; nothing is started yet. The parameters are those of Sandbox. Raises InvalidArgument."""
        self._given: dict[str, Any] = {name: value for name, value in locals().items() if name not in ("self", "fresh")}
        self._fresh = fresh
        self._sandbox = Sandbox(**self._given, fresh=fresh)

    async def __aenter__(self) -> Self:
        try:
            return await self.open()
        except BaseException:
            await self.close()
            raise

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def id(self) -> str:
        """The id of its VM, as `katapy list` shows it. Raises InvalidState while there is none."""
        return self._sandbox.id

    @property
    def shape(self) -> str:
        """What two sandboxes must have in common so that the VM of one can be the other's."""
        return self._sandbox.shape

    @property
    def alive(self) -> bool:
        """Whether its VM is started and runs."""
        return self._sandbox.alive

    @property
    def accelerator(self) -> str:
        """What executes the VM's instructions: "kvm", or "tcg", which promises no isolation.

        Raises InvalidState while there is no VM: a property does not wait for its start.
        """
        assert self.id
        return self._sandbox.accelerator

    @property
    def files(self) -> AsyncFiles:
        """Its files, without what ``ro`` and ``rw`` share with it. The first use of one starts the VM."""
        return AsyncFiles(lambda: self._sandbox.files)

    async def open(self) -> Self:
        """Start the VM, if that was not done, and return this sandbox. Raises as Sandbox.open does."""
        await _settle(_in_thread(self._sandbox.open))
        return self

    async def close(self) -> None:
        """Kill what runs, end the VM, and remove everything. Idempotent; there is no way back."""
        await _settle(_in_thread(self._sandbox.close))

    @overload
    async def run(
        self,
        args: Sequence[str] | None = None,
        *,
        text: Literal[True] = True,
        input: str | bytes | None = None,
        on_stdout: Callback | None = None,
        on_stderr: Callback | None = None,
        fresh: bool | None = None,
        **options: Unpack[RunOptions],
    ) -> Result[str]: ...

    @overload
    async def run(
        self,
        args: Sequence[str] | None = None,
        *,
        text: Literal[False],
        input: str | bytes | None = None,
        on_stdout: Callback | None = None,
        on_stderr: Callback | None = None,
        fresh: bool | None = None,
        **options: Unpack[RunOptions],
    ) -> Result[bytes]: ...

    async def run(
        self,
        args: Sequence[str] | None = None,
        *,
        text: bool = True,
        input: str | bytes | None = None,
        on_stdout: Callback | None = None,
        on_stderr: Callback | None = None,
        fresh: bool | None = None,
        **options: Unpack[RunOptions],
    ) -> Result[str] | Result[bytes]:
        """Run a command to its end, and return what it printed and what became of it, as Sandbox.run does.

        The callbacks may be coroutine functions: the next piece waits for them. When this is cancelled, the command
        has been killed before CancelledError goes on.
        """
        if self._fresh if fresh is None else fresh:
            async with AsyncSandbox(**self._given) as twin:
                return await twin.run(  # type: ignore[call-overload,no-any-return]  # text decides of which type it is
                    args, text=text, input=input, on_stdout=on_stdout, on_stderr=on_stderr, fresh=False, **options
                )
        output = Output(text=text, on_stdout=on_stdout, on_stderr=on_stderr)
        async with await self.start(args, input=input or b"", **options) as process:
            if not output.is_watched:
                await process.wait()
            async for chunk in process:
                answer = output.take(chunk)
                if inspect.isawaitable(answer):
                    await answer
            return output.result(self._sandbox._shown(args), await process.wait(), truncated=process.truncated)

    async def stream(
        self, args: Sequence[str] | None = None, *, input: str | bytes | None = None, **options: Unpack[RunOptions]
    ) -> AsyncGenerator[Chunk, None]:
        """Run a command and give each piece of its output as it comes.

        Whoever leaves the loop early ends the command, soon after; to have it ended by then, use contextlib.aclosing.
        Raises as ``run`` does.
        """
        async with await self.start(args, input=input or b"", **options) as process:
            async for chunk in process:
                yield chunk

    async def start(
        self, args: Sequence[str] | None = None, *, input: str | bytes | None = None, **options: Unpack[RunOptions]
    ) -> AsyncProcess:
        """Start a command and return it, to be written to and read from. Raises as ``run`` does.

        With ``input`` that is all that it reads; without, ``AsyncProcess.write`` gives it.
        """
        starting = _in_thread(partial(self._sandbox.start, args, input=input, **options))
        try:
            return AsyncProcess(await _settle(starting))
        except asyncio.CancelledError:
            if starting.exception() is None:
                await AsyncProcess(starting.result()).__aexit__()
            raise


class AsyncProcess:
    """A command that runs in a sandbox. ``wait`` for it or ``kill`` it; a context manager that kills."""

    def __init__(self, process: Process) -> None:
        """Be the twin of ``process``, and from now on the only one that reads from it."""
        self._process = process
        # Kept where who waits is cancelled, so that no piece of output is lost.
        self._next: asyncio.Future[Chunk | None] | None = None
        self._end: asyncio.Future[Verdict] | None = None
        self._reading = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.kill()
        with suppress(KatapyError):
            await _settle(self._ending())

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.running

    @property
    def truncated(self) -> bool:
        """Whether it has printed more than it may."""
        return self._process.truncated

    async def write(self, data: bytes) -> None:
        """Give it input, waiting while it does not read what it was given. Raises InvalidState once it has ended.

        Where this is cancelled, it may have been given the data, or will be.
        """
        await asyncio.shield(_in_thread(partial(self._process.write, data)))

    def close_stdin(self) -> None:
        """End its input. Idempotent."""
        self._process.close_stdin()

    def resize(self, *, columns: int, rows: int) -> None:
        """Set the size of its terminal, in characters."""
        self._process.resize(columns=columns, rows=rows)

    def send_signal(self, number: int) -> None:
        """Send a signal to the command itself."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it, and all that it has started; ``wait`` says when that is done. Does nothing where it has ended."""
        self._process.kill()

    async def read(self, timeout: float | None = None) -> Chunk | None:
        """Return the next piece of output, None at the end. Raises Timeout after ``timeout`` seconds.

        With 0 it returns what is there already.
        """
        if timeout == 0 and self._next is None and not self._reading.locked():
            return self._process.read(0)
        try:
            async with asyncio.timeout(timeout), self._reading:
                return await self._read()
        except TimeoutError:
            raise Timeout(f"nothing was printed for {timeout:g} s") from None

    async def __aiter__(self) -> AsyncIterator[Chunk]:
        while (chunk := await self.read()) is not None:
            yield chunk

    async def wait(self, timeout: float | None = None) -> Verdict:
        """Wait for the end and return what became of it. Output that nobody reads is kept, up to its limit.

        Raises Timeout after ``timeout`` seconds, OutcomeUnknown where what runs the sandbox was lost.
        """
        try:
            async with asyncio.timeout(timeout):
                return await asyncio.shield(self._ending())
        except TimeoutError:
            raise Timeout(f"the command has not ended after {timeout:g} s") from None

    async def _read(self) -> Chunk | None:
        if self._next is None:
            # What is there already needs no thread; others have their turn all the same.
            # Before it is taken: who is cancelled has taken nothing.
            await asyncio.sleep(0)
            with suppress(Timeout):
                return self._process.read(0)
            self._next = _in_thread(self._process.read)
        chunk = await asyncio.shield(self._next)
        self._next = None
        return chunk

    def _ending(self) -> asyncio.Future[Verdict]:
        if self._end is None:
            self._end = _in_thread(self._process.wait)
        return self._end


class AsyncFiles:
    """The files of one sandbox; see Files, whose methods these are."""

    def __init__(self, files: Callable[[], Files]) -> None:
        """``files`` returns the blocking twin, and is called in a thread: it may start a VM."""
        self._files = files

    async def read(self, path: str | bytes, *, max_bytes: int = READ_MAX) -> bytes:
        """Return what is in a file. Raises NotFound, and InvalidArgument where it is no regular file, or longer."""
        return await self._call(lambda files: files.read(path, max_bytes=max_bytes))

    async def read_text(self, path: str | bytes, *, encoding: str = "utf-8", max_bytes: int = READ_MAX) -> str:
        """Return the text in a file; what is not of that encoding is replaced."""
        return await self._call(lambda files: files.read_text(path, encoding=encoding, max_bytes=max_bytes))

    async def write(self, path: str | bytes, data: bytes | str, *, mode: int = 0o644) -> None:
        """Make a file with ``data`` in it, and the directories above it; what has the name is replaced, as a whole."""
        await self._call(lambda files: files.write(path, data, mode=mode))

    async def list(self, path: str | bytes = "/") -> list[Entry]:
        """Return what is in a directory, by name. Names that are not UTF-8 are as os.fsdecode gives them."""
        return await self._call(lambda files: files.list(path))

    async def exists(self, path: str | bytes) -> bool:
        """Tell whether there is something of that name."""
        return await self._call(lambda files: files.exists(path))

    async def make_directory(self, path: str | bytes) -> None:
        """Make a directory and those above it; one that is there is no error."""
        await self._call(lambda files: files.make_directory(path))

    async def remove(self, path: str | bytes) -> None:
        """Remove a file, a link or an empty directory. Raises NotFound."""
        await self._call(lambda files: files.remove(path))

    async def _call(self, call: Callable[[Files], T]) -> T:
        return await _settle(_in_thread(lambda: call(self._files())))


def _in_thread(call: Callable[[], T]) -> asyncio.Future[T]:
    """Start a call in a thread, and return what will have its result. To cancel that is of no use: it goes on."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def work() -> None:
        try:
            tell: Callable[[], None] = partial(future.set_result, call())
        except BaseException as error:
            tell = partial(future.set_exception, error)
        # A loop that is closed has nobody who waits.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(tell)

    threading.Thread(target=work, name="katapy call", daemon=True).start()
    return future


async def _settle(future: asyncio.Future[T]) -> T:
    """Wait for a result whatever happens: who is cancelled meanwhile is told so afterwards."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        future.exception()  # seen: nobody else will look
        raise cancelled
    return future.result()
