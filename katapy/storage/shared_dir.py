"""The staging tree of a pod: what of the host's files the guest may see.

Owns two mounts of one small tmpfs below the sandbox directory, in the shim's own mount namespace, so that no mount
outlives the shim, however it ends:

    staging/rw    the shim makes directories and files here, to mount upon; nobody else sees it
    staging/ro    the same tmpfs, read-only; virtiofsd exports this one

A root file system or a volume is a bind mount of its own inside ``staging/ro/<container>/``. So the guest can write
into what it was given, and can never make, rename or replace a name that the host looks up: the host follows no
path that a guest can write. Every bind mount is nosuid, nodev and noexec *on the host* (the guest applies its own
flags), and read-only on the host where the container may only read.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from katapy import linux
from katapy.errors import InvalidArgument, Unavailable

GUEST_ROOT: Final = "/run/katapy/shared"
TAG: Final = "katapy"

_RESTRICTED: Final = linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV | linux.MOUNT_ATTR_NOEXEC
_BENEATH: Final = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_SYMLINKS | linux.RESOLVE_NO_MAGICLINKS


def enter_private_mounts() -> int:
    """Give this process a mount namespace of its own, which still sees what the host mounts later.

    Must run before any other thread exists. Returns a descriptor of the namespace that it has left. Raises OSError.
    """
    left = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    linux.unshare(linux.CLONE_NEWNS)
    linux.mount(None, "/", None, linux.MS_REC | linux.MS_SLAVE)
    return left


@dataclass(frozen=True)
class SharedBind:
    """One thing that a container is given: ``name`` is its path below the container's staging directory."""

    name: str
    source: str
    read_only: bool
    recursive: bool


class SharedTree:
    """The staging tree of one sandbox. Call ``enter_private_mounts`` first."""

    def __init__(self, sandbox_directory: Path) -> None:
        """Mount the tree below ``sandbox_directory``. Raises Unavailable."""
        top = sandbox_directory / "staging"
        self._rw, self.export = top / "rw", top / "ro"
        try:
            for directory in (top, self._rw, self.export):
                directory.mkdir(mode=0o700, exist_ok=True)
            flags = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
            linux.mount("katapy", str(self._rw), "tmpfs", flags, "mode=0755,size=4m,nr_inodes=65536")
            linux.mount(str(self._rw), str(self.export), None, linux.MS_BIND)
            # Shared, so that what is mounted here later reaches virtiofsd's mount namespace.
            linux.mount(None, str(self.export), None, linux.MS_SHARED)
            linux.mount(None, str(self.export), None, linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY | flags)
        except OSError as error:
            self.close()
            raise Unavailable(f"cannot make the staging tree at {top}: {error.strerror}") from error

    def add(self, container_id: str, bind: SharedBind) -> str:
        """Bind ``bind.source`` into the tree and return its path in the guest.

        Raises InvalidArgument when the source cannot be bound.
        """
        relative = f"{container_id}/{bind.name}"
        try:
            tree = linux.open_tree(linux.AT_FDCWD, bind.source, _clone(recursive=bind.recursive))
        except OSError as error:
            raise InvalidArgument(f"cannot share {bind.source} with {container_id}: {error.strerror}") from error
        try:
            self._make_target(relative, directory=stat.S_ISDIR(os.fstat(tree).st_mode))
            attributes = _RESTRICTED | (linux.MOUNT_ATTR_RDONLY if bind.read_only else 0)
            # The flags are for what is mounted now. Private, so that what the host mounts below the source later does
            # not come here without them; recursive, for what came since the clone was made.
            linux.mount_setattr(tree, set_=attributes, propagation=linux.MS_PRIVATE, recursive=True)
            export = os.open(self.export, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                target = linux.openat2(export, relative, os.O_PATH, resolve=_BENEATH)
            finally:
                os.close(export)
            try:
                linux.move_mount(tree, target)
            finally:
                os.close(target)
        except OSError as error:
            raise Unavailable(f"cannot share {bind.source} with {container_id}: {error.strerror}") from error
        finally:
            os.close(tree)
        return f"{GUEST_ROOT}/{relative}"

    def remove(self, container_id: str, names: list[str]) -> None:
        """Take a container's binds away again, newest first. Names that are not there are passed over."""
        for name in reversed(names):
            try:
                with suppress(FileNotFoundError, NotADirectoryError):
                    self._unbind(f"{container_id}/{name}")
            except OSError as error:
                raise Unavailable(f"cannot unmount {name} of {container_id}: {error.strerror}") from error
        # Never made, or more is bound in it than was named.
        with suppress(OSError):
            (self._rw / container_id).rmdir()

    def close(self) -> None:
        """Take the tree away, with whatever is still bound in it. Idempotent."""
        for mount in (self.export, self._rw):
            # Not mounted any more (EINVAL), or never made: nothing to do.
            with suppress(OSError):
                linux.umount(str(mount), linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)

    def _make_target(self, relative: str, *, directory: bool) -> None:
        path = self._rw / relative
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if directory:
            path.mkdir(mode=0o755, exist_ok=True)
        else:
            path.touch(mode=0o644)

    def _unbind(self, relative: str) -> None:
        # The path has no part that a guest could have made; see the module's docstring.
        try:
            linux.umount(str(self.export / relative), linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno != errno.EINVAL:  # nothing is mounted on it: the bind failed half-way
                raise
        target = self._rw / relative
        if target.is_dir():
            target.rmdir()
        else:
            target.unlink()


def _clone(*, recursive: bool) -> int:
    return linux.OPEN_TREE_CLONE | linux.OPEN_TREE_CLOEXEC | (linux.AT_RECURSIVE if recursive else 0)
