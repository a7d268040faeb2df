"""The shim as a process, as far as it needs no VM."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from pathlib import Path

import pytest

from katapy.client import launch, removal
from katapy.client.task import TaskClient
from katapy.errors import Internal, NotFound
from katapy.state import ProcessRef, State, StateDir, Status, now

pytestmark = pytest.mark.root

DEADLINE = 60.0


def _make_state(root: Path, creator: int) -> None:
    state = State(
        id="c1",
        bundle="/bundle",
        rootfs="/bundle/rootfs",
        sandbox="c1",
        status=Status.CREATING,
        created=now(),
        oci_version="1.2.0",
        owner=0,
        shim=ProcessRef.of("creator", creator),
    )
    StateDir.create(str(root), state).close()


def test_a_shim_whose_directory_is_gone_ends(tmp_path: Path) -> None:
    """Its creator was killed and the container deleted before the shim had begun: it waited for ever."""
    root = tmp_path / "run"
    with subprocess.Popen(["sleep", "1000"]) as creator:
        _make_state(root, creator.pid)
        with StateDir.open(str(root), "c1") as directory, directory.lock():
            # It needs this lock to take the container over.
            client, pid = launch.start_shim(root, "c1", debug=False, config=None)
            directory.remove()
        creator.kill()
    with client:
        assert client.wait_closed(DEADLINE)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_delete_finds_a_shim_that_takes_over_meanwhile(tmp_path: Path) -> None:
    """The state names the creator until the shim has begun; what `delete --force` removed then left a shim behind."""
    root = tmp_path / "run"
    with subprocess.Popen(["sleep", "1000"]) as creator:
        _make_state(root, creator.pid)
        client, pid = launch.start_shim(root, "c1", debug=False, config=None)
        with client:
            removal.delete(root, "c1", force=True)
            assert client.wait_closed(DEADLINE)
        os.waitpid(pid, 0)
        assert creator.wait(DEADLINE) == -signal.SIGKILL
    assert list(root.iterdir()) == []


def test_a_damaged_state_can_be_deleted_with_force(tmp_path: Path) -> None:
    """Else a container of another version of katapy could never be removed."""
    root = tmp_path / "run"
    with subprocess.Popen(["sleep", "1000"]) as creator:
        _make_state(root, creator.pid)
        client, pid = launch.start_shim(root, "c1", debug=False, config=None)
        with client:
            with pytest.raises(NotFound):
                TaskClient(client, timeout=DEADLINE).state("c1")
            (root / "c1" / "state.json").write_text("{")
            with pytest.raises(Internal, match="damaged"):
                removal.delete(root, "c1", force=False)
            removal.delete(root, "c1", force=True)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert list(root.iterdir()) == []
        creator.kill()


def test_shim_of_a_creator_that_died_ends(tmp_path: Path) -> None:
    """`katapy run` killed between starting the shim and asking it for a container: nobody else knows of the shim."""
    root = tmp_path / "run"
    with subprocess.Popen(["sleep", "1000"]) as creator:
        _make_state(root, creator.pid)
        client, pid = launch.start_shim(root, "c1", debug=False, config=None)
        with client:
            # It serves, so it does not end for another reason.
            with pytest.raises(NotFound):
                TaskClient(client, timeout=DEADLINE).state("c1")
            shim = os.pidfd_open(pid)
            creator.send_signal(signal.SIGKILL)
            creator.wait()
            assert select.select([shim], [], [], DEADLINE)[0]
            os.close(shim)
    os.waitpid(pid, 0)
    assert list(root.iterdir()) == []
