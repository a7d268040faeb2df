"""The shim as a process, as far as it needs no VM."""

from __future__ import annotations

import os
import select
import signal
import subprocess
from pathlib import Path

import pytest

from katapy.client import launch
from katapy.client.task import TaskClient
from katapy.errors import NotFound
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
