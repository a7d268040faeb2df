"""Which accelerator and which vsock device a host's pods get. The lab has KVM and the kernel's device."""

from __future__ import annotations

import json
import os
from pathlib import Path

from harness import Katapy, MakeBundle

from katapy.hypervisor.qemu import QEMU

IN_LAB = "KATAPY_LAB" in os.environ


def test_runs_on_what_the_host_has(katapy: Katapy, bundle: MakeBundle) -> None:
    """KVM where the CPU has it and there is a device, TCG elsewhere; what `check` says is what a VM runs on."""
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    virtualization = bool({"svm", "vmx"} & set(flags)) and Path("/dev/kvm").exists()
    assert virtualization or not IN_LAB, "the lab has lost its KVM"
    expected = "kvm" if virtualization else "tcg"

    checked = json.loads(katapy("check", "--format", "json", check=True).stdout)
    found = {each["name"]: each["detail"] for each in checked}
    assert found["accelerator"].split()[0].rstrip(":") == expected, found["accelerator"]

    katapy.detach("run", "--detach", "--bundle", bundle(["sleep", "1000"]), "c1")
    arguments = _qemu(katapy, "c1")
    assert arguments[arguments.index("-accel") + 1].split(",")[0] == expected
    assert (arguments[arguments.index("-cpu") + 1] == "host") is virtualization
    katapy("delete", "--force", "c1", check=True)


def test_two_pods_at_once(katapy: Katapy, bundle: MakeBundle) -> None:
    """Each command reaches the guest it is for."""
    for name in ("c1", "c2"):
        script = f"echo {name} > /dev/shm/name; sleep 1000"
        katapy.detach("run", "--detach", "--bundle", bundle(["sh", "-c", script]), name)
    for name in ("c1", "c2", "c1"):
        assert katapy("exec", name, "cat", "/dev/shm/name", check=True).stdout.decode() == f"{name}\n"
    for name in ("c1", "c2"):
        katapy("delete", "--force", name, check=True)


def _qemu(katapy: Katapy, container_id: str) -> list[str]:
    """Return the arguments of a container's QEMU."""
    pid = next(each["pid"] for each in katapy.saved(container_id)["helpers"] if each["name"] == QEMU)
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
