"""Which user a QEMU with KVM is, where only root may open /dev/kvm: a fake QEMU says it, with a fake device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[2]
SCRIPT = """
import asyncio, os, re, stat, sys
from pathlib import Path
from katapy import linux
from katapy.errors import Unavailable
from katapy.hypervisor import VmConfig
from katapy.hypervisor.accel import Acceleration, Kind
from katapy.hypervisor.qemu import start_vm
from katapy.storage.shared_dir import enter_private_mounts
from katapy.tree import mounts_below

sandbox, kernel, mode, group = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3], 8), int(sys.argv[4])
os.umask(0o077)
enter_private_mounts()
linux.mount("dev", "/dev", "tmpfs", linux.MS_NOSUID, "mode=0755")
os.mknod("/dev/null", stat.S_IFCHR, os.makedev(1, 3))
os.chmod("/dev/null", 0o666)
# /dev/zero's numbers: what is opened is told from what is not.
os.mknod("/dev/kvm", stat.S_IFCHR, os.makedev(1, 5))
os.chmod("/dev/kvm", mode)
os.chown("/dev/kvm", 0, group)
before = os.stat("/dev/kvm").st_ino
Path("/dev/qemu").write_text('''#!/bin/sh
echo "id $(id -u) $(id -G) read $(head -c 3 /dev/kvm | od -An -tx1) $(stat -c '%u %a' /dev/kvm)" >&2
exit 1
''')
os.chmod("/dev/qemu", 0o755)

async def main():
    config = VmConfig(Path("/dev/qemu"), Acceleration(Kind.KVM, "a test"), 1, 64 << 20, kernel)
    for _ in range(2):
        try:
            async with start_vm(config, name="web", console_path=sandbox / "console.log"):
                raise SystemExit("started")
        except Unavailable as error:
            print(re.search("id .*", str(error))[0])

asyncio.run(main())
assert os.stat("/dev/kvm").st_ino == before
assert mounts_below(str(sandbox)) == [] and os.listdir(sandbox) == ["console.log"], os.listdir(sandbox)
"""


@pytest.mark.parametrize(("mode", "group"), [(0o600, 0), (0o660, 0), (0o660, 108), (0o666, 0)])
def test_qemu_is_never_root(tmp_path: Path, mode: int, group: int) -> None:
    """Without udev /dev/kvm has mode 0600, and QEMU ran as root there; with root's group it was in that group."""
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"\x7fELF")
    sandbox = tmp_path / "sandbox"
    sandbox.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(sandbox), str(kernel), f"{mode:o}", str(group)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    said = [line.split() for line in done.stdout.splitlines()]
    uids = [words[1] for words in said]
    assert all(0x7040_0000 <= int(uid) < 0x8000_0000 for uid in uids)
    assert len(set(uids)) == 2
    for uid, words in zip(uids, said, strict=True):
        groups = [uid, str(group)] if group else [uid]
        node = ["0", f"{mode:o}"] if group or mode == 0o666 else [uid, "600"]
        assert words == ["id", uid, *groups, "read", "00", "00", "00", *node]
