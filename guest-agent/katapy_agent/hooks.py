"""Runs the startContainer hooks: in the container, after its start was asked for and before its program.

All is as runc 1.1 has it (its standard_init_linux.go). A hook is a child of the container's init, and has all that the
program is about to have: user, capabilities, limits, working directory, seccomp filter, and the program's environment
where the hook has none of its own. The state on its standard input says "created" (runtime-spec, runtime.md,
"Lifecycle"), and its pid is the one in the container. Unlike under runc the start fails where a hook does.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Final, NoReturn

from katapy_agent.config import Hook
from katapy_agent.errors import KatapyError, Timeout, Unavailable, doing

# As on the host: far above what a hook needs.
_TIMEOUT: Final = 600
_OUTPUT_MAX: Final = 1024


def run(hooks: Sequence[Hook], state: str, environment: Mapping[bytes, bytes], confine: Callable[[], object]) -> None:
    """Run each hook to its end, in order. ``state`` is JSON without a pid; each hook's process calls ``confine``.

    Raises Unavailable or Timeout, and the message names the hook.
    """
    if not hooks:
        return
    document = json.dumps({**json.loads(state), "pid": os.getpid()}).encode()
    for index, hook in enumerate(hooks):
        name = f"hooks.startContainer[{index}]: {hook.path}"
        try:
            with doing("run it"):
                _run(hook, document, environment, confine)
        except KatapyError as error:
            raise type(error)(f"{name}: {error}") from error


def _run(hook: Hook, state: bytes, environment: Mapping[bytes, bytes], confine: Callable[[], object]) -> None:
    with ExitStack() as stack:
        stdin = os.memfd_create("state")
        stack.callback(os.close, stdin)
        os.pwrite(stdin, state, 0)
        output, write = os.pipe()
        stack.callback(os.close, output)
        pid = os.fork()
        if pid == 0:
            _become(hook, (stdin, write, write), environment, confine)
        os.close(write)
        pidfd = os.pidfd_open(pid)
        stack.callback(os.close, pidfd)
        deadline = time.monotonic() + (hook.timeout or _TIMEOUT)
        said, ended = _read_until_end(output, pidfd, deadline)
        if not ended:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if not ended:
        raise Timeout(f"did not end within {hook.timeout or _TIMEOUT} s")
    if code:
        how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
        raise Unavailable(": ".join(filter(None, (how, " | ".join(said.decode(errors="replace").splitlines())))))


def _read_until_end(output: int, pidfd: int, deadline: float) -> tuple[bytes, bool]:
    """Return the last that was written, and whether the process has ended before ``deadline``.

    What it has started itself may go on, and keep the pipe open.
    """
    os.set_blocking(output, False)
    poll = select.poll()
    poll.register(output, select.POLLIN)
    poll.register(pidfd, select.POLLIN)
    said = b""
    while True:
        ready = {fd for fd, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)}
        if output in ready:
            data = os.read(output, 65536)
            said = (said + data)[-_OUTPUT_MAX:]
            if not data:
                poll.unregister(output)
        elif pidfd in ready:
            return said, True
        if time.monotonic() >= deadline:
            return said, pidfd in ready


def _become(
    hook: Hook, streams: tuple[int, int, int], environment: Mapping[bytes, bytes], confine: Callable[[], object]
) -> NoReturn:
    try:
        for fd, stream in enumerate(streams):
            os.dup2(stream, fd)
        confine()
        own = environment if hook.env is None else dict(os.fsencode(each).split(b"=", 1) for each in hook.env)
        os.execve(hook.path, hook.args or (hook.path,), own)
    except OSError as error:
        os.write(2, (error.strerror or "").lower().encode())
    except KatapyError as error:
        os.write(2, str(error).encode())
    finally:
        os._exit(127)
