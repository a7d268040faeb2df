"""What the host does for a container, where it is interrupted."""

from __future__ import annotations

import asyncio
import os
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
        assert goes_on.wait(10)
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
