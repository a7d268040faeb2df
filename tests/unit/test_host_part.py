"""What the host does for a container, where it is interrupted."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from katapy.cgroups.limits import HostLimits
from katapy.cgroups.path import Driver
from katapy.sandbox.host import Host
from katapy.sandbox.host_cgroup import HostCgroup


async def test_a_cgroup_whose_making_is_interrupted_is_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It was made all the same, in its thread, after its pod had ended: an empty one was left."""
    begun, goes_on, removed = threading.Event(), threading.Event(), threading.Event()

    def create(*_: Any, **__: Any) -> SimpleNamespace:
        begun.set()
        assert goes_on.wait(60)
        return SimpleNamespace(remove=removed.set)

    monkeypatch.setattr(HostCgroup, "create", create)
    host = Host(mounts=-1, driver=Driver.CGROUPFS, creator=0, root=tmp_path)
    container: Any = SimpleNamespace(id="c1", bundle=SimpleNamespace(spec=None), record=SimpleNamespace(cgroup=None))
    making = asyncio.create_task(host._make_cgroup(container, HostLimits(), os.getpid()))
    await asyncio.to_thread(begun.wait)
    making.cancel()
    asyncio.get_running_loop().call_later(0.05, goes_on.set)
    with pytest.raises(asyncio.CancelledError):
        await making
    assert removed.is_set()


PARENT = "import subprocess; c = subprocess.Popen(['sleep', '1000']); print(c.pid, flush=True); c.wait()"


@pytest.mark.parametrize("told", [True, False])
def test_where_it_is_noted_that_memory_ran_out(tmp_path: Path, told: bool) -> None:
    """podman 5 looks where it has told conmon to keep what it notes, and said that nothing had been killed."""
    bundle, kept = tmp_path / "bundle", tmp_path / "kept"
    bundle.mkdir()
    kept.mkdir()
    options = ["--exit-dir", "/", "--persist-dir", str(kept), "--full-attach"] if told else ["--persist-dir"]
    with subprocess.Popen([sys.executable, "-c", PARENT, *options], stdout=subprocess.PIPE, text=True) as conmon:
        assert conmon.stdout
        pid = int(conmon.stdout.readline())
        spec = SimpleNamespace(annotations={"io.container.manager": "libpod"})
        container: Any = SimpleNamespace(
            id="c1", bundle=SimpleNamespace(path=str(bundle), spec=spec), init=SimpleNamespace(host_pid=pid)
        )
        Host(mounts=-1, driver=Driver.CGROUPFS, creator=0, root=tmp_path).tell_oom(container)
        os.kill(pid, signal.SIGKILL)
    assert (bundle / "oom").exists()
    assert (kept / "oom").exists() == told
