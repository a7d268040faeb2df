"""Programs that do their worst in a sandbox: the verdict says so, and neither the host nor a neighbour notices.

What each attack is over with is asserted by the fixture ``victim``: see arena.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from arena import TIGHT, Arena, assert_ended, helpers, python
from harness import DEADLINE, KATAPY, await_true

from katapy import KilledBy, NotStarted, OutcomeUnknown, Sandbox, Unavailable
from katapy.config import Config

pytestmark = [pytest.mark.root, pytest.mark.vm]

_MIB = 1 << 20
# Of memory: the kernel charges a little to those that it has no choice with.
_MORE = 1 << 20
# Of a timeout to its answer, where the machine is slow and shared: half a second is for the bench to show.
_SOON = 60.0
# For a command to begin and to say so.
_ENOUGH = 8.0
_GROW = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(3):
            os.close(fd)
        while True:
            with open("/grown", "a") as file:
                file.write("x")
            time.sleep(0.01)
    os._exit(0)
while not os.path.exists("/grown"):
    time.sleep(0.01)
"""


# Processes and time.


def test_fork_bomb_that_gives_up(victim: Sandbox) -> None:
    bomb = "import os\nwhile True:\n    if os.fork() == 0:\n        __import__('time').sleep(1000)"
    assert_ended(victim.run(python(bomb)), KilledBy.PIDS, trusted=False, exit_code=1)


def test_fork_bomb_that_goes_on(victim: Sandbox) -> None:
    """What it has started is gone when the time is up."""
    result = victim.run(["sh", "-c", "bomb() { bomb | bomb & }; bomb 2>/dev/null; while :; do :; done"], timeout=3)
    assert_ended(result, KilledBy.WALL)
    assert result.usage.wall_seconds < 3 + _SOON


def test_as_many_processes_as_there_may_be(victim: Sandbox) -> None:
    """The command is one of them, and nobody else is."""
    script = """
import os, signal, sys
for _ in range(int(sys.argv[1])):
    if os.fork() == 0:
        signal.pause()
os.write(1, b"all")
"""
    most = TIGHT["processes"] - 1
    assert victim.run([*python(script), str(most)]).check().stdout == "all"
    assert_ended(victim.run([*python(script), str(most + 1)]), KilledBy.PIDS, trusted=False, exit_code=1)


def test_one_process(arena: Arena, host: None) -> None:
    with Sandbox(**{**TIGHT, "processes": 1}, state_dir=arena.state) as sandbox:
        assert sandbox.run(python("print(1)")).check().stdout == "1\n"
        assert_ended(sandbox.run(python("import os; os.fork()")), KilledBy.PIDS, trusted=False, exit_code=1)


def test_cpu_time_is_the_sum_of_all_processes(victim: Sandbox) -> None:
    result = victim.run(["sh", "-c", "for i in 1 2 3; do while :; do :; done & done; wait"], cpu_time=2)
    assert_ended(result, KilledBy.CPU)
    assert result.usage.host_cpu_seconds is not None
    assert result.usage.host_cpu_seconds >= 2


def test_spinning_on_every_cpu(arena: Arena, host: None) -> None:
    """With two of them, CPU time passes faster than time; the guest still answers."""
    with Sandbox(**TIGHT, cpus=2, state_dir=arena.state) as sandbox:
        assert_ended(sandbox.run(["sh", "-c", "(while :; do :; done) & while :; do :; done"], cpu_time=3), KilledBy.CPU)
        arena.check_neighbour()


@pytest.mark.parametrize(
    "script",
    [
        "exec sleep infinity",
        "trap '' HUP INT QUIT TERM; while :; do sleep 1; done",
        "exec <&- >&- 2>&-; while :; do sleep 1; done",
        "setsid sleep infinity & wait",
    ],
)
def test_running_on(victim: Sandbox, script: str) -> None:
    """By sleep, by ignoring signals, with no stream left, in a session of its own."""
    result = victim.run(["sh", "-c", script], timeout=1.5)
    assert_ended(result, KilledBy.WALL)
    assert 1.5 <= result.usage.wall_seconds < 1.5 + _SOON
    assert not result.ok


def test_nothing_outlives_a_run(victim: Sandbox) -> None:
    """Twice forked, in a session of its own and without streams: what it writes to grows no more."""
    assert_ended(victim.run(python(_GROW)), KilledBy.NONE, exit_code=0)
    grown = victim.files.read("/grown")
    # As long as it would take for two hundred more.
    victim.run(["sleep", "2"]).check()
    assert victim.files.read("/grown") == grown
    victim.files.remove("/grown")


def test_nothing_holds_the_streams(victim: Sandbox) -> None:
    """The end of the command is the end, though its child has its streams."""
    result = victim.run(["sh", "-c", "sleep infinity & echo started"])
    assert_ended(result, KilledBy.NONE, exit_code=0)
    assert result.stdout == "started\n"


# Memory.


def test_memory_hog(victim: Sandbox) -> None:
    result = victim.run(python("hog = []\nwhile True:\n    hog.append(bytearray(1 << 20))"))
    assert_ended(result, KilledBy.MEMORY, trusted=False, signal=signal.SIGKILL)
    assert result.usage.peak_memory_bytes is not None
    assert 200 * _MIB < result.usage.peak_memory_bytes <= 256 * _MIB + _MORE


def test_memory_hog_in_files_without_names(victim: Sandbox) -> None:
    hog = "import os\nfd = os.memfd_create('hog')\nwhile True:\n    os.write(fd, bytes(1 << 20))"
    assert_ended(victim.run(python(hog)), KilledBy.MEMORY, trusted=False, signal=signal.SIGKILL)


def test_memory_hog_in_tmpfs(victim: Sandbox) -> None:
    """All that can be written to is too small, and counts: with it the rest is too much."""
    hog = """
for name in ("/dev/shm/hog", "/dev/hog"):
    try:
        with open(name, "wb", 0) as file:
            while True:
                file.write(bytes(1 << 20))
    except OSError as error:
        print(name, error.errno, flush=True)
rest = bytearray(b"x") * (160 << 20)
"""
    result = victim.run(python(hog))
    assert_ended(result, KilledBy.MEMORY, trusted=False, signal=signal.SIGKILL)
    assert result.stdout == "/dev/shm/hog 28\n/dev/hog 28\n"


def test_page_cache_is_no_hog(victim: Sandbox) -> None:
    """A file larger than the memory is read as any other."""
    read = """
import os
os.truncate(os.open("/large", os.O_CREAT | os.O_RDWR), 320 << 20)
with open("/large", "rb", 0) as file:
    while file.read(1 << 20):
        pass
"""
    result = victim.run(python(read))
    assert_ended(result, KilledBy.NONE, exit_code=0)
    assert result.usage.peak_memory_bytes is not None
    assert result.usage.peak_memory_bytes <= 256 * _MIB + _MORE
    victim.files.remove("/large")


def test_a_child_without_memory(victim: Sandbox) -> None:
    """Where the program goes on, and succeeds, memory has not ended it."""
    hog = """
import os, sys
if os.fork() == 0:
    hog = []
    while True:
        hog.append(bytearray(1 << 20))
print(os.wait()[1])
sys.exit(int(sys.argv[1]))
"""
    result = victim.run([*python(hog), "0"])
    assert_ended(result, KilledBy.NONE, exit_code=0)
    assert result.stdout == "9\n"
    assert_ended(victim.run([*python(hog), "3"]), KilledBy.MEMORY, trusted=False, exit_code=3)


# Disk.


def test_disk_fill(arena: Arena, victim: Sandbox) -> None:
    """The host's tmpfs is as large as was asked for, and the file system below unchanged; what is removed is free."""
    fill = """
for number in range(1000):
    with open(f"/tmp/{number}", "wb", 0) as file:
        file.write(bytes(1 << 20))
"""
    assert_ended(victim.run(python(fill)), KilledBy.DISK, exit_code=1)
    assert 40 <= len(victim.files.list("/tmp")) <= 49
    layer = os.statvfs(f"/proc/{helpers(arena.state, victim.id)['shim']}/root{arena.state}/{victim.id}/layers/0/root")
    assert layer.f_blocks * layer.f_frsize == 48 * _MIB
    assert not list(Config.load().runtime.data_dir.glob("root/*/rootfs/tmp/*"))
    assert_ended(victim.run(["true"]), KilledBy.NONE, exit_code=0)
    assert_ended(victim.run(["sh", "-c", "kill -SEGV $$"]), KilledBy.SIGNAL, trusted=False, signal=signal.SIGSEGV)
    victim.run(["sh", "-c", "rm /tmp/*"]).check()
    _await_room(victim, 40 * _MIB)
    assert_ended(victim.run(["false"]), KilledBy.NONE, exit_code=1)


def test_inode_fill(victim: Sandbox) -> None:
    fill = "import os\nos.mkdir('/many')\nfor number in range(10000):\n    open(f'/many/{number}', 'w').close()"
    assert_ended(victim.run(python(fill)), KilledBy.DISK, exit_code=1)
    assert 550 < len(victim.files.list("/many")) <= 608
    victim.run(["rm", "-r", "/many"]).check()
    _await_room(victim, 1)


def test_sparse_file(victim: Sandbox) -> None:
    """A terabyte of nothing takes no room; none of it is read by accident."""
    victim.run(python("import os\nos.truncate(os.open('/sparse', os.O_CREAT | os.O_RDWR), 1 << 40)")).check()
    (entry,) = (entry for entry in victim.files.list("/") if entry.name == "sparse")
    assert entry.size == 1 << 40
    result = victim.run(["cat", "/sparse"])
    assert_ended(result, KilledBy.OUTPUT)
    assert len(result.stdout) == _MIB
    victim.files.remove("/sparse")


def _await_room(sandbox: Sandbox, size: int) -> None:
    """Wait until as much as was removed is free on the host."""

    def written() -> bool:
        try:
            sandbox.files.write("/room", bytes(size))
        except Unavailable:
            return False
        return True

    await_true(written)
    sandbox.files.remove("/room")


# Output.


def test_ten_gigabytes_of_output(victim: Sandbox) -> None:
    """The caller's memory stays what it was."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_memory()
    result = victim.run(["dd", "if=/dev/zero", "bs=1M", "count=10240"], text=False)
    assert_ended(result, KilledBy.OUTPUT)
    assert (result.truncated, len(result.stdout), result.stdout.strip(b"\0")) == (True, _MIB, b"")
    assert _peak_memory() - before < 16 * _MIB


def test_output_that_is_taken_as_it_comes(victim: Sandbox) -> None:
    """Through a caller that keeps nothing, more passes than it holds at a time."""
    Path("/proc/self/clear_refs").write_text("5")
    before, count = _peak_memory(), 0
    for chunk in victim.stream(["dd", "if=/dev/zero", "bs=1M", "count=48"], output="1G"):
        count += len(chunk.data) if chunk.stream == "stdout" else 0
    assert count == 48 * _MIB
    assert _peak_memory() - before < 16 * _MIB


def test_output_without_a_newline(victim: Sandbox) -> None:
    result = victim.run(python("print('x' * 500_000, end='')"))
    assert_ended(result, KilledBy.NONE, exit_code=0)
    assert result.stdout == "x" * 500_000


def test_as_much_output_as_there_may_be(victim: Sandbox) -> None:
    """And one byte more, with which the command may have ended before it is ended."""
    command = "import os, sys\nos.write(1, bytes(600))\nos.write(2, bytes(int(sys.argv[1])))"
    result = victim.run([*python(command), "400"], output=1000)
    assert_ended(result, KilledBy.NONE, exit_code=0)
    assert not result.truncated
    result = victim.run([*python(command), "401"], output=1000)
    assert_ended(result, KilledBy.OUTPUT)
    assert (result.truncated, len(result.stdout) + len(result.stderr)) == (True, 1000)


@pytest.mark.timeout(900)
def test_a_million_tiny_writes(victim: Sandbox) -> None:
    write = "import os\nfor number in range(1_000_000):\n    os.write(1, b'%d' % (number % 10))"
    result = victim.run(python(write), timeout=4 * DEADLINE)
    assert_ended(result, KilledBy.NONE, exit_code=0)
    assert result.stdout == "0123456789" * 100_000


def _peak_memory() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


# The agent, the kernel and the VM.


def test_killing_all_that_it_sees(victim: Sandbox) -> None:
    """That is itself, and what it started: neither the agent nor the init of its namespace has an ear for it."""
    kill = """
import os, signal
child = os.fork()
if child == 0:
    signal.pause()
os.kill(-1, signal.SIGKILL)
for number in range(1, 65):
    if number not in (32, 33):
        os.kill(1, number)
print(os.waitpid(child, 0)[1], {"1", str(os.getpid())} == {name for name in os.listdir("/proc") if name.isdigit()})
"""
    result = victim.run(python(kill))
    assert_ended(result, KilledBy.NONE, exit_code=0)
    assert result.stdout == "9 True\n"


def test_signals_of_its_own(victim: Sandbox) -> None:
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGXFSZ):
        result = victim.run(["sh", "-c", f"kill -{number} $$"])
        assert_ended(result, KilledBy.SIGNAL, trusted=False, signal=number)


def test_abort_and_a_status_that_looks_like_a_signal(victim: Sandbox) -> None:
    result = victim.run(python("import os; os.abort()"))
    assert_ended(result, KilledBy.SIGNAL, trusted=False, signal=signal.SIGABRT)
    assert_ended(victim.run(["sh", "-c", "exit 137"]), KilledBy.NONE, exit_code=137)


_TRICKS = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)

def call(name, *arguments):
    assert getattr(libc, name)(*arguments) == -1, name
    print(name, errno.errorcode[ctypes.get_errno()])

def refused(path, mode):
    try:
        open(path, mode, 0).close()
    except OSError as error:
        return errno.errorcode[error.errno]
    return ""

for command in (0x1234567, 0x4321FEDC, 0xCDEF0123, 0xA1B2C3D4, 0x45584543):
    call("reboot", command)
call("settimeofday", ctypes.byref((ctypes.c_long * 2)(1, 1)), None)
call("clock_settime", 0, ctypes.byref((ctypes.c_long * 2)(1, 1)))
call("init_module", b"x", 1, b"")
call("delete_module", b"x", 0)
call("mknod", b"/memory", 0o20666, 0x101)
call("mount", b"x", b"/mnt", b"tmpfs", 0, None)
call("unshare", 0x10000000)
call("ptrace", 16, 1, None, None)
call("sethostname", b"x", 1)
call("swapoff", b"/x")
call("iopl", 3)
for path in ("sysrq-trigger", "sys/kernel/core_pattern", "sys/kernel/sysrq", "sys/vm/drop_caches", "1/mem"):
    assert refused(f"/proc/{path}", "wb"), path
for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/pids.max", "/sys/power/state"):
    assert refused(path, "wb"), path
for name in ("mem", "kmem", "port", "kmsg", "vda", "pmem0", "vsock", "fuse"):
    assert refused(f"/dev/{name}", "rb") == "ENOENT", name
assert open("/proc/kcore", "rb").read(1) == b""
print(os.listdir("/sys/class/net"))
"""


def test_tricks_on_the_kernel(victim: Sandbox) -> None:
    """As root: none is a way to end or to change the VM, and the clock is the host's."""
    lines = victim.run(python(_TRICKS)).check().stdout.splitlines()
    assert lines[-1] == "['lo']"
    assert {line.split()[1] for line in lines[:-1]} == {"EPERM"}


def test_ending_the_vm_from_inside(victim: Sandbox) -> None:
    for command in ("reboot -f", "poweroff -f", "halt -f", "poweroff", "echo c > /proc/sysrq-trigger"):
        assert_ended(victim.run(["sh", "-c", f"{command}; exit 7"]), KilledBy.NONE, exit_code=7)
    assert victim.alive


def test_a_vm_that_stops_answering(arena: Arena, victim: Sandbox) -> None:
    with victim.start(["sh", "-c", "echo on; sleep infinity"], timeout=_ENOUGH) as process:
        assert process.read(DEADLINE) is not None
        os.kill(helpers(arena.state, victim.id)["QEMU"], signal.SIGSTOP)
        verdict = process.wait(DEADLINE)
    assert (verdict.killed_by, verdict.trusted, verdict.exit_code, verdict.signal) == (KilledBy.WALL, True, None, None)
    assert _ENOUGH <= verdict.wall_seconds < _ENOUGH + _SOON
    assert verdict.host_cpu_seconds is not None
    assert not victim.alive


def test_a_vm_that_dies(arena: Arena, victim: Sandbox) -> None:
    """That is a verdict; a further run could not start, and what was written can still be read."""
    with victim.start(["sh", "-c", "echo kept > /kept; echo on; sleep infinity"]) as process:
        assert process.read(DEADLINE) is not None
        os.kill(helpers(arena.state, victim.id)["QEMU"], signal.SIGKILL)
        verdict = process.wait(DEADLINE)
    assert (verdict.killed_by, verdict.trusted, verdict.exit_code, verdict.signal) == (
        KilledBy.VM_DIED,
        True,
        None,
        None,
    )
    with pytest.raises(NotStarted, match="has died"):
        victim.run(["true"])
    assert victim.files.read("/kept") == b"kept\n"


def test_a_shim_that_dies(arena: Arena, victim: Sandbox) -> None:
    with victim.start(["sh", "-c", "echo on; sleep infinity"]) as process:
        assert process.read(DEADLINE) is not None
        os.kill(helpers(arena.state, victim.id)["shim"], signal.SIGKILL)
        with pytest.raises(OutcomeUnknown, match="its shim died"):
            process.wait(DEADLINE)
    await_true(lambda: not victim.alive)


def test_a_caller_that_dies(arena: Arena, host: None) -> None:
    """All that it has started ends by itself."""
    state = arena.state.parent / "caller"
    state.mkdir()
    script = (
        "import sys\nfrom katapy import Sandbox\n"
        f"sandbox = Sandbox(state_dir={str(state)!r}, pool='').open()\n"
        "for chunk in sandbox.stream(['sh', '-c', 'echo on; exec sleep infinity'], timeout=None):\n"
        "    print('on', flush=True)"
    )
    with subprocess.Popen([KATAPY.with_name("python"), "-c", script], stdout=subprocess.PIPE) as caller:
        assert caller.stdout is not None
        assert caller.stdout.readline() == b"on\n"
        assert os.listdir(state)
        caller.kill()
    await_true(lambda: not os.listdir(state))
    state.rmdir()
    arena.check_neighbour()
