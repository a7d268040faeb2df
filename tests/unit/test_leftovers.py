"""What is removed of a container whose shim serves other containers, or is about to die."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from katapy.client.launch import SHIM_SOCKET
from katapy.client.leftovers import finish
from katapy.state import ProcessRef, State, StateDir, Status, now

_DEADLINE = 60.0


@pytest.fixture
def shim() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


@pytest.fixture
def root(tmp_path: Path, shim: subprocess.Popen[bytes]) -> Path:
    """A state directory with the container c1 of the pod p1."""
    root = tmp_path / "run"
    (root / "p1").mkdir(parents=True, mode=0o700)
    owner = ProcessRef.of("shim", shim.pid)
    state = State(
        id="c1",
        bundle="/b",
        rootfs="/b/rootfs",
        sandbox="p1",
        status=Status.STOPPED,
        created=now(),
        oci_version="1.2.0",
        owner=os.getuid(),
    )
    StateDir.create(str(root), state._replace(shim=owner)).close()
    return root


def test_a_shim_that_serves_others_removes_it_itself(root: Path) -> None:
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
    removal.join(0.5)
    assert removal.is_alive()
    shim.send_signal(signal.SIGKILL)
    shim.wait()
    removal.join(_DEADLINE)
    assert not removal.is_alive()
    assert not (root / "c1").exists()


def test_a_shim_of_others_is_never_killed(root: Path, shim: subprocess.Popen[bytes]) -> None:
    finish(root, "c1", patience=0.01)
    assert (root / "c1").exists()
    assert shim.poll() is None
