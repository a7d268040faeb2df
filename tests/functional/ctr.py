"""What tests do with a containerd by its own client, ctr: one VM for each container."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from containerd_daemon import CTR, IMAGE, Containerd
from engine import Done
from harness import DEADLINE, await_true

from katapy.client import launch
from katapy.client.task import TaskClient

SLEEP = ("sleep", "1000")


def sockets(daemon: Containerd) -> list[str]:
    """Return the addresses of shims of this daemon: others may run on this machine."""
    found = []
    for link in Path("/run/containerd/s").iterdir():
        with contextlib.suppress(OSError):  # a socket itself, or gone
            if link.readlink().is_relative_to(daemon.directory):
                found.append(link.name)
    return found


def status(containerd: Containerd, name: str) -> str:
    """Return the status of a task as ctr lists it."""
    lines = [line.split() for line in containerd("task", "ls").out.splitlines()]
    return next((line[2] for line in lines if line[0] == name), "")


@contextlib.contextmanager
def running(containerd: Containerd, name: str, *command: str, options: tuple[str, ...] = ()) -> Iterator[str]:
    """Run a container while the context lasts."""
    containerd.run("--detach", *options, IMAGE, name, *(command or SLEEP))
    try:
        yield name
    finally:
        remove(containerd, name)


def remove(containerd: Containerd, name: str) -> None:
    """Kill and remove a container and its task."""
    containerd("task", "kill", "--signal", "KILL", name, check=False)
    await_true(lambda: status(containerd, name) in ("STOPPED", ""))
    # Its exit status is ctr's own.
    containerd("task", "rm", name, check=False)
    containerd("containers", "rm", name)


def execute(containerd: Containerd, name: str, *command: str, stdin: str | None = None, check: bool = True) -> Done:
    """Run a command in a container."""
    return containerd("task", "exec", "--exec-id", f"e{time.monotonic_ns()}", name, *command, stdin=stdin, check=check)


@contextlib.contextmanager
def task(containerd: Containerd, name: str) -> Iterator[TaskClient]:
    """Talk to a shim as containerd does."""
    with launch.connect(containerd.root / name) as client:
        yield TaskClient(client, timeout=DEADLINE)


Heard = list[tuple[str, dict[str, Any]]]


@contextlib.contextmanager
def listening(containerd: Containerd) -> Iterator[Callable[[str, str], Heard]]:
    """Listen to events; what is yielded waits for one of a container's and returns that's up to there."""
    with subprocess.Popen([CTR, "events"], stdout=subprocess.PIPE, text=True, env=containerd.env) as listener:
        stream = listener.stdout
        assert stream is not None
        # Nothing tells that it listens but what it hears.
        number = 0
        while not select.select([stream], [], [], 0.5)[0]:
            number += 1
            containerd("namespaces", "label", containerd.namespace, f"number={number}")
        seen: Heard = []

        def hear(name: str, last: str) -> Heard:
            while True:
                found = [each for each in seen if _owner(each[1]) == name]
                topics = [topic for topic, _ in found]
                if last in topics:
                    return found[: topics.index(last) + 1]
                topic, _, event = stream.readline().partition(f"{containerd.namespace} ")[2].partition(" ")
                seen.append((topic, json.loads(event)))

        try:
            yield hear
        finally:
            listener.kill()


def _owner(event: dict[str, Any]) -> str:
    return str(event.get("container_id") or event.get("id"))
