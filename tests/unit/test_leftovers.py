"""What is removed of a container whose shim serves other containers, or is about to die."""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from katapy.client import leftovers, pod, removal, task
from katapy.client.launch import SHIM_SOCKET
from katapy.client.leftovers import finish, gone
from katapy.errors import InvalidState, KatapyError, NotFound, Timeout
from katapy.state import CALLER, ProcessRef, State, StateDir, Status, now

_DEADLINE = 60.0


@pytest.fixture
def shim() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


def state(name: str, sandbox: str, owner: ProcessRef) -> State:
    return State(
        id=name,
        bundle="/b",
        rootfs="/b/rootfs",
        sandbox=sandbox,
        status=Status.STOPPED,
        created=now(),
        oci_version="1.2.0",
        owner=os.getuid(),
        shim=owner,
    )


@pytest.fixture
def root(tmp_path: Path, shim: subprocess.Popen[bytes]) -> Path:
    """A state directory with the container c1 of the pod p1."""
    root = tmp_path / "run"
    (root / "p1").mkdir(parents=True, mode=0o700)
    StateDir.create(str(root), state("c1", "p1", ProcessRef.of("shim", shim.pid))).close()
    return root


def test_a_shim_that_stands_still_may_remove_it_later(root: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(root / "p1" / SHIM_SOCKET))
        listener.listen()
        finish(root, "c1", patience=0.1)
        assert (root / "c1").exists()


def assert_waits_for(shim: subprocess.Popen[bytes], removal: threading.Thread) -> None:
    """See that a removal ends with the shim, and no sooner."""
    removal.join(0.5)
    assert removal.is_alive()
    shim.send_signal(signal.SIGKILL)
    shim.wait()
    removal.join(_DEADLINE)
    assert not removal.is_alive()


@pytest.mark.parametrize("known", [True, False])
def test_a_shim_that_answers_removes_it_itself(root: Path, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    """Whether it knows the container still or not: it has not to be waited for."""

    def connect(*_: object) -> None:
        if not known:
            raise NotFound("no container c1")

    monkeypatch.setattr(task.TaskClient, "connect", connect)
    monkeypatch.setattr(leftovers, "gone", lambda *_: pytest.fail("it was waited for"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(root / "p1" / SHIM_SOCKET))
        listener.listen()
        finish(root, "c1")
    assert (root / "c1").exists()


def test_a_shim_that_was_killed_has_hung_up_before_it_is_dead(root: Path, shim: subprocess.Popen[bytes]) -> None:
    """It was taken for one that goes on to serve, and the container's state stayed for ever."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(root / "p1" / SHIM_SOCKET))
        listener.listen()
    removal = threading.Thread(target=finish, args=(root, "c1"))
    removal.start()
    assert_waits_for(shim, removal)
    assert not (root / "c1").exists()


def test_a_shim_that_was_just_killed_can_be_connected_to(root: Path, shim: subprocess.Popen[bytes]) -> None:
    """While it ends: its connections have gone by then, by which an engine knows, and its listener has not."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(root / "p1" / SHIM_SOCKET))
        listener.listen()
        removal = threading.Thread(target=finish, args=(root, "c1"))
        removal.start()
        assert select.select([listener], [], [], _DEADLINE)[0]
    assert_waits_for(shim, removal)
    assert not (root / "c1").exists()


def test_a_shim_that_takes_long_to_die(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes apart what was killed, on a busy host for longer than is waited; it does nothing any more."""
    monkeypatch.setattr(leftovers, "gone", lambda *_: False)
    monkeypatch.setattr(leftovers, "kill", lambda *_: None)
    finish(root, "c1", patience=0.01)
    assert (root / "c1").exists()
    monkeypatch.setattr(ProcessRef, "ending", lambda _: True)
    finish(root, "c1", patience=0.01)
    assert not (root / "c1").exists()


def test_a_shim_of_others_is_never_killed(root: Path, shim: subprocess.Popen[bytes]) -> None:
    finish(root, "c1", patience=0.01)
    assert (root / "c1").exists()
    assert shim.poll() is None


@pytest.mark.parametrize("error", [NotFound("gone"), Timeout("late"), InvalidState("it is creating")])
def test_what_goes_wrong_with_one_container_does_not_end_the_others(
    root: Path, shim: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, error: KatapyError
) -> None:
    """`delete --force` killed the shim of the whole pod, where somebody else had removed the container, for one."""

    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(pod.Pod, "connect", refuse)
    # This one stands still: it keeps the connection, and does not answer.
    monkeypatch.setattr(removal, "finish", partial(finish, patience=0.1))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(root / "p1" / SHIM_SOCKET))
        listener.listen()
        with suppress(Timeout, InvalidState):
            removal.delete(root, "c1", force=True)
    assert shim.poll() is None


def test_a_container_that_is_being_created_does_not_end_the_others(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shim of the pod was told to end, which is for the removal of its sandbox."""
    asked = []

    class Busy:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def kill(self, *_: object, **__: object) -> None:
            raise NotFound("it is not there yet")

        def delete(self, *_: object) -> None:
            raise InvalidState("it is creating")

        def shutdown(self, *args: object, **options: object) -> None:
            asked.append((args, options))

    monkeypatch.setattr(pod, "TaskClient", Busy)
    with pytest.raises(InvalidState):
        pod.Pod(root, "c1", cast(Any, None)).remove(force=True)
    assert asked == []


def test_a_program_that_uses_the_sdk_does_not_end_with_a_sandbox(root: Path, shim: subprocess.Popen[bytes]) -> None:
    """Until its shim has taken over, the program is the one behind a sandbox: `delete --force` killed it."""
    StateDir.create(str(root), state("s1", "s1", ProcessRef.of(CALLER, shim.pid))).close()
    removal.delete(root, "s1", force=True)
    assert not (root / "s1").exists()
    assert shim.poll() is None


def test_a_pid_that_is_a_thread_s_by_now(root: Path) -> None:
    """The process has ended: it was an internal error, of every start of a pod besides."""
    going, over = threading.Event(), threading.Event()

    def wait() -> None:
        going.set()
        over.wait()

    thread = threading.Thread(target=wait)
    thread.start()
    going.wait()
    assert thread.native_id is not None
    old = ProcessRef("shim", thread.native_id, 1)
    assert old.open() is None
    assert gone(old, 0.0)
    over.set()
    thread.join()


def test_as_many_descriptors_as_a_server_has() -> None:
    """A sandbox of a program with more than 1024 of them could not be closed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert hard >= 1200
    with ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        made = 0
        while made < 1100:
            made = os.dup(0)
            stack.callback(os.close, made)
        assert not gone(ProcessRef.of("shim", os.getpid()), 0.0)
