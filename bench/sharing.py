"""Memory of a second pod beside a first of the same template, with its root file system in a directory or on a disk.

With a directory each VM has a copy of the template's memory, since virtiofsd maps it, too. With a disk, and the
kernel's vsock device, the pods have it in common, but for what each has written to (docs/templates.md).
"""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Final

from context import Bench
from figures import BenchError, Recorder, Unit
from memory import SETTLE, pod_memory

_ARGS: Final = ("sleep", "100000")


def measure(bench: Bench) -> Recorder:
    """Measure the group."""
    recorder = Recorder("sharing")
    disk = _make_disk(bench.bundles.rootfs, bench.directory / "root.erofs")
    bundles = {"a directory": bench.bundles.make(*_ARGS), "a disk": bench.bundles.make(*_ARGS, disk=disk)}
    for _ in range(min(bench.plan.runs, 3)):
        for place, bundle in bundles.items():
            alone = f"first pod, its root {place}"
            first, both = _measure_two(bench, bundle)
            recorder.add(alone, first, unit=Unit.BYTES)
            recorder.add(f"what the second adds, its root {place}", both - first, beside=alone, unit=Unit.BYTES)
    return recorder


def _measure_two(bench: Bench, bundle: Path) -> tuple[int, int]:
    """Return the PSS in bytes of a pod, and of it and another one."""
    root = bench.warm.root
    with bench.warm.detached(bundle) as first:
        time.sleep(SETTLE)
        alone = pod_memory(root, first).total()
        with bench.warm.detached(bundle) as second:
            time.sleep(SETTLE)
            return alone, sum(pod_memory(root, each).total() for each in (first, second))


def _make_disk(rootfs: Path, image: Path) -> Path:
    """Write a root file system to a disk image and return that. Raises BenchError."""
    try:
        subprocess.run(["mkfs.erofs", "--quiet", image, rootfs], check=True, stdout=subprocess.DEVNULL)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise BenchError(f"cannot make a disk image: {error}") from error
    return image
