"""Runs a container's hooks on the host: in the host's own mount namespace, which the supervisor has left.

Source: runtime-spec 1.2, config.md, "POSIX-platform Hooks", and runtime.md, "Lifecycle".
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Final

from katapy import run
from katapy.console import Console
from katapy.errors import KatapyError, Timeout, Unavailable
from katapy.oci.hooks import Hook

# Far above what a hook needs; without a limit of its own, one that hangs would hold up its engine for ever.
_TIMEOUT: Final = 600.0
_LINES: Final = 5
# By an interpreter of our own, since no tool of util-linux lets the caller say what argv[0] is. setns(2) is 308.
_ENTER: Final = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
namespace, directory, path, *args = sys.argv[1:]
if libc.setns(int(namespace), 0x20000):
    sys.exit(f"setns: {os.strerror(ctypes.get_errno())}")
os.chdir(directory)
try:
    os.execv(path, args)
except OSError as error:
    sys.exit(error.strerror)
"""


def hooks_seconds(hooks: Sequence[Hook]) -> float:
    """Return how long these hooks may take together, in seconds."""
    return sum(hook.timeout or _TIMEOUT for hook in hooks)


async def run_hook(name: str, hook: Hook, *, state: Mapping[str, Any], mount_namespace: int, bundle: str) -> None:
    """Run one hook to its end; ``name`` is its place in config.json (``hooks.createRuntime[0]``).

    ``state`` is the container's, as `state` prints it, and the hook's standard input; ``mount_namespace`` is a
    descriptor of the one that it runs in, ``bundle`` its working directory.
    Raises Unavailable, or Timeout; the message names the hook.
    """
    try:
        await _run(hook, json.dumps(state).encode(), mount_namespace, bundle)
    except KatapyError as error:
        raise type(error)(f"{name}: {hook.path}: {error}") from error


async def _run(hook: Hook, state: bytes, mount_namespace: int, bundle: str) -> None:
    with ExitStack() as stack:
        stdin = os.memfd_create("state")
        stack.callback(os.close, stdin)
        os.pwrite(stdin, state, 0)
        read, write = socket.socketpair()
        stack.callback(read.close)
        argv = [sys.executable, "-I", "-S", "-c", _ENTER, str(mount_namespace), bundle, hook.path, *hook.args]
        env = run.ENVIRONMENT if hook.env is None else dict(entry.split("=", 1) for entry in hook.env)
        with write:
            process = run.start(
                argv,
                name="hook",
                fds=[mount_namespace],
                stdin=stdin,
                stdout=write.fileno(),
                stderr=write.fileno(),
                env=env,
            )
        output = Console(read)
        stack.callback(output.close)
        try:
            async with asyncio.timeout(hook.timeout or _TIMEOUT):
                status = await process.wait()
        except TimeoutError as error:
            raise Timeout(f"did not end within {hook.timeout or _TIMEOUT:g} s") from error
        finally:
            await process.stop(grace=0)
        if status:
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            words = output.tail(_LINES).replace("\n", " | ")
            raise Unavailable(f"{how}: {words}" if words else how)
