"""Real QEMU, tiny guests: it starts, says why when it does not, has no privilege, and is gone afterwards."""

from __future__ import annotations

import asyncio
import os
import secrets
import select
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_guest
from own_children import children

from katapy.console import LOG_BYTES
from katapy.devices import Disk, SharedDir
from katapy.errors import InvalidArgument, KatapyError, NotFound, Timeout, Unavailable
from katapy.hypervisor import VmConfig
from katapy.hypervisor.accel import Acceleration, Kind, measure
from katapy.hypervisor.qemu import QemuVm, start_vm
from katapy.hypervisor.snapshot import Snapshot

pytestmark = pytest.mark.root

READY = tiny_guest.write(tiny_guest.CONSOLE, b"hello from the guest\r\n") + tiny_guest.write(
    tiny_guest.READY, b"ready\r\n"
)
BOOT_TIMEOUT = 60.0


@pytest.fixture
def config(tmp_path: Path) -> VmConfig:
    return VmConfig(
        qemu=Path("/usr/bin/qemu-system-x86_64"),
        acceleration=Acceleration(Kind.TCG, "a test"),
        vcpus=1,
        memory_bytes=64 << 20,
        kernel=boots(tmp_path, READY + tiny_guest.HALT),
    )


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No descriptor and no child outlives a VM."""
    before, children_before = descriptors(), children()
    yield
    assert [entry for entry in descriptors() if entry not in before] == []
    assert children() - children_before == set()


def descriptors() -> list[str]:
    found = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            found.append(f"{fd.name} {fd.readlink()}")
        except FileNotFoundError:  # the listing's own
            continue
    # What pytest and asyncio keep is not ours.
    return sorted(entry for entry in found if "pidfd" in entry or "memfd" in entry or "guest" in entry)


def boots(directory: Path, code: bytes) -> Path:
    path = directory / "guest"
    path.write_bytes(tiny_guest.kernel(code))
    return path


async def failure(config: VmConfig, directory: Path, *, timeout: float = BOOT_TIMEOUT) -> str:
    """Return the text of the error with which this VM fails."""
    with pytest.raises(KatapyError) as caught:
        async with start_vm(config, name="web", console_path=directory / "console.log") as vm:
            await vm.wait_ready(timeout)
    return str(caught.value)


async def test_a_guest_gets_ready_and_is_ended(config: VmConfig, tmp_path: Path) -> None:
    async with start_vm(config, name="web", console_path=tmp_path / "console.log") as vm:
        await vm.wait_ready(BOOT_TIMEOUT)
        assert vm.console.tail(1) == "hello from the guest"
        pid = vm.process.pid
        await vm.stop()
        await vm.stop()
    assert not Path(f"/proc/{pid}").exists()
    assert b"hello from the guest" in (tmp_path / "console.log").read_bytes()


async def test_qemu_has_no_privilege(config: VmConfig, tmp_path: Path) -> None:
    async with start_vm(config, name="web", console_path=tmp_path / "console.log") as vm:
        lines = Path(f"/proc/{vm.process.pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert len(set(status["Uid"].split())) == 1
    assert status["Groups"].strip() == ""
    for kind in ("CapPrm", "CapEff", "CapInh", "CapBnd", "CapAmb"):
        assert int(status[kind], 16) == 0
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")


@pytest.mark.parametrize("last", [False, True])
async def test_qemus_users_are_its_own(
    config: VmConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    """A QEMU could get the user of another VM's vsock device, which is 0x70000000 and its pid, below 2^22."""
    monkeypatch.setattr(secrets, "randbelow", lambda count: count - 1 if last else 0)
    async with start_vm(config, name="web", console_path=tmp_path / "console.log") as vm:
        uid = os.stat(f"/proc/{vm.process.pid}").st_uid
    assert 0x7000_0000 + (1 << 22) <= uid <= 0x7FFF_FFFF


async def test_files_that_only_root_may_read_work(config: VmConfig, tmp_path: Path) -> None:
    """Ubuntu's kernels have mode 0600, an image directory 0700, and QEMU is not root."""
    private = tmp_path / "private"
    private.mkdir(mode=0o700)
    kernel = boots(private, READY + tiny_guest.HALT)
    kernel.chmod(0o600)
    image = private / "image"
    image.write_bytes(bytes(4096))
    image.chmod(0o400)
    private_config = replace(config, kernel=kernel, devices=(Disk(image, "root"),))
    async with start_vm(private_config, name="web", console_path=tmp_path / "console.log") as vm:
        await vm.wait_ready(BOOT_TIMEOUT)


@pytest.mark.parametrize("what", ["kernel", "initramfs", "disk"])
async def test_a_missing_file_is_named(config: VmConfig, tmp_path: Path, what: str) -> None:
    missing = tmp_path / "missing"
    changes = {
        "kernel": replace(config, kernel=missing),
        "initramfs": replace(config, initramfs=missing),
        "disk": replace(config, devices=(Disk(missing, "root"),)),
    }
    assert await failure(changes[what], tmp_path) == f"cannot open {what} {missing}: no such file"


@pytest.mark.parametrize("kind", ["directory", "fifo", "empty"])
async def test_a_kernel_that_is_no_file_is_refused(config: VmConfig, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "odd"
    {"directory": path.mkdir, "fifo": lambda: os.mkfifo(path), "empty": path.touch}[kind]()
    with pytest.raises(InvalidArgument, match="cannot use kernel"):
        async with start_vm(replace(config, kernel=path), name="web", console_path=tmp_path / "console.log"):
            pass


async def test_a_missing_qemu_is_named(config: VmConfig, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="/nonexistent/qemu"):
        async with start_vm(
            replace(config, qemu=Path("/nonexistent/qemu")), name="web", console_path=tmp_path / "console.log"
        ):
            pass


async def test_a_kernel_that_is_something_else_is_refused(config: VmConfig, tmp_path: Path) -> None:
    """QEMU takes any file for an ancient kernel, and the guest then hangs until the boot's deadline."""
    junk = tmp_path / "junk"
    junk.write_bytes(b"no kernel at all" * 4096)
    assert await failure(replace(config, kernel=junk), tmp_path) == (
        f"cannot use kernel {junk}: neither a bzImage nor an ELF vmlinux"
    )


async def test_qemus_own_words_are_in_the_error(config: VmConfig, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(config.kernel.read_bytes()[:64].ljust(8192, b"\0"))
    text = await failure(replace(config, kernel=broken), tmp_path)
    assert text.startswith("VM web failed during QEMU start: QEMU ended with status 1: ")
    assert "kernel" in text


async def test_a_vhost_user_backend_that_is_gone(config: VmConfig, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(writer)
    try:
        text = await failure(replace(config, devices=(SharedDir("katapy", reader),)), tmp_path)
    finally:
        os.close(reader)
    assert "failed during QEMU start" in text


async def test_a_guest_that_resets_before_it_is_ready(config: VmConfig, tmp_path: Path) -> None:
    code = tiny_guest.write(tiny_guest.CONSOLE, b"panic: no root\n") + tiny_guest.reset()
    text = await failure(replace(config, kernel=boots(tmp_path, code)), tmp_path)
    assert text == (
        "VM web failed during guest boot: QEMU ended with status 0 (guest-reset)\n"
        "last lines of the guest console:\n"
        "panic: no root"
    )


async def test_a_guest_that_hangs(config: VmConfig, tmp_path: Path) -> None:
    with pytest.raises(Timeout, match=r"VM web did not get ready within 0\.2 s"):
        async with start_vm(
            replace(config, kernel=boots(tmp_path, tiny_guest.HALT)), name="web", console_path=tmp_path / "console.log"
        ) as vm:
            await vm.wait_ready(0.2)


async def test_a_guest_that_says_something_else(config: VmConfig, tmp_path: Path) -> None:
    code = tiny_guest.forever(tiny_guest.write(tiny_guest.READY, b"A" * 64))
    with pytest.raises(Unavailable, match="where b'ready' was expected"):
        async with start_vm(
            replace(config, kernel=boots(tmp_path, code)), name="web", console_path=tmp_path / "console.log"
        ) as vm:
            await vm.wait_ready(BOOT_TIMEOUT)


async def test_a_killed_qemu_is_reported(config: VmConfig, tmp_path: Path) -> None:
    hanging = replace(config, kernel=boots(tmp_path, tiny_guest.HALT))
    async with start_vm(hanging, name="web", console_path=tmp_path / "console.log") as vm:
        waiting = asyncio.create_task(vm.wait_ready(BOOT_TIMEOUT))
        await asyncio.sleep(0)
        vm.process.signal(signal.SIGKILL)
        with pytest.raises(Unavailable, match="failed during guest boot: QEMU was killed by signal 9"):
            await waiting


async def test_a_flooding_guest_neither_blocks_nor_fills_the_disk(config: VmConfig, tmp_path: Path) -> None:
    """The guest writes 2 MiB to its console and is ready only after that: it must have been drained, and bounded."""
    line = tiny_guest.write(tiny_guest.CONSOLE, b"x" * 63 + b"\n")
    loops = (2 << 20) // 64
    count = b"\xb9" + loops.to_bytes(4, "little")  # mov ecx, loops
    again = b"\x49\x0f\x85" + (-len(line) - 7).to_bytes(4, "little", signed=True)  # dec ecx; jnz line
    code = count + line + again + tiny_guest.write(tiny_guest.READY, b"ready\n") + tiny_guest.HALT
    log = tmp_path / "console.log"
    async with start_vm(replace(config, kernel=boots(tmp_path, code)), name="web", console_path=log) as vm:
        await vm.wait_ready(BOOT_TIMEOUT)
        assert 0 < log.stat().st_size <= LOG_BYTES
        # The last bytes may still be on their way: the ports are separate streams.
        assert set(vm.console.tail(2)) == {"x", "\n"}


async def test_an_unwritable_console_log_is_named(config: VmConfig, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="cannot write the console log"):
        async with start_vm(config, name="web", console_path=tmp_path / "none" / "console.log"):
            pass


def test_qemu_dies_with_its_owner(config: VmConfig, tmp_path: Path) -> None:
    """The death signal must survive the change of user: the kernel clears it when ids change."""
    program = f"""
        import asyncio
        from pathlib import Path
        from katapy.hypervisor import VmConfig
        from katapy.hypervisor.accel import Acceleration, Kind
        from katapy.hypervisor.qemu import start_vm

        async def main():
            tcg = Acceleration(Kind.TCG, "a test")
            config = VmConfig(Path({str(config.qemu)!r}), tcg, 1, 64 << 20, Path({str(config.kernel)!r}))
            async with start_vm(config, name="web", console_path=Path({str(tmp_path / "console.log")!r})) as vm:
                print(vm.process.pid, flush=True)
                await asyncio.Event().wait()

        asyncio.run(main())
    """
    root = Path(__file__).parents[2]
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, env={"PYTHONPATH": str(root)}
    )
    assert owner.stdout is not None
    with owner.stdout:
        pidfd = os.pidfd_open(int(owner.stdout.readline()))
    try:
        owner.kill()
        owner.wait()
        assert select.select([pidfd], [], [], 60.0)[0] == [pidfd]
    finally:
        os.close(pidfd)


async def test_a_probe_that_hangs_is_given_up() -> None:
    assert await measure(["/bin/sh", "-c", "echo begun; exec sleep infinity"], 0.05) is None


async def test_a_probe_that_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Says nothing of KVM: the host may be that busy."""
    monkeypatch.setattr("katapy.hypervisor.accel._BEGIN_DEADLINE", 0.05)
    with pytest.raises(Unavailable, match=r"not begun after 0\.05 s"):
        await measure(["/usr/bin/sleep", "infinity"], 10)
    with pytest.raises(Unavailable, match="does not begin"):
        await measure(["/usr/bin/true"], 10)


async def test_a_probe_that_answers() -> None:
    assert await measure(["/usr/bin/printf", "begun\n0.25"], 10) == pytest.approx(0.25)
    with pytest.raises(Unavailable, match="busy"):
        await measure(["/usr/bin/printf", "begun\nerror: device busy"], 10)


async def save(config: VmConfig, directory: Path) -> Snapshot:
    async with start_vm(config, name="web", console_path=directory / "console.log") as vm:
        await vm.wait_ready(BOOT_TIMEOUT)
        runs = await vm.save(directory / "ram", directory / "state")
    return Snapshot(directory / "ram", runs, directory / "state")


async def printed(vm: QemuVm) -> str:
    """Return the last line of the console when there is one."""
    async with asyncio.timeout(BOOT_TIMEOUT):
        while not (line := vm.console.tail(1)):  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0)
    return line


async def test_a_saved_vm_goes_on_where_it_was(config: VmConfig, tmp_path: Path) -> None:
    """As often as is wanted, each time with a console of its own, and from files that only root may read."""
    ready = tiny_guest.write(tiny_guest.READY, b"ready\r\n")
    code = ready + tiny_guest.forever(tiny_guest.write(tiny_guest.CONSOLE, b"t"))
    saved = replace(config, kernel=boots(tmp_path, code))
    snapshot = await save(saved, tmp_path)
    # The firmware, the guest and what it has of tables: no more.
    assert 0 < snapshot.ram.stat().st_size < 1 << 20
    assert stat.S_IMODE(snapshot.state.stat().st_mode) == 0o600
    for name in ("one", "two"):
        path = tmp_path / name
        async with start_vm(saved, name=name, console_path=path, snapshot=snapshot) as vm:
            await vm.restore(saved, snapshot)
            await vm.resume()
            assert (await printed(vm)).startswith("t")


async def test_a_vm_is_restored_as_what_it_was(config: VmConfig, tmp_path: Path) -> None:
    """With another size of memory QEMU refuses the state, and says why."""
    snapshot = await save(config, tmp_path)
    larger = replace(config, memory_bytes=128 << 20)
    with pytest.raises(
        Unavailable, match=r"VM web failed during migrate-incoming: QEMU ended with status 1: .*ram.*; .*load"
    ):
        async with start_vm(larger, name="web", console_path=tmp_path / "console.log", snapshot=snapshot) as vm:
            await vm.restore(larger, snapshot)


async def test_a_state_that_makes_no_sense_is_refused(config: VmConfig, tmp_path: Path) -> None:
    snapshot = await save(config, tmp_path)
    snapshot.state.write_bytes(b"nonsense" * 100)
    with pytest.raises(Unavailable, match="VM web failed during migrate-incoming: QEMU ended with status 1"):
        async with start_vm(config, name="web", console_path=tmp_path / "console.log", snapshot=snapshot) as vm:
            await vm.restore(config, snapshot)


async def test_a_missing_state_is_named(config: VmConfig, tmp_path: Path) -> None:
    snapshot = await save(config, tmp_path)
    snapshot.state.unlink()
    with pytest.raises(NotFound, match="cannot open template"):
        async with start_vm(config, name="web", console_path=tmp_path / "console.log", snapshot=snapshot) as vm:
            await vm.restore(config, snapshot)
