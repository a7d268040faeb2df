"""Mounts of the guest itself: what a root needs, and what the host shares or plugs in. Containers' are `mounts`'."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from katapy_agent import linux
from katapy_agent.errors import KatapyError, NotFound, doing

RUN: Final = Path("/run/katapy")
SHARED: Final = RUN / "shared"
MEMORY: Final = RUN / "memory"
ROOTS: Final = RUN / "roots"
_BLOCK_DEVICES: Final = Path("/sys/block")
_PLUG_SECONDS: Final = 30.0
_NETLINK_KOBJECT_UEVENT: Final = 15
_UEVENT_MAX: Final = 8192

_LOCKED: Final = linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV | linux.MOUNT_ATTR_NOEXEC


def mount(
    fstype: str, target: Path, attributes: int = 0, *, source: str = "", options: Mapping[str, str | None] | None = None
) -> None:
    """Mount a new file system on the directory ``target``, made where it is missing. Raises KatapyError."""
    with doing(f"mount {fstype} on {target}"):
        target.mkdir(parents=True, exist_ok=True)
        context = linux.fsopen(fstype)
        try:
            linux.fsconfig_set(context, "source", source or fstype)
            for key, value in (options or {}).items():
                linux.fsconfig_set(context, key, value)
            linux.fsconfig_create(context)
            tree = linux.fsmount(context, attributes)
        finally:
            os.close(context)
        _attach(tree, target)


def mount_root_file_systems() -> None:
    """Mount what every root has below it. /dev may be there already: the kernel or the initramfs mounts it."""
    nosuid_nodev = linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV
    mount("proc", Path("/proc"), _LOCKED)
    mount("sysfs", Path("/sys"), _LOCKED)
    if not os.path.ismount("/dev"):
        mount("devtmpfs", Path("/dev"), linux.MOUNT_ATTR_NOSUID, options={"mode": "0755"})
    pts = {"newinstance": None, "ptmxmode": "0666", "mode": "0620", "gid": "5"}
    mount("devpts", Path("/dev/pts"), linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NOEXEC, options=pts)
    mount("tmpfs", Path("/dev/shm"), nosuid_nodev, options={"mode": "1777"})
    mount("mqueue", Path("/dev/mqueue"), _LOCKED)
    mount("tmpfs", Path("/run"), nosuid_nodev, options={"mode": "0755"})
    mount("tmpfs", Path("/tmp"), nosuid_nodev, options={"mode": "1777"})
    mount("cgroup2", Path("/sys/fs/cgroup"), _LOCKED, options={"nsdelegate": None})
    RUN.mkdir(mode=0o700)


def mount_shared(tag: str) -> None:
    """Mount the host's virtio-fs share called ``tag`` at SHARED, waiting for the device that the host has plugged in.

    Raises KatapyError.
    """
    _when_plugged(lambda: _mount_shared(tag))


def _mount_shared(tag: str) -> None:
    try:
        # Not nosuid: every root and volume inherits this, and setuid programs are theirs to have.
        mount("virtiofs", SHARED, linux.MOUNT_ATTR_NODEV, source=tag)
    except KatapyError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EINVAL:
            raise NotFound(f"{error}: there is no device {tag[:36]!r}") from error
        raise


def mount_root(container_id: str, serial: str, *, read_only: bool) -> None:
    """Mount the disk with this serial number as a container's root file system, waiting until it is plugged in.

    One that is not ``read_only`` has a tmpfs over it, which takes what is written. Raises KatapyError.
    """
    place = ROOTS / container_id
    disk = place / ("root" if read_only else "disk")
    _when_plugged(lambda: _mount_disk(serial, disk))
    if not read_only:
        _mount_writable(place, disk)


def _mount_disk(serial: str, target: Path) -> None:
    # The device is read-only, and would not be opened for a file system that may write. Setuid programs as above.
    mount("erofs", target, linux.MOUNT_ATTR_NODEV, source=str(_find_disk(serial)), options={"ro": None})


def _find_disk(serial: str) -> Path:
    """Return the node of a disk. Raises NotFound."""
    for device in _BLOCK_DEVICES.iterdir():
        node = Path("/dev") / device.name
        with contextlib.suppress(OSError):  # it has none, or has just gone
            if (device / "serial").read_text().strip() == serial and node.exists():
                return node
    raise NotFound(f"there is no disk {serial[:32]!r}")


def _mount_writable(place: Path, disk: Path) -> None:
    written, root = place / "written", place / "root"
    mount("tmpfs", written, linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV, options={"mode": "0700"})
    with doing(f"make a writable layer for {place.name}"):
        upper, work = written / "upper", written / "work"
        work.mkdir()
        upper.mkdir()
        # The root of the whole looks like that of the disk.
        status = disk.stat()
        upper.chmod(stat.S_IMODE(status.st_mode))
        os.chown(upper, status.st_uid, status.st_gid)
    layers = {"lowerdir": str(disk), "upperdir": str(upper), "workdir": str(work)}
    mount("overlay", root, linux.MOUNT_ATTR_NODEV, options=layers)


def release_root(container_id: str) -> None:
    """Unmount a container's disk, where it has one, and forget what was written over it."""
    place = ROOTS / container_id
    if not place.exists():
        return
    for name in ("root", "written", "disk"):
        # Not mounted, or never made: nothing to do.
        with contextlib.suppress(OSError):
            linux.umount(str(place / name), linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
        with contextlib.suppress(OSError):
            (place / name).rmdir()
    with contextlib.suppress(OSError):
        place.rmdir()


def _when_plugged(mount_it: Callable[[], None]) -> None:
    """Mount what is on a device, waiting for that one while it raises NotFound. Raises KatapyError."""
    with contextlib.suppress(NotFound):
        mount_it()
        return
    deadline = time.monotonic() + _PLUG_SECONDS
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_KOBJECT_UEVENT) as kernel:
        kernel.bind((0, 1))
        while True:
            try:
                mount_it()
                return
            except NotFound:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise
            # Whatever the kernel has to say: among it is that the device has its driver.
            kernel.settimeout(left)
            try:
                kernel.recv(_UEVENT_MAX)
            except OSError as error:
                # Some were lost, with what this waits for among them perhaps: it is looked at again all the same.
                if error.errno not in (None, errno.ENOBUFS):  # a timeout has none
                    raise


def mount_memory(name: str, options: Mapping[str, str | None]) -> None:
    """Mount a tmpfs for containers to share at ``name`` in MEMORY, unless it is there already. Raises KatapyError."""
    target = MEMORY / name
    if not os.path.ismount(target):
        mount("tmpfs", target, _LOCKED, source="shm", options=options)


def release(container_id: str) -> None:
    """Let go of all that was mounted for a container that is gone."""
    release_shared(container_id)
    release_root(container_id)


def release_shared(container_id: str) -> None:
    """Let go of what the host has shared with a container that is gone.

    Each of its binds became a mount of its own when it was looked up, and what that has cached stays open on the host:
    a file that was deleted would take room for as long as the VM lives.
    """
    prefix = f"{SHARED}/{container_id}/"
    points = [line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in reversed(points):
        if point.startswith(prefix):
            # Gone with the mount that it was on.
            with contextlib.suppress(OSError):
                linux.umount(point, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)


def unmount_shared() -> None:
    """Write everything back and unmount the host's share, where it is mounted. Raises KatapyError."""
    os.sync()
    if os.path.ismount(SHARED):
        with doing(f"unmount {SHARED}"):
            linux.umount(str(SHARED), linux.MNT_DETACH)


def _attach(tree: int, target: Path) -> None:
    try:
        place = os.open(target, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            linux.move_mount(tree, place)
        finally:
            os.close(place)
    finally:
        os.close(tree)
