"""A template's memory that pods share: nobody can write to it, and it is had of a process that holds it and lives."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from katapy.errors import Unavailable
from katapy.hypervisor.held_memory import RECORD, hold_memory
from katapy.hypervisor.snapshot import Snapshot
from katapy.state import ProcessRef

PAGE = 4096
SIZE = 64 * PAGE
CONTENT = "c" * 64
ALL_SEALS = 0xF
# What a pod's shim does, until it is told to end.
HOLDER = """
import sys
from pathlib import Path
from katapy.hypervisor.held_memory import hold_memory
from katapy.hypervisor.snapshot import Snapshot
ram, directory, content = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
with hold_memory(Snapshot(ram, ((8192, 4096),), ram, content), 64 * 4096, directory):
    print("holds", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    ram = tmp_path / "ram"
    ram.write_bytes(b"x" * PAGE)
    return Snapshot(ram, ((2 * PAGE, PAGE),), tmp_path / "state", CONTENT)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The directories of two pods, of which the first is another process's."""
    for name in ("a", "b"):
        (tmp_path / "pods" / name).mkdir(parents=True)
    return tmp_path / "pods"


@pytest.fixture
def holder(snapshot: Snapshot, root: Path) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-c", HOLDER, str(snapshot.ram), str(root / "a"), CONTENT]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "holds\n"
        yield process
        process.kill()


def _inode(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _held_inode(root: Path) -> tuple[int, int]:
    record = json.loads((root / "a" / RECORD).read_text())
    status = Path(f"/proc/{record['pid']}/fd/{record['fd']}").stat()
    return status.st_dev, status.st_ino


def test_nobody_can_write_to_it(snapshot: Snapshot, root: Path) -> None:
    """QEMU opens it for writing, and maps it privately: what it writes is its own, and there is no other way."""
    with hold_memory(snapshot, SIZE, root / "b") as fd:
        expected = bytes(2 * PAGE) + b"x" * PAGE + bytes(SIZE - 3 * PAGE)
        assert os.pread(fd, SIZE, 0) == expected
        again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        try:
            with pytest.raises(PermissionError):
                mmap.mmap(again, SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            for write in (lambda: os.pwrite(again, b"y", 0), lambda: os.ftruncate(again, 0)):
                with pytest.raises(PermissionError):
                    write()
            with pytest.raises(OSError, match=os.strerror(errno.EPERM)):
                fcntl.fcntl(again, 1033, 0)
            with mmap.mmap(again, SIZE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as private:
                private[2 * PAGE : 2 * PAGE + 1] = b"y"
        finally:
            os.close(again)
        assert os.pread(fd, SIZE, 0) == expected
        assert fcntl.fcntl(fd, 1034) == ALL_SEALS
        # Zeros of a template take no memory.
        assert os.fstat(fd).st_blocks * 512 == PAGE


def test_it_is_had_of_another_pod_and_outlives_that(
    snapshot: Snapshot, root: Path, holder: subprocess.Popen[str]
) -> None:
    held = _held_inode(root)
    # What is there already is not read again.
    snapshot.ram.unlink()
    with hold_memory(snapshot, SIZE, root / "b") as fd:
        assert _inode(fd) == held
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert os.pread(fd, 1, 2 * PAGE) == b"x"
        assert (root / "b" / RECORD).exists()
    assert not (root / "b" / RECORD).exists()


def test_a_holder_that_was_killed_is_passed_over(snapshot: Snapshot, root: Path, holder: subprocess.Popen[str]) -> None:
    """Its record is still there, for it could not remove it."""
    held = _held_inode(root)
    holder.kill()
    holder.wait()
    assert (root / "a" / RECORD).exists()
    with hold_memory(snapshot, SIZE, root / "b") as fd:
        assert _inode(fd) != held
        assert os.pread(fd, 1, 2 * PAGE) == b"x"


@pytest.mark.parametrize("change", ["content", "size", "number", "start_time", "damaged"])
def test_what_is_not_the_same_is_not_taken(
    snapshot: Snapshot, root: Path, holder: subprocess.Popen[str], change: str
) -> None:
    """Another template, another size, another file at that number, another process with that pid, no record at all."""
    assert holder.poll() is None
    held, size, path = _held_inode(root), SIZE, root / "a" / RECORD
    record = json.loads(path.read_text())
    match change:
        case "content":
            snapshot = Snapshot(snapshot.ram, snapshot.runs, snapshot.state, "d" * 64)
        case "size":
            size += PAGE
        case "number":
            path.write_text(json.dumps({**record, "fd": 0}))
        case "start_time":
            path.write_text(json.dumps({**record, "start_time": record["start_time"] + 1}))
        case _:
            path.write_text("{")
    with hold_memory(snapshot, size, root / "b") as fd:
        assert _inode(fd) != held
        assert os.fstat(fd).st_size == size


def test_what_can_still_be_written_is_not_taken(snapshot: Snapshot, root: Path) -> None:
    """It has the right name and size; whoever fills it may not be done, or may change it later."""
    fd = os.memfd_create(f"katapy-{CONTENT}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, SIZE)
        own = ProcessRef.of("shim", os.getpid())
        (root / "a" / RECORD).write_text(json.dumps({"pid": own.pid, "start_time": own.start_time, "fd": fd}))
        with hold_memory(snapshot, SIZE, root / "b") as taken:
            assert _inode(taken) != _inode(fd)
    finally:
        os.close(fd)


def test_half_of_it_is_never_recorded(snapshot: Snapshot, root: Path) -> None:
    os.truncate(snapshot.ram, PAGE // 2)
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(Unavailable, match="cannot read the template's memory"), hold_memory(snapshot, SIZE, root / "b"):
        pass
    assert not list(root.glob("*/*"))
    assert set(os.listdir("/proc/self/fd")) == before
