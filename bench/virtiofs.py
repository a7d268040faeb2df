"""virtio-fs: reading, writing and unpacking in a container's volume, beside the same virtiofsd without katapy.

A VM, or a container, and a directory are new for each round: nothing has been cached in a guest when the work begins.
The host has the files in its memory in all cases; what is measured is the way to them, not the disk.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from pathlib import Path
from typing import Final, NamedTuple

from containers import Runtime
from context import Bench
from figures import BenchError, Recorder
from programs import read_randomly

_HERE: Final = Path(__file__).resolve().parent
_ROOT: Final = _HERE.parent
_WORKLOAD: Final = _HERE / "workload.sh"
_TREES: Final = ("katapy", "guest-agent", "images", "tests", "docs")
_PAGE: Final = 4096
_BARE: Final = "bare VM"


class Timed(NamedTuple):
    """One line of ``workload.sh``."""

    name: str
    seconds: float


def parse_output(text: str) -> list[Timed]:
    """Return what ``workload.sh`` has timed. Raises BenchError with its text where it has failed."""
    found = []
    for line in text.splitlines():
        try:
            name, began, ended = line.split()
            found.append(Timed(name, float(ended) - float(began)))
        except ValueError as error:
            raise BenchError(f"the work has failed: {text.strip()}") from error
    if [each.name for each in found] != ["read", "write", "random", "untar"]:
        raise BenchError(f"the work was not done to its end: {text.strip()}")
    return found


def measure(bench: Bench) -> Recorder:
    """Measure the group."""
    recorder = Recorder("virtiofs")
    size = bench.plan.file_bytes
    moved = {"read": size, "write": size, "random": bench.plan.reads * _PAGE, "untar": 0}
    labels = {
        "read": "sequential read",
        "write": "sequential write",
        "random": "random reads of 4 KiB",
        "untar": "untar of a source tree",
    }
    for _ in range(bench.plan.long_runs):
        for where, runtime in [(_BARE, None), *bench.peers]:
            with tempfile.TemporaryDirectory(dir=bench.directory) as name:
                output = _work(bench, runtime, fill(Path(name), size, bench.plan.reads))
            for what, seconds in parse_output(output):
                beside = f"{labels[what]}, {_BARE}" if runtime else None
                recorder.add(f"{labels[what]}, {where}", seconds, beside=beside, moved=moved[what])
    return recorder


def _work(bench: Bench, runtime: Runtime | None, share: Path) -> str:
    """Do the work in a container of ``runtime``, or in a bare VM, and return what it printed."""
    if runtime is None:
        return bench.bare.work(share)
    return runtime.output(bench.bundles.make("sh", "-c", "cd /work && exec sh ./workload.sh", work=share))


def fill(share: Path, size: int, reads: int) -> Path:
    """Put what ``workload.sh`` needs into ``share``: files of ``size`` bytes, a power of two; return ``share``."""
    share.chmod(0o755)
    for name in ("data", "pages"):
        with (share / name).open("wb") as file:
            for _ in range(0, size, 1 << 20):
                file.write(os.urandom(1 << 20))
    (share / "read-randomly").write_bytes(read_randomly(reads, size.bit_length() - 1))
    (share / "read-randomly").chmod(0o755)
    shutil.copy(_WORKLOAD, share)
    with tarfile.open(share / "tree.tar", "w") as archive:
        for tree in _TREES:
            archive.add(_ROOT / tree, tree, filter=_member)
    return share


def _member(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if "__pycache__" in member.name:
        return None
    member.uid = member.gid = 0  # a container may not give files away
    return member
