"""The lab's host image: a Debian with systemd, QEMU and the engines, made by mmdebstrap from the host's apt sources.

It holds nothing of katapy: the project is handed in beside it, so a change of the code does not rebuild it. It is kept
under the digest of this recipe. It has no udev: the kernel makes the devices' nodes, and what needs a driver is loaded.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import debian
from initramfs import Entry, newc
from steps import BuildError, call, require_space, step

# What `scripts/setup` installs for users and for tests, but docker.io; and a host around it.
PACKAGES: Final = """
    busybox-static ca-certificates erofs-utils libseccomp2 mmdebstrap python3 python3-venv qemu-system-x86 util-linux
    buildah catatonit conmon containerd containernetworking-plugins dbus-daemon iproute2 iptables podman runc
    dbus iputils-ping kmod procps systemd systemd-sysv
"""
# In the order in which they depend on one another: what finds the root. systemd loads the rest.
_EARLY_MODULES: Final = """
    virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk libcrc32c erofs overlay
"""
_MODULES: Final = """
    kvm_amd vhost_vsock vhost_net virtio_console tun veth bridge macvtap overlay fuse loop sch_ingress cls_u32
    act_mirred act_police sch_tbf nf_tables
"""
_INIT: Final = """#!/bin/busybox sh
b=/bin/busybox
$b mount -t devtmpfs devtmpfs /dev
for module in /modules/*; do $b insmod "$module"; done
$b mount -t erofs -o ro /dev/vda /base
$b mount -t tmpfs -o size=70% tmpfs /changes
$b mkdir /changes/upper /changes/work
$b mount -t overlay -o lowerdir=/base,upperdir=/changes/upper,workdir=/changes/work overlay /root
$b mount -t erofs -o ro /dev/vdb /root/lab
$b mount --move /dev /root/dev
exec $b switch_root /root /sbin/init
"""
# The project's disk is at /lab; which program of it runs, the kernel's command line says.
_UNIT: Final = """[Unit]
Description=katapy's lab
Requires=dbus.socket systemd-modules-load.service
After=basic.target dbus.socket systemd-modules-load.service
FailureAction=poweroff-force
SuccessAction=poweroff-force
[Service]
ExecStart=/usr/bin/python3 /lab/tests/lab/inside.py
Delegate=yes
LimitNOFILE=20000
"""
_TARGET: Final = """[Unit]
Requires=basic.target lab.service
AllowIsolate=yes
"""
_FILES: Final = {
    "etc/systemd/system/lab.service": _UNIT,
    "etc/systemd/system/lab.target": _TARGET,
    "etc/modules-load.d/lab.conf": "".join(f"{name}\n" for name in _MODULES.split()),
    "etc/hostname": "lab\n",
    "etc/hosts": "127.0.0.1 localhost lab\n::1 localhost\n",
    "etc/resolv.conf": "",
    "etc/fstab": "",
}
_SPACE: Final = 4 << 30
_BUSYBOX: Final = Path("/bin/busybox")


@dataclass(frozen=True)
class HostImage:
    """The files that a lab boots."""

    directory: Path

    @property
    def root(self) -> Path:
        """An erofs file system."""
        return self.directory / "root.erofs"

    @property
    def kernel(self) -> Path:
        """Debian's, with its modules in the root."""
        return self.directory / "vmlinuz"

    @property
    def initramfs(self) -> Path:
        """It puts a tmpfs over the root, and mounts the project's disk."""
        return self.directory / "initramfs.cpio"


def provide(cache: Path) -> HostImage:
    """Return the image, built below ``cache`` where it is not there; those of other recipes go. Raises BuildError."""
    archives = debian.archives()
    digest = hashlib.sha256(Path(__file__).read_bytes() + archives.encode()).hexdigest()[:16]
    image = HostImage(cache / digest)
    if not image.directory.exists():
        shutil.rmtree(cache, ignore_errors=True)
        cache.mkdir(parents=True)
        require_space(cache, _SPACE)
        work = cache / "work"
        work.mkdir()
        debian.with_current_lists(lambda: _build(HostImage(work / "image"), work, archives))
        (work / "image").rename(image.directory)
        shutil.rmtree(work)
    return image


def _build(image: HostImage, work: Path, archives: str) -> None:
    root = work / "root"
    for left in (root, image.directory):
        shutil.rmtree(left, ignore_errors=True)
    image.directory.mkdir()
    with step("Debian packages of the lab"):
        include = f"--include={','.join(PACKAGES.split())}"
        options = ["--mode=root", "--variant=minbase", "--aptopt=APT::Install-Recommends false", include]
        call(["mmdebstrap", *options, debian.CODENAME, root, "-"], stdin=archives.encode())
    with step("kernel of the lab"):
        package, _ = debian.unpack_dependency(
            "linux-image-cloud-amd64", "linux-image-[0-9].*-cloud-amd64", work / "kernel"
        )
        release = package.removeprefix("linux-image-")
        modules = work / "kernel/lib/modules" / release
        shutil.copytree(modules, root / "usr/lib/modules" / release)
        call(["chroot", root, "depmod", release])
        shutil.copy(work / f"kernel/boot/vmlinuz-{release}", image.kernel)
        image.initramfs.write_bytes(newc(_initramfs(modules)))
    (root / "lab").mkdir()
    for name, text in _FILES.items():
        (root / name).write_text(text)
    with step("root.erofs of the lab"):
        call(["mkfs.erofs", "--quiet", image.root, root])


def _initramfs(modules: Path) -> Iterator[Entry]:
    for name in ("bin", "base", "changes", "dev", "modules", "root"):
        yield Entry(name, 0o040755)
    yield Entry("init", 0o100755, _INIT.encode())
    yield Entry("bin/busybox", 0o100755, _BUSYBOX.read_bytes())
    files = {path.stem.replace("-", "_"): path for path in modules.rglob("*.ko")}
    for index, name in enumerate(_EARLY_MODULES.split()):
        if name not in files:
            raise BuildError(f"the kernel package has no module {name}")
        yield Entry(f"modules/{index:02}-{name}", 0o100644, files[name].read_bytes())
