"""Containers whose cgroups systemd makes, where it runs. The driver's own tests have a small one of theirs."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from harness import Katapy, MakeBundle, await_true

pytestmark = pytest.mark.skipif(not Path("/run/systemd/system").is_dir(), reason="systemd does not run here")


def _show(unit: str, name: str) -> str:
    argv = ["systemctl", "show", "--property", name, "--value", unit]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("end", ["delete", "kill -9 of the shim"])
def test_a_pod_is_a_scope_of_systemds(katapy: Katapy, bundle: MakeBundle, end: str) -> None:
    """All of its processes, with their limits, also after systemd has read its configuration anew."""

    def edit(spec: dict[str, Any]) -> None:
        spec["linux"]["cgroupsPath"] = "katapytest.slice:katapy:c1"
        spec["linux"]["resources"] |= {"memory": {"limit": 128 << 20}, "cpu": {"quota": 50_000, "period": 100_000}}

    unit = "katapy-c1.scope"
    katapy.options = ("--systemd-cgroup",)
    katapy.detach("run", "--detach", "--bundle", bundle(["sleep", "1000"], edit=edit), "c1")
    state = katapy.saved("c1")
    pids = [state["pid"], state["shim"]["pid"], *(helper["pid"] for helper in state["helpers"])]
    expected = f"/katapytest.slice/{unit}"
    assert {_cgroup(pid) for pid in pids} == {expected}
    assert (_show(unit, "ActiveState"), _show(unit, "ControlGroup")) == ("active", expected)
    directory = Path(f"/sys/fs/cgroup{expected}")
    memory = (directory / "memory.max").read_text().strip()
    assert memory == _show(unit, "MemoryMax")
    assert (128 + 128 + 128) << 20 < int(memory) < 1 << 30  # the container's, the guest's own, QEMU's
    subprocess.run(["systemctl", "daemon-reload"], check=True)
    assert (directory / "memory.max").read_text().strip() == memory
    assert (directory / "cpu.max").read_text().strip() == "75000 100000"  # a quarter of a CPU for QEMU itself
    assert katapy("exec", "c1", "echo", "up", check=True).stdout == b"up\n"
    if end != "delete":
        os.kill(state["shim"]["pid"], signal.SIGKILL)
    katapy("delete", "--force", "c1", check=True)
    await_true(lambda: _show(unit, "ActiveState") == "inactive")
    assert not directory.exists()


def _cgroup(pid: int) -> str:
    return Path(f"/proc/{pid}/cgroup").read_text().strip().removeprefix("0::")
