"""Mounts of a container, each made detached and then attached to a descriptor.

A mount is never made at a path: open_tree(2) or fsopen(2) give a detached one, a target is opened inside the root
file system by openat2(2) so that no symbolic link leads out of it, and move_mount(2) joins the two. What a path
means can therefore not change between a check and its use. Here are the single steps; their order is ``rootfs``'s.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from katapy_agent import linux
from katapy_agent.config import Mount
from katapy_agent.errors import InvalidArgument, Unsupported

IN_ROOT: Final = linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_MAGICLINKS
NO_LINKS: Final = linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_SYMLINKS

_FILESYSTEMS: Final = {
    "proc": "proc",
    "sysfs": "sysfs",
    "tmpfs": "tmpfs",
    "mqueue": "mqueue",
    "devpts": "devpts",
    "hugetlbfs": "hugetlbfs",
    "cgroup": "cgroup2",
    "cgroup2": "cgroup2",
}
# A link at these would have them (and what is written to them later) in a place of the image's choice.
_NEVER_THROUGH_LINKS: Final = ("proc", "sysfs")

# option: MOUNT_ATTR_* to clear, then to set
_ATTRIBUTES: Final = {
    "ro": (0, linux.MOUNT_ATTR_RDONLY),
    "rw": (linux.MOUNT_ATTR_RDONLY, 0),
    "nosuid": (0, linux.MOUNT_ATTR_NOSUID),
    "suid": (linux.MOUNT_ATTR_NOSUID, 0),
    "nodev": (0, linux.MOUNT_ATTR_NODEV),
    "dev": (linux.MOUNT_ATTR_NODEV, 0),
    "noexec": (0, linux.MOUNT_ATTR_NOEXEC),
    "exec": (linux.MOUNT_ATTR_NOEXEC, 0),
    "nodiratime": (0, linux.MOUNT_ATTR_NODIRATIME),
    "diratime": (linux.MOUNT_ATTR_NODIRATIME, 0),
    "nosymfollow": (0, linux.MOUNT_ATTR_NOSYMFOLLOW),
    "symfollow": (linux.MOUNT_ATTR_NOSYMFOLLOW, 0),
    "noatime": (linux.MOUNT_ATTR__ATIME, linux.MOUNT_ATTR_NOATIME),
    "strictatime": (linux.MOUNT_ATTR__ATIME, linux.MOUNT_ATTR_STRICTATIME),
    # relatime is zero: the kernel's default
    **dict.fromkeys(("atime", "relatime", "norelatime", "nostrictatime"), (linux.MOUNT_ATTR__ATIME, 0)),
}
_RECURSIVE_ATTRIBUTES: Final = {f"r{name}": bits for name, bits in _ATTRIBUTES.items()}
PROPAGATIONS: Final = {
    "private": linux.MS_PRIVATE,
    "shared": linux.MS_SHARED,
    "slave": linux.MS_SLAVE,
    "unbindable": linux.MS_UNBINDABLE,
}
_RECURSIVE_PROPAGATIONS: Final = {f"r{name}": flag for name, flag in PROPAGATIONS.items()}
# Defaults of the kernel, said aloud.
_NOTHING: Final = frozenset(("defaults", "async", "loud", "silent", "nolazytime", "nomand", "noiversion"))
_REFUSED: Final = frozenset(("remount", "idmap", "ridmap"))
_MAX_COPY_UP_DEPTH: Final = 64


@dataclass(frozen=True)
class Attributes:
    """MOUNT_ATTR_* flags to clear, then to set."""

    clear: int = 0
    set: int = 0

    def then(self, clear: int, set_: int) -> Attributes:
        """Return these flags with one more option after them; the later one wins."""
        return Attributes(self.clear | clear, self.set & ~clear | set_)


@dataclass(frozen=True)
class Options:
    """A mount's options, understood.

    ``filesystem`` is the kernel's name, empty for a bind mount; ``data`` is what the file system itself is told.
    """

    filesystem: str
    recursive: bool
    own: Attributes
    tree: Attributes
    propagation: tuple[tuple[int, bool], ...]
    copy_up: bool
    data: tuple[tuple[str, str | None], ...]

    @property
    def is_bind(self) -> bool:
        """Whether an existing tree is mounted, and not a new file system."""
        return not self.filesystem


def parse_options(mount: Mount) -> Options:
    """Understand a mount's type and options as mount(8) and the runtime specification say.

    Raises Unsupported for a type or option that katapy does not honour, InvalidArgument for one that makes no sense.
    """
    bind = mount.type == "bind" or not {"bind", "rbind"}.isdisjoint(mount.options)
    if not bind and mount.type not in _FILESYSTEMS:
        raise Unsupported(f"mount type {mount.type[:64]!r} at {mount.destination} is not supported")
    if bind and not mount.source.startswith("/"):
        raise InvalidArgument(f"source of the bind mount at {mount.destination} is not an absolute path")
    own, tree, copy_up = Attributes(), Attributes(), False
    propagation: list[tuple[int, bool]] = []
    data: list[tuple[str, str | None]] = []
    for option in mount.options:
        if option in _REFUSED:
            raise Unsupported(f"mount option {option!r} at {mount.destination} is not supported")
        if option in _ATTRIBUTES:
            own = own.then(*_ATTRIBUTES[option])
        elif option in _RECURSIVE_ATTRIBUTES:
            tree = tree.then(*_RECURSIVE_ATTRIBUTES[option])
        elif option in PROPAGATIONS:
            propagation.append((PROPAGATIONS[option], False))
        elif option in _RECURSIVE_PROPAGATIONS:
            propagation.append((_RECURSIVE_PROPAGATIONS[option], True))
        elif option == "tmpcopyup" and mount.type == "tmpfs":
            copy_up = True
        elif option not in _NOTHING and option not in ("bind", "rbind", ""):
            key, equals, value = option.partition("=")
            data.append((key, value if equals else None))
    if bind and data:
        raise Unsupported(
            f"mount option {data[0][0][:64]!r} at {mount.destination} is not supported: it is a bind mount"
        )
    filesystem = "" if bind else _FILESYSTEMS[mount.type]
    # As in runc, "bind" alone is not recursive and the type "bind" neither.
    return Options(filesystem, "rbind" in mount.options, own, tree, tuple(propagation), copy_up, tuple(data))


def target_resolution(options: Options) -> int:
    """Return the RESOLVE_* flags with which a mount's target is opened."""
    return NO_LINKS if options.filesystem in _NEVER_THROUGH_LINKS else IN_ROOT


def clone_path(path: str, *, recursive: bool) -> int:
    """Return a detached bind copy of what is at ``path`` in the guest, which must not be reached through a link."""
    resolve = linux.RESOLVE_NO_SYMLINKS
    try:
        # Only a directory opened as one has an automount (a submount of virtio-fs) mounted on it.
        source = linux.openat2(linux.AT_FDCWD, path, os.O_PATH | os.O_DIRECTORY, resolve=resolve)
    except NotADirectoryError:
        source = linux.openat2(linux.AT_FDCWD, path, os.O_PATH, resolve=resolve)
    with closing(source):
        return linux.open_tree(source, "", recursive=recursive)


def new_filesystem(filesystem: str, *, source: str, attributes: int, data: tuple[tuple[str, str | None], ...]) -> int:
    """Return a detached mount of a new file system; ``data`` are its options. Raises OSError, naming a wrong option."""
    with closing(linux.fsopen(filesystem)) as context:
        for key, value in (("source", source or filesystem), *data):
            try:
                linux.fsconfig_set(context, key, value)
            except OSError as error:
                raise OSError(error.errno, f"{error.strerror}: option {key[:64]!r}") from error
        linux.fsconfig_create(context)
        return linux.fsmount(context, attributes)


def apply_options(tree: int, options: Options) -> None:
    """Set the attributes and the propagation of a mount, attached or not."""
    for attributes, recursive in ((options.own, False), (options.tree, True)):
        if attributes != Attributes():
            linux.mount_setattr(tree, clear=attributes.clear, set_=attributes.set, recursive=recursive)
    for flag, recursive in options.propagation:
        linux.mount_setattr(tree, propagation=flag, recursive=recursive)


def is_missing(root: int, path: str, *, resolve: int = IN_ROOT) -> bool:
    """Return whether there is nothing at ``path`` inside ``root``. Raises OSError as ``make_target`` does."""
    try:
        os.close(linux.openat2(root, path, os.O_PATH, resolve=resolve))
    except FileNotFoundError:
        return True
    return False


def make_target(root: int, path: str, *, directory: bool, resolve: int = IN_ROOT) -> int:
    """Return a descriptor (O_PATH) of ``path`` inside ``root``, making what is missing: directories, or a file.

    Raises OSError; ELOOP where ``resolve`` forbids a link that is there, EEXIST for a link that leads nowhere.
    """
    try:
        return linux.openat2(root, path, os.O_PATH, resolve=resolve)
    except FileNotFoundError:
        pass
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
    if not parts:
        return linux.openat2(root, "/", os.O_PATH, resolve=resolve)
    parent = _make_directories(root, parts if directory else parts[:-1], resolve)
    if directory:
        return parent
    with closing(parent):
        os.close(os.open(parts[-1], os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o755, dir_fd=parent))
        return linux.openat2(parent, parts[-1], os.O_PATH, resolve=NO_LINKS)


def _make_directories(root: int, parts: list[str], resolve: int) -> int:
    """Return a descriptor of the directory, having made those that were missing."""
    existing = len(parts)
    while True:
        try:
            here = linux.openat2(root, "/" + "/".join(parts[:existing]), os.O_PATH | os.O_DIRECTORY, resolve=resolve)
            break
        except FileNotFoundError:
            existing -= 1
    for part in parts[existing:]:
        with closing(here):
            with contextlib.suppress(FileExistsError):
                os.mkdir(part, 0o755, dir_fd=here)
            # What is there now must be a directory itself: a dangling link is not followed.
            here = linux.openat2(here, part, os.O_PATH | os.O_DIRECTORY, resolve=NO_LINKS)
    return here


def is_directory(fd: int) -> bool:
    """Return whether ``fd`` is a directory."""
    return stat.S_ISDIR(os.fstat(fd).st_mode)


def copy_up(target: int, tree: int) -> None:
    """Copy what is in the directory ``target`` (O_PATH) into the new mount ``tree``, with owners and modes."""
    source = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=target)
    with closing(source), closing(os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=tree)) as made:
        _copy_directory(source, made, _MAX_COPY_UP_DEPTH)


def _copy_directory(source: int, target: int, depth: int) -> None:
    if depth == 0:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    _copy_attributes(source, target)
    for name in os.listdir(source):
        # Of a volume that others change, it may be gone.
        with contextlib.suppress(FileNotFoundError):
            _copy_entry(name, source, target, depth)


def _copy_entry(name: str, source: int, target: int, depth: int) -> None:
    status = os.stat(name, dir_fd=source, follow_symlinks=False)
    if stat.S_ISDIR(status.st_mode):
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        with closing(os.open(name, flags, dir_fd=source)) as below:
            os.mkdir(name, dir_fd=target)
            with closing(os.open(name, flags, dir_fd=target)) as made:
                _copy_directory(below, made, depth - 1)
    elif stat.S_ISREG(status.st_mode):
        _copy_file(name, source, target)
    elif stat.S_ISLNK(status.st_mode):
        os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
        os.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
    # Devices, pipes and sockets of an image are not copied, as in runc.


def _copy_file(name: str, source: int, target: int) -> None:
    reading = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    writing = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with (
        closing(os.open(name, reading, dir_fd=source)) as old,
        closing(os.open(name, writing, 0o600, dir_fd=target)) as new,
    ):
        while os.sendfile(new, old, None, 1 << 24):
            pass
        _copy_attributes(old, new)


def _copy_attributes(source: int, target: int) -> None:
    status = os.fstat(source)
    os.fchown(target, status.st_uid, status.st_gid)
    os.fchmod(target, stat.S_IMODE(status.st_mode))


def pivot(root: int) -> None:
    """Make the attached mount ``root`` the root of this mount namespace and drop the old one (pivot_root(2))."""
    with closing(os.open("/", os.O_PATH | os.O_CLOEXEC)) as old:
        os.fchdir(root)
        # The old root ends up on top of the new one, and is taken away from there: no directory is needed for it.
        linux.pivot_root(".", ".")
        os.fchdir(old)
        _unmount_here()
    os.chdir("/")


def _unmount_here() -> None:
    # umount2(2) takes what is on top: first what was put on the old root while the new one was built, then itself.
    # A mount that stayed would hide the container's root from whoever joins its namespace.
    while True:
        try:
            linux.umount(".", linux.MNT_DETACH)
        except OSError as error:
            if error.errno != errno.EINVAL:  # no longer mounted: done
                raise
            return


@contextlib.contextmanager
def closing(fd: int) -> Iterator[int]:
    """Close ``fd`` at the end."""
    try:
        yield fd
    finally:
        os.close(fd)
