"""What of a container's files is seen on the host: the mount namespace of the process that stands for it.

Engines reach a running container's files through the mount namespace of its pid: podman cp enters it. In that of a
stand-in the container's root file system is the root, with its volumes where the container has them, so that nothing is
copied to or from the host itself. What only the guest has, such as a tmpfs, is an empty read-only directory there.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from katapy import linux
from katapy.errors import Unavailable
from katapy.oci.bundle import Bundle
from katapy.oci.spec import Spec

# Who enters it is the host's; nothing that a guest has made is to be run there, or to be a device.
_RESTRICTED: Final = linux.MOUNT_ATTR_NOSUID | linux.MOUNT_ATTR_NODEV | linux.MOUNT_ATTR_NOEXEC
_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


@contextmanager
def view_of(bundle: Bundle) -> Iterator[int]:
    """Have the process that is started meanwhile be in a mount namespace that shows the files of a container.

    Yields a descriptor of its root. The process's own root directory stays the host's, as its program and all that it
    loads is from there. Raises Unavailable where there can be no such namespace.
    """
    host, root, here = os.open("/proc/self/ns/mnt", os.O_RDONLY), os.open("/", _DIRECTORY), os.open(".", _DIRECTORY)
    view = -1
    try:
        try:
            linux.unshare(linux.CLONE_NEWNS)
        except OSError as error:
            raise Unavailable(f"cannot make a mount namespace: {error.strerror}") from error
        try:
            view = _enter(bundle)
            _go_to(root)
            yield view
        finally:
            linux.setns(host, linux.CLONE_NEWNS)
            _go_to(root)
            os.fchdir(here)
    finally:
        for fd in (host, root, here, view):
            if fd >= 0:
                os.close(fd)


def _go_to(root: int) -> None:
    os.fchdir(root)
    os.chroot(".")


def _enter(bundle: Bundle) -> int:
    """Make the view the root of this mount namespace and of this process, and return a descriptor of it."""
    try:
        # What the host unmounts is not held here; nothing of what is done here reaches the host.
        linux.mount(None, "/", None, linux.MS_REC | linux.MS_SLAVE)
        with ExitStack() as trees:
            binds: dict[int, int] = {}
            for bind in bundle.spec.bind_mounts:
                # One that cannot be bound here cannot be shared either, and is refused for that.
                with suppress(OSError):
                    binds[bind.index] = _clone(bind.source, recursive=bind.recursive)
                    trees.callback(os.close, binds[bind.index])
            _change_root(bundle.rootfs, read_only=bundle.spec.root.read_only)
            # The mode of a directory that is made is the container's to see.
            umask = os.umask(0o022)
            try:
                _mount_all(bundle.spec, binds)
            finally:
                os.umask(umask)
        return os.open("/", _DIRECTORY)
    except OSError as error:
        raise Unavailable(f"cannot show the files of {bundle.path}: {error.strerror}") from error


def _clone(source: str, *, recursive: bool) -> int:
    flags = linux.OPEN_TREE_CLONE | linux.OPEN_TREE_CLOEXEC | (linux.AT_RECURSIVE if recursive else 0)
    return linux.open_tree(linux.AT_FDCWD, source, flags)


def _change_root(rootfs: str, *, read_only: bool) -> None:
    tree = _clone(rootfs, recursive=True)
    try:
        attributes = _RESTRICTED | (linux.MOUNT_ATTR_RDONLY if read_only else 0)
        linux.mount_setattr(tree, set_=attributes, propagation=linux.MS_PRIVATE, recursive=True)
        target = os.open(rootfs, _DIRECTORY)
        try:
            linux.move_mount(tree, target)
        finally:
            os.close(target)
        os.fchdir(tree)
        # One over the other, so that no directory is needed for the old one, which then goes.
        linux.pivot_root(".", ".")
        linux.umount(".", linux.MNT_DETACH)
        _go_to(tree)
    finally:
        os.close(tree)


def _mount_all(spec: Spec, binds: Mapping[int, int]) -> None:
    """Mount what the container has: from here on a path is one of the container's, and leads to nowhere else."""
    with suppress(OSError):
        Path("/proc").mkdir(mode=0o555)
    with ExitStack() as hidden:
        for index, mount in enumerate(spec.mounts):
            # What cannot be shown, in a read-only root for example, is not there.
            with suppress(OSError):
                if index in binds:
                    attributes = _RESTRICTED | (linux.MOUNT_ATTR_RDONLY if mount.read_only else 0)
                    linux.mount_setattr(binds[index], set_=attributes, propagation=linux.MS_PRIVATE, recursive=True)
                    _attach(binds[index], mount.destination)
                elif mount.destination != "/proc" and not mount.is_bind:
                    # Not made where it is not there: what the guest mounts has the mode of the directory that it finds.
                    linux.mount("katapy", mount.destination, "tmpfs", 0, "mode=0755,size=64k")
                    # At the end, as others may be mounted in it.
                    hidden.callback(_close, os.open(mount.destination, _DIRECTORY))


def _close(directory: int) -> None:
    """Let nothing be written to what is mounted on a directory, and close its descriptor."""
    try:
        linux.mount_setattr(directory, set_=_RESTRICTED | linux.MOUNT_ATTR_RDONLY, recursive=False)
    finally:
        os.close(directory)


def _attach(tree: int, destination: str) -> None:
    path = Path(destination)
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    if stat.S_ISDIR(os.fstat(tree).st_mode):
        path.mkdir(mode=0o755, exist_ok=True)
    elif not path.exists():
        path.touch(mode=0o644)
    target = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        linux.move_mount(tree, target)
    finally:
        os.close(target)
