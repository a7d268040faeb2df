"""The lab's host image: a Debian with systemd, QEMU and the engines, made by mmdebstrap from the host's apt sources.

It holds nothing of katapy: the project is handed in beside it, so a change of the code does not rebuild it. It is kept
under the digest of this recipe. It has no udev: the kernel makes the devices' nodes, and what needs a driver is loaded.
"""

from __future__ import annotations

import hashlib
import lzma
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import debian
from initramfs import Entry, newc
from steps import BuildError, call, require_space, step


class Release(NamedTuple):
    """One of Debian: its Python, and the packages that it has beside those of all."""

    python: str
    packages: str


# What `scripts/setup` installs for users and for tests, but docker.io; and a host around it.
PACKAGES: Final = """
    busybox-static ca-certificates erofs-utils libseccomp2 mmdebstrap python3 python3-venv qemu-system-x86 util-linux
    buildah catatonit conmon containerd containernetworking-plugins dbus-daemon iproute2 iptables podman runc
    dbus iputils-ping kmod procps systemd systemd-sysv
"""
# By code names. Debian 13 has in packages of their own what came with QEMU and podman.
RELEASES: Final = {debian.CODENAME: Release("3.11", ""), "trixie": Release("3.13", "aardvark-dns netavark virtiofsd")}
# What finds the root. systemd loads the rest.
_EARLY_MODULES: Final = ("virtio_pci", "virtio_blk", "erofs", "overlay")
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
# Fetches the kernel of the release with the archives that the root is made of; its dependencies are of no use here.
_FETCH_KERNEL: Final = """
    set -e
    cd {directory}
    export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
    depends=$(apt-cache depends --important linux-image-cloud-amd64)
    name=$(echo "$depends" | sed -n 's/.*Depends: \\(linux-image-[0-9].*\\)/\\1/p')
    apt-get download -qq -o APT::Sandbox::User=root "$name"
"""
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


def provide(cache: Path, release: str = debian.CODENAME) -> HostImage:
    """Return the image of a release of Debian, by its code name, built below ``cache`` where it is not there.

    Those of other recipes go. Raises BuildError.
    """
    archives = debian.archives(release)
    digest = hashlib.sha256(Path(__file__).read_bytes() + archives.encode()).hexdigest()[:16]
    image = HostImage(cache / release / digest)
    if not image.directory.exists():
        shutil.rmtree(cache / release, ignore_errors=True)
        work = cache / release / "work"
        work.mkdir(parents=True)
        require_space(work, _SPACE)
        _build(HostImage(work / "image"), work, archives, release)
        (work / "image").rename(image.directory)
        shutil.rmtree(work)
    return image


def _build(image: HostImage, work: Path, archives: str, release: str) -> None:
    root, kernel = work / "root", work / "kernel"
    for directory in (image.directory, kernel):
        directory.mkdir()
    with step("Debian packages of the lab"):
        include = f"--include={','.join(f'{PACKAGES} {RELEASES[release].packages}'.split())}"
        fetch = f"--customize-hook={_FETCH_KERNEL.format(directory=shlex.quote(str(kernel)))}"
        options = ["--mode=root", "--variant=minbase", "--aptopt=APT::Install-Recommends false", include, fetch]
        call(["mmdebstrap", *options, release, root, "-"], stdin=archives.encode())
    with step("kernel of the lab"):
        (package,) = kernel.glob("*.deb")
        call(["dpkg-deb", "--extract", package, kernel])
        (binary,) = kernel.glob("boot/vmlinuz-*")
        version = binary.name.removeprefix("vmlinuz-")
        # Debian 13 has no /lib in packages any more.
        (modules,) = (path for name in ("lib", "usr/lib") for path in kernel.glob(f"{name}/modules/{version}"))
        installed = root / "usr/lib/modules" / version
        shutil.copytree(modules, installed)
        call(["chroot", root, "depmod", version])
        shutil.copy(binary, image.kernel)
        image.initramfs.write_bytes(newc(_initramfs(installed)))
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
    for index, path in enumerate(_in_order(modules)):
        data = path.read_bytes()
        if path.suffix == ".xz":
            data = lzma.decompress(data)
        yield Entry(f"modules/{index:02}-{_name(path)}", 0o100644, data)


def _in_order(modules: Path) -> Iterator[Path]:
    """Yield the early modules that the kernel has not built in, each after those that it needs. Raises BuildError."""
    builtin = {_name(Path(line)) for line in (modules / "modules.builtin").read_text().splitlines()}
    needs = {
        Path(path): [Path(each) for each in needed.split()]
        for path, _, needed in (line.partition(":") for line in (modules / "modules.dep").read_text().splitlines())
    }
    paths = {_name(path): path for path in needs}
    ordered: dict[Path, None] = {}
    for name in _EARLY_MODULES:
        if name in paths:
            ordered |= dict.fromkeys((*reversed(needs[paths[name]]), paths[name]))
        elif name not in builtin:
            raise BuildError(f"the kernel package has no module {name}")
    for path in ordered:
        yield modules / path


def _name(module: Path) -> str:
    return module.name.partition(".")[0].replace("-", "_")
