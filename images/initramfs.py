"""The initramfs for Debian's kernel: loads the drivers that katapy's devices need, then hands over to the image.

A kernel with these built in needs none. There is no udev in the guest: a driver that is not loaded here does not
appear when a device is hot-plugged.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from steps import BuildError

# In the order in which they depend on one another.
_MODULES: Final = """
    virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk libcrc32c erofs overlay fuse
    virtiofs vsock vmw_vsock_virtio_transport_common vmw_vsock_virtio_transport failover net_failover virtio_net
"""

_INIT: Final = """#!/bin/busybox sh
b=/bin/busybox
fail() {
    echo "katapy: $1; the guest image is damaged or missing: the virtual machine ends" > /dev/console
    $b poweroff -f
}
$b mount -t devtmpfs -o nosuid,mode=0755 devtmpfs /dev
for module in /modules/*; do
    $b insmod "$module" || fail "cannot load ${module#/modules/??-}"
done
$b mount -t erofs -o ro /dev/vda /root || fail "cannot mount the root /dev/vda"
[ -x /root/sbin/init ] || fail "the root has no /sbin/init"
$b mount --move /dev /root/dev
exec $b switch_root /root /sbin/init
"""


class Entry(NamedTuple):
    """A file of an initramfs: ``mode`` with its type (stat.S_IFMT), as in inode(7)."""

    path: str
    mode: int
    data: bytes = b""


def build(modules: Path, busybox: Path) -> bytes:
    """Return the initramfs for the kernel whose modules are below ``modules``. Raises BuildError."""
    directories = [Entry(name, 0o040755) for name in ("bin", "dev", "modules", "root")]
    programs = [Entry("init", 0o100755, _INIT.encode()), Entry("bin/busybox", 0o100755, busybox.read_bytes())]
    return newc([*directories, *programs, *_drivers(modules)])


def _drivers(modules: Path) -> Iterable[Entry]:
    # A file's name has either sort of dash, and nothing says which (modprobe.d(5)).
    files = {path.stem.replace("-", "_"): path for path in modules.rglob("*.ko")}
    for index, name in enumerate(_MODULES.split()):
        if name not in files:
            raise BuildError(f"the kernel package has no module {name}")
        yield Entry(f"modules/{index:02}-{name}", 0o100644, files[name].read_bytes())


def newc(entries: Iterable[Entry]) -> bytes:
    """Return a cpio archive in the kernel's format; equal entries give equal bytes.

    Format: Documentation/driver-api/early-userspace/buffer-format.rst of the kernel.
    """
    archive = bytearray()
    for inode, entry in enumerate((*entries, Entry("TRAILER!!!", 0)), start=1):
        name = entry.path.encode() + b"\0"
        # inode, mode, uid, gid, nlink, mtime, size, four device numbers, length of the name, checksum
        fields = (inode, entry.mode, 0, 0, 1, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
        archive += b"070701" + b"".join(b"%08x" % field for field in fields) + name
        archive += bytes(-len(archive) % 4) + entry.data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)
