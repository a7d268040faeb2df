"""What the figures were measured on: the machine, and the versions of all that took part."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import katapy
from katapy.assets.guest import Kernel
from katapy.config import Config
from katapy.hypervisor.accel import Acceleration

_ROOT = Path(__file__).resolve().parents[1]


def describe_machine(acceleration: Acceleration) -> dict[str, str]:
    """Return what the machine is."""
    memory = parse_field(Path("/proc/meminfo").read_text(), "MemTotal")
    return {
        "cpu": parse_field(Path("/proc/cpuinfo").read_text(), "model name") or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{int(memory.split()[0]) / (1 << 20):.1f} GiB" if memory else "unknown",
        "kernel": platform.release(),
        "accelerator": f"{acceleration.kind} ({acceleration.reason})",
    }


def describe_versions(config: Config, kernel: Kernel, runc: str | None) -> dict[str, str]:
    """Return the versions of what took part."""
    versions = {
        "katapy": katapy.__version__,
        "commit": _first_line(["git", "-C", str(_ROOT), "describe", "--always", "--dirty"]),
        "python": platform.python_version(),
        "qemu": _first_line([str(config.hypervisor.qemu), "--version"]),
        "guest kernel": f"{kernel.version} ({kernel.kind})",
    }
    return versions if runc is None else versions | {"runc": _first_line([runc, "--version"])}


def parse_field(text: str, name: str) -> str:
    """Return the value of the first line ``name: value``, empty where there is none."""
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() == name:
            return value.strip()
    return ""


def _first_line(argv: Sequence[str]) -> str:
    if shutil.which(argv[0]) is None:
        return "unknown"
    done = subprocess.run(argv, capture_output=True, text=True)
    return done.stdout.partition("\n")[0].strip() or "unknown"
