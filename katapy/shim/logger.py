"""The logging program that an engine names for a container: it reads what that writes, until the container has ended.

It has standard output as descriptor 3 and standard error as 4, and closes 5 when it is ready to read. It is told whose
they are by CONTAINER_ID and CONTAINER_NAMESPACE, and nothing else by the environment.
Source: containerd 1.6, runtime/v2/logging and cmd/ctr (--log-uri binary://PROGRAM?KEY=VALUE).
"""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

from katapy import run
from katapy.errors import InvalidArgument, NotFound, Timeout
from katapy.sandbox.process import BINARY

_READY_SECONDS: Final = 10.0
# What it has been given it may have to write out; containerd gives it twelve.
_END_SECONDS: Final = 12.0
# setns(2) is 308. From high numbers, so that none of the three is closed by another's move.
_ENTER: Final = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
namespace, *fds = map(int, sys.argv[1:5])
if libc.setns(namespace, 0x20000):
    sys.exit(f"setns: {os.strerror(ctypes.get_errno())}")
os.chdir("/")
for number, fd in enumerate([os.dup(os.dup(os.dup(fd))) for fd in fds], 3):
    os.dup2(fd, number)
os.closerange(6, 1 << 20)
os.execve(sys.argv[5], sys.argv[5:], dict(os.environ))
"""


@dataclass
class Logger:
    """A logging program that runs; ``stdout`` and ``stderr`` are what a container's process writes to."""

    process: run.Process
    stdout: int
    stderr: int

    def release(self) -> None:
        """Let go of the writing ends, which somebody else has by now: the program ends with those."""
        for fd in (self.stdout, self.stderr):
            os.close(fd)

    async def finish(self) -> None:
        """Wait until it has written what it was given, and end it where that takes too long."""
        try:
            async with asyncio.timeout(_END_SECONDS):
                await self.process.wait()
        except TimeoutError:
            await self.process.stop(grace=0)


def parse_uri(uri: str) -> list[str]:
    """Return the command that a ``binary://`` URI is of: a program, then keys and values. Raises InvalidArgument."""
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise InvalidArgument(f"cannot log: {uri[:200]!r}: {error}") from error
    program = unquote(parts.path)
    if f"{parts.scheme}://" != BINARY or parts.netloc or not program.startswith("/") or "\0" in uri:
        raise InvalidArgument(f"cannot log: {uri[:200]!r} is not of the form {BINARY}/PROGRAM?KEY=VALUE")
    # As containerd: the first value of each key.
    values: dict[str, str] = {}
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        values.setdefault(key, value)
    return [program, *(word for pair in values.items() for word in pair)]


async def start_logger(uri: str, *, container_id: str, namespace: str, mounts: int) -> Logger:
    """Start a logging program in the host's mount namespace ``mounts``, and wait until it is ready.

    ``release`` and ``finish`` are the caller's to call. It does not die with the shim, to write out what it was given.
    Raises InvalidArgument, NotFound, Unavailable, Timeout.
    """
    command = parse_uri(uri)
    if not os.access(command[0], os.X_OK) or not Path(command[0]).is_file():
        raise NotFound(f"cannot log: {command[0]} is missing or not executable")
    with ExitStack() as stack:
        pipes = [os.pipe() for _ in range(3)]
        for pipe in pipes:
            for fd in pipe:
                stack.callback(os.close, fd)
        (out, stdout), (err, stderr), (said, ready) = pipes
        fds = (mounts, out, err, ready)
        argv = [sys.executable, "-I", "-S", "-c", _ENTER, *map(str, fds), *command]
        env = {"CONTAINER_ID": container_id, "CONTAINER_NAMESPACE": namespace}
        process = run.start(argv, name="the logging program", fds=fds, env=env, die_with_owner=False)
        logger = Logger(process, os.dup(stdout), os.dup(stderr))
        watched = os.dup(said)
    try:
        async with asyncio.timeout(_READY_SECONDS):
            await run.readable(watched)
    except BaseException as error:
        logger.release()
        await process.stop(grace=0)
        if isinstance(error, TimeoutError):
            raise Timeout(f"cannot log: {command[0]} was not ready within {_READY_SECONDS:g} s") from error
        raise
    finally:
        os.close(watched)
    return logger
