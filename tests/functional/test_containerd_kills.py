"""SIGKILL and SIGSTOP for what a container of containerd's runs on: containerd tells the truth, and nothing is left."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from containerd_daemon import CTR, IMAGE, Containerd, start_containerd
from ctr import SLEEP, execute, listening, remove, running, sockets, status
from harness import await_true

pytestmark = pytest.mark.skipif(not CTR.exists(), reason="containerd is not installed")
VICTIMS = ("shim", "QEMU", "virtiofsd", "containerd")
VERBS = ("create", "start", "exec", "stop")
# For each verb and each victim; all of them are the long test's.
FEW = (
    ("shim", "create"),
    ("containerd", "create"),
    ("QEMU", "create"),
    ("shim", "start"),
    ("virtiofsd", "exec"),
    ("containerd", "stop"),
)


@pytest.fixture
def own(busybox: Path, host: None) -> Iterator[Containerd]:
    """A daemon that may be killed; afterwards it has no container, and nothing is left."""
    with (
        tempfile.TemporaryDirectory(prefix="katapy-") as name,
        start_containerd(Path(name), busybox) as containerd,
    ):
        yield containerd
        assert containerd("containers", "ls", "--quiet").out == ""
        assert list(containerd.root.iterdir()) == []
        assert sockets(containerd) == []


@contextmanager
def witness(containerd: Containerd) -> Iterator[None]:
    """Run a container that is not to notice anything."""
    with running(containerd, "witness"):
        yield
        assert execute(containerd, "witness", "echo", "alive").out == "alive\n"


def strike(containerd: Containerd, victim: str, verb: str, moment: float) -> None:
    """Kill one of the processes ``moment`` seconds after a verb has begun, see the truth, and remove the container."""
    if verb in ("exec", "stop"):
        containerd.run("--detach", IMAGE, "c1", *SLEEP)
    with ThreadPoolExecutor(1) as threads:
        doing = threads.submit(do, containerd, verb)
        if verb in ("create", "start"):
            # It fails at once where containerd still takes apart what was before, in its own time.
            await_true(lambda: begun(containerd, victim, verb) or doing.done())
        time.sleep(moment)
        if victim == "containerd":
            containerd.stop(signal.SIGKILL)
            containerd.start()
        else:
            end(containerd, victim)
        doing.result()
    if victim == "containerd":
        # What it finds of a shim that was asked for nothing yet it removes by itself, in its own time.
        await_true(lambda: status(containerd, "c1") != "UNKNOWN")
    elif verb != "stop":
        await_true(lambda: status(containerd, "c1") in ("STOPPED", ""))
    await_true(lambda: status(containerd, "c1") != "RUNNING" or alive(containerd))
    clear(containerd)


def alive(containerd: Containerd) -> bool:
    """Tell whether the container does what a running one does."""
    return execute(containerd, "c1", "echo", "alive", check=False).out == "alive\n"


def do(containerd: Containerd, verb: str) -> None:
    """Do what is interrupted; whether it succeeds is the moment's affair."""
    if verb == "exec":
        # ctr may go on with a daemon that is started again, and hear of its end.
        containerd("task", "exec", "--exec-id", "e1", "c1", "sleep", "5", check=False)
    elif verb == "stop":
        containerd("task", "kill", "--signal", "KILL", "c1", check=False)
        containerd("task", "rm", "c1", check=False)
    else:
        containerd.run("--detach", IMAGE, "c1", *SLEEP, check=False)


def begun(containerd: Containerd, victim: str, verb: str) -> bool:
    """Tell whether a container is being made, with the victim there; or is made and about to start."""
    try:
        saved = containerd.saved("c1")
    except (FileNotFoundError, NotADirectoryError):
        return False
    if verb == "start":
        return saved["status"] in ("created", "running")
    names = [saved["shim"]["name"], *(each["name"] for each in saved["helpers"])]
    return victim in (*names, "containerd")


def end(containerd: Containerd, victim: str) -> None:
    """Kill a process of the container, which may have ended."""
    try:
        os.kill(containerd.shim("c1") if victim == "shim" else containerd.helper("c1", victim), signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError, StopIteration):
        return


def forgotten(containerd: Containerd) -> bool:
    """Tell whether containerd is done and has left the state, which the next start removes.

    So it is where the shim died before containerd had connected to it: then it asks for no `delete`.
    """
    try:
        saved = containerd.saved("c1")
    except FileNotFoundError:
        return False
    return not (containerd.bundles / "c1").exists() and saved["status"] == "creating" and not saved["helpers"]


def clear(containerd: Containerd) -> None:
    """Remove the container, of which containerd knows as much as it does."""
    containerd("task", "kill", "--signal", "KILL", "c1", check=False)
    await_true(lambda: status(containerd, "c1") in ("STOPPED", "CREATED", ""))

    def removed() -> bool:
        # Refused while containerd still takes apart what it has found.
        containerd("task", "rm", "--force", "c1", check=False)
        if forgotten(containerd):
            containerd.run("--rm", IMAGE, "next", "true")
        return not status(containerd, "c1") and not (containerd.root / "c1").exists()

    await_true(removed)
    containerd("containers", "rm", "c1", check=False)
    assert "c1" not in containerd("containers", "ls", "--quiet").out.split()


def test_killed_in_the_middle(own: Containerd) -> None:
    """Each of the processes, in one of the verbs."""
    with witness(own):
        for victim, verb in FEW:
            strike(own, victim, verb, 0.1 if verb == "exec" else 0)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("victim", VICTIMS)
def test_killed_at_many_moments(own: Containerd, victim: str, verb: str) -> None:
    with witness(own):
        for moment in (0, 0.02, 0.05, 0.1, 0.2, 0.4):
            strike(own, victim, verb, moment)


def children(pid: int) -> list[int]:
    """Return the pids of a process's children."""
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def test_a_vm_that_does_not_answer(containerd: Containerd) -> None:
    """It is killed by the SIGKILL that it does not heed; `kill` waited for ever.

    And so is one that answers, but whose container does not end: it hangs in the kernel, which waits for a file.
    """
    containerd.run("--detach", IMAGE, "c1", *SLEEP)
    containerd.run("--detach", IMAGE, "c2", "sh", "-c", "while true; do read -r line < /etc/group; done")
    # By then it reads: what waits for its program's pages only can be killed.
    assert execute(containerd, "c2", "echo", "alive").out == "alive\n"
    os.kill(containerd.helper("c1", "QEMU"), signal.SIGSTOP)
    # It is two processes: the second one serves.
    (served,) = children(containerd.helper("c2", "virtiofsd"))
    os.kill(served, signal.SIGSTOP)
    with listening(containerd) as hear, ThreadPoolExecutor(1) as threads:
        second = threads.submit(remove, containerd, "c2")
        began = time.monotonic()
        assert status(containerd, "c1") == "RUNNING"
        # It waits, as it does for a process that is stopped.
        containerd("task", "kill", "--signal", "TERM", "c1")
        containerd("task", "kill", "--signal", "KILL", "c1")
        await_true(lambda: status(containerd, "c1") == "STOPPED")
        assert time.monotonic() - began > 10
        assert "137" in containerd("task", "rm", "c1").err
        for name in ("c1", "c2"):
            told = hear(name, "/tasks/delete")
            assert [topic for topic, _ in told] == ["/tasks/exit", "/tasks/delete"]
            assert {event["exit_status"] for _, event in told} == {137}
        assert time.monotonic() - began > 20
        second.result()
    containerd("containers", "rm", "c1")


def test_killed_shim(containerd: Containerd) -> None:
    """containerd sees the end of the task, and it can be removed."""
    containerd.run("--detach", IMAGE, "c1", *SLEEP)
    os.kill(containerd.shim("c1"), signal.SIGKILL)
    # It removes the task itself, some time after `delete` has returned.
    bundle = containerd.bundles / "c1"
    await_true(lambda: not bundle.exists() and not status(containerd, "c1"))
    assert list(containerd.root.iterdir()) == []
    containerd("containers", "rm", "c1")
    await_true(lambda: containerd.run("--rm", IMAGE, "c1", "echo", "again", check=False).out == "again\n")


def test_killed_vm(containerd: Containerd) -> None:
    """The task has ended as if it was killed, and the shim answers."""
    containerd.run("--detach", IMAGE, "c1", *SLEEP)
    os.kill(containerd.helper("c1", "QEMU"), signal.SIGKILL)
    await_true(lambda: status(containerd, "c1") == "STOPPED")
    assert "137" in containerd("task", "rm", "c1").err
    containerd("containers", "rm", "c1")


def test_killed_stand_in(containerd: Containerd) -> None:
    """A process of whose streams nobody takes care any more does not go on."""
    with running(containerd, "c1"):
        os.kill(int(containerd("task", "ps", "c1").out.splitlines()[1].split()[0]), signal.SIGKILL)
        await_true(lambda: status(containerd, "c1") == "STOPPED")
