"""Streams: how many bytes a second a container writes to a pipe and reads from one, beside a pipe without any runtime.

The time runs from the first byte to the last, so that no start is in it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from containers import Runtime, read_some, started
from context import Bench
from figures import BenchError, Recorder

_CHUNK: Final = 1 << 20
_PIPE: Final = 1 << 16
_PLAIN: Final = "a pipe of the host"
_SINK: Final = "echo ready; cat >/dev/null; echo done"


def drain(argv: list[str | Path], expected: int) -> float:
    """Return the seconds from the first to the last byte of a process that prints ``expected`` bytes."""
    with started(argv, pipes=True) as process:
        assert process.stdout is not None
        fd = process.stdout.fileno()
        received = len(os.read(fd, _CHUNK))
        began = ended = time.monotonic()
        while data := os.read(fd, _CHUNK):
            received += len(data)
            ended = time.monotonic()
        if received != expected:
            raise BenchError(f"{argv!r} has printed {received} bytes, not {expected}")
        return ended - began


def feed(argv: list[str | Path], size: int) -> float:
    """Return the seconds in which a process that runs ``_SINK`` takes ``size`` bytes."""
    with started(argv, pipes=True) as process:
        assert process.stdin is not None
        read_some(process)
        left, chunk = size, memoryview(bytes(_CHUNK))
        began = time.monotonic()
        while left:
            left -= os.write(process.stdin.fileno(), chunk[: min(left, _CHUNK)])
        process.stdin.close()
        read_some(process)
        return time.monotonic() - began


@contextmanager
def _container(runtime: Runtime, bundle: Path) -> Iterator[list[str | Path]]:
    """Give the arguments that run a container in the foreground."""
    with runtime.container() as container_id:
        yield runtime.argv("run", "--bundle", bundle, container_id)


def measure(bench: Bench) -> Recorder:
    """Measure the group."""
    recorder = Recorder("streams")
    size = bench.plan.stream_bytes
    # A pipe's capacity at a time; head(1) of busybox would go byte by byte.
    source = ["dd", "if=/dev/zero", f"bs={_PIPE}", f"count={size // _PIPE}"]
    busybox = bench.bundles.rootfs / "bin/busybox"
    to_stdout, from_stdin = bench.bundles.make(*source), bench.bundles.make("sh", "-c", _SINK)
    sleep = bench.bundles.make("sleep", "100000")
    names = {what: f"{what}, {_PLAIN}" for what in ("stdout", "stdin")}
    for _ in range(bench.plan.long_runs):
        recorder.add(names["stdout"], drain([busybox, *source], size), moved=size)
        recorder.add(names["stdin"], feed([busybox, "sh", "-c", _SINK], size), moved=size)
        for name, runtime in bench.peers:
            with _container(runtime, to_stdout) as argv:
                recorder.add(f"stdout, {name}", drain(argv, size), beside=names["stdout"], moved=size)
            with _container(runtime, from_stdin) as argv:
                recorder.add(f"stdin, {name}", feed(argv, size), beside=names["stdin"], moved=size)
            with runtime.detached(sleep) as container_id:
                took = drain(runtime.argv("exec", container_id, *source), size)
                recorder.add(f"stdout of exec, {name}", took, beside=names["stdout"], moved=size)
    return recorder
