"""A container's root file system as an engine describes it: mounts that are made when the container is.

Owns what is mounted on one directory of the bundle. It is mounted in the shim's own mount namespace, so nothing of it
is seen on the host, and nothing outlives the shim. Source: containerd, core/mount; mount(8) for the options.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final, NamedTuple

from katapy import linux
from katapy.errors import InvalidArgument, Unavailable

# What mount(2) takes as a flag; all else goes to the file system. True: the option takes the flag away.
_FLAGS: Final[dict[str, tuple[int, bool]]] = {
    "ro": (linux.MS_RDONLY, False),
    "rw": (linux.MS_RDONLY, True),
    "nosuid": (linux.MS_NOSUID, False),
    "suid": (linux.MS_NOSUID, True),
    "nodev": (linux.MS_NODEV, False),
    "dev": (linux.MS_NODEV, True),
    "noexec": (linux.MS_NOEXEC, False),
    "exec": (linux.MS_NOEXEC, True),
    "sync": (linux.MS_SYNCHRONOUS, False),
    "async": (linux.MS_SYNCHRONOUS, True),
    "dirsync": (linux.MS_DIRSYNC, False),
    "noatime": (linux.MS_NOATIME, False),
    "atime": (linux.MS_NOATIME, True),
    "nodiratime": (linux.MS_NODIRATIME, False),
    "diratime": (linux.MS_NODIRATIME, True),
    "relatime": (linux.MS_RELATIME, False),
    "norelatime": (linux.MS_RELATIME, True),
    "strictatime": (linux.MS_STRICTATIME, False),
    "nostrictatime": (linux.MS_STRICTATIME, True),
    "bind": (linux.MS_BIND, False),
    "rbind": (linux.MS_BIND | linux.MS_REC, False),
    "defaults": (0, False),
}
# One page less its final NUL.
_DATA_MAX: Final = 4095
_LOWER: Final = "lowerdir="


class RootMount(NamedTuple):
    """One mount; ``options`` as in fstab(5)."""

    type: str
    source: str
    options: tuple[str, ...]


def mount_rootfs(mounts: Sequence[RootMount], target: str) -> None:
    """Mount ``mounts`` on the directory ``target``, one over the other.

    Raises InvalidArgument where one cannot be mounted; nothing is mounted then.
    """
    for number, mount in enumerate(mounts):
        try:
            _mount(mount, target)
        except OSError as error:
            unmount_rootfs(target, number)
            raise InvalidArgument(f"cannot mount {mount.type} {mount.source} on {target}: {error.strerror}") from error


def unmount_rootfs(target: str, count: int) -> None:
    """Take ``count`` mounts away again; what is in use goes with its last user. Raises Unavailable."""
    for _ in range(count):
        try:
            linux.umount(target, linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
        except OSError as error:
            raise Unavailable(f"cannot unmount {target}: {error.strerror}") from error


def _mount(mount: RootMount, target: str) -> None:
    flags, data = _parse(mount.options)
    if mount.type in ("bind", "rbind") or flags & linux.MS_BIND:
        # A bind mount is made with its source's flags, and changed only then.
        bind = linux.MS_BIND | (linux.MS_REC if mount.type == "rbind" else flags & linux.MS_REC)
        linux.mount(mount.source, target, None, bind)
        changed = flags & ~(linux.MS_BIND | linux.MS_REC)
        if changed:
            try:
                linux.mount(None, target, None, linux.MS_REMOUNT | linux.MS_BIND | changed)
            except OSError:
                with suppress(OSError):
                    linux.umount(target, linux.MNT_DETACH)
                raise
        return
    with _short(data) as text:
        if text and len(os.fsencode(text)) > _DATA_MAX:
            # mount(2) would cut it off.
            raise OSError(errno.E2BIG, os.strerror(errno.E2BIG))
        linux.mount(mount.source, target, mount.type, flags, text)


def _parse(options: Sequence[str]) -> tuple[int, list[str]]:
    """Return the flags of mount(2), and what the file system is told."""
    flags, data = 0, []
    for option in options:
        if option not in _FLAGS:
            data.append(option)
            continue
        flag, clear = _FLAGS[option]
        flags = flags & ~flag if clear else flags | flag
    return flags, data


@contextmanager
def _short(data: Sequence[str]) -> Iterator[str | None]:
    """Yield the file system's options as one text that fits a page.

    The layers of an image may have more names than that: they are reached from a directory that they have in common.
    """
    text = ",".join(data)
    lower = next((option for option in data if option.startswith(_LOWER)), "")
    if len(os.fsencode(text)) <= _DATA_MAX or not lower:
        yield text or None
        return
    layers = lower.removeprefix(_LOWER).split(":")
    common = os.path.commonpath(layers)
    directory = os.open(common, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # 16 bytes and what a snapshotter numbers its layers by: enough for all that an image may have.
        short = [f"/proc/self/fd/{directory}/{os.path.relpath(layer, common)}" for layer in layers]
        yield ",".join(_LOWER + ":".join(short) if option == lower else option for option in data)
    finally:
        os.close(directory)
