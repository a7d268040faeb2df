"""Unpacks the layers of an image, one over the other, into a directory (image-spec v1.1, layer.md).

Whoever made the image is not trusted: nothing that a layer holds is written, linked or removed outside of the root.
Every parent directory is resolved by the kernel as if the root were ``/`` (openat2(2), RESOLVE_IN_ROOT), and a last
component is never followed. So a directory that an earlier layer has replaced by a link is found where the link leads
inside, as in containerd. The root is the caller's own: nobody else writes into it meanwhile.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from katapy import linux
from katapy.errors import InvalidArgument, KatapyError, Unavailable
from katapy.storage.tar import Kind, Member, Stream, TarReader
from katapy.tree import empty_directory

log = logging.getLogger(__name__)

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_RESOLVE: Final = linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_MAGICLINKS | linux.RESOLVE_NO_XDEV
_PATH_MAX: Final = 4095
# Far more than any real tree, and few enough to have a descriptor for each.
_DEPTH_MAX: Final = 200
# What is remembered of a layer's paths: a million of the usual ones are a quarter of it.
_OWN_MAX: Final = 256 << 20
_WHITEOUT: Final = b".wh."
_OPAQUE: Final = b".wh..wh..opq"
_CAPABILITY: Final = b"security.capability"
_USER: Final = b"user."
# What the machine is to blame for; all else is the layer's own fault.
_OF_THE_HOST: Final = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


@dataclass(frozen=True)
class Limits:
    """What an image may take: bytes of its unpacked layers, their members, layers, and bytes for each compressed one.

    The ratio counts from ``ratio_from_bytes`` on: small images of zeros are no bombs. ``seconds`` is for all that
    costs time and nothing else, such as paths through many links.
    """

    total_bytes: int = 16 << 30
    members: int = 1_000_000
    layers: int = 500
    ratio: int = 250
    ratio_from_bytes: int = 256 << 20
    seconds: float = 3600.0


class Budget:
    """What is left of the ``limits`` for one image; ``what`` names it in errors."""

    def __init__(self, limits: Limits, what: str) -> None:
        self.limits = limits
        self.what = what
        self.total_bytes = 0
        self.members = 0
        self._deadline = time.monotonic() + limits.seconds

    def add_member(self) -> None:
        """Count a member. Raises InvalidArgument."""
        self.members += 1
        if self.members > self.limits.members:
            raise InvalidArgument(f"{self.what}: more than {self.limits.members} members")
        if time.monotonic() > self._deadline:
            raise InvalidArgument(f"{self.what}: not unpacked within {self.limits.seconds:g} s")

    def add_bytes(self, size: int, *, unpacked: int, compressed: int) -> None:
        """Count ``size`` more bytes of a layer that is ``unpacked`` bytes so far, from so many ``compressed`` ones."""
        self.total_bytes += size
        if self.total_bytes > self.limits.total_bytes:
            raise InvalidArgument(f"{self.what}: unpacked, its layers are larger than {self.limits.total_bytes} bytes")
        if unpacked > max(self.limits.ratio_from_bytes, compressed * self.limits.ratio):
            raise InvalidArgument(f"{self.what}: a layer is more than {self.limits.ratio} times as large as compressed")


def unpack_layer(stream: Stream, root_fd: int, budget: Budget, *, what: str) -> None:
    """Unpack the tar archive ``stream`` over what is in the directory ``root_fd``. Needs root.

    Device nodes are left out: a container's /dev is its own. Raises InvalidArgument for what no layer may hold,
    Unavailable where the host cannot keep it.
    """
    _Layer(root_fd, budget, what).unpack(TarReader(stream, what=what, count=budget.add_member))


class _Layer:
    """One layer on its way into the root."""

    def __init__(self, root_fd: int, budget: Budget, what: str) -> None:
        self._root = root_fd
        self._budget = budget
        self._what = what
        # What whiteouts of this layer leave alone: its members and the directories above them, as the archive has them.
        self._own: set[bytes] = set()
        self._own_bytes = 0
        self._opaque: set[bytes] = set()
        self._times: dict[bytes, int] = {}
        self._root_time: int | None = None
        self._devices = 0

    def unpack(self, reader: TarReader) -> None:
        """Unpack all members, and then set the times of directories, which every file in them changes."""
        for member in reader:
            parts = self._split(member.name, member)
            with self._blame(member):
                if not parts:
                    self._set_root(member)
                elif parts[-1].startswith(_WHITEOUT):
                    self._whiteout(parts[:-1], parts[-1], member)
                else:
                    self._add(parts, member, reader)
        for path, mtime_ns in self._times.items():
            with suppress(OSError), self._parent(path.split(b"/")) as parent:
                _set_time(path.rpartition(b"/")[2], mtime_ns, parent, only_directory=True)
        if self._root_time is not None:
            os.utime(self._root, ns=(self._root_time, self._root_time))
        if self._devices:
            log.info("%s: %d device nodes are left out: a container's /dev is its own", self._what, self._devices)

    def _add(self, parts: list[bytes], member: Member, reader: TarReader) -> None:
        name = parts[-1]
        path = b"/".join(parts)
        with self._parent(parts, make=True) as parent:
            if member.kind in (Kind.CHARACTER_DEVICE, Kind.BLOCK_DEVICE):
                _remove(name, parent)
                self._devices += 1
                return
            self._note(path)
            if member.kind is Kind.HARD_LINK:
                self._link(name, parent, member)
                return
            if member.kind is not Kind.FILE and not (member.kind is Kind.DIRECTORY and _is_directory(name, parent)):
                _remove(name, parent)
            match member.kind:
                case Kind.FILE:
                    self._write(name, parent, member, reader)
                case Kind.DIRECTORY:
                    self._times[path] = member.mtime_ns
                    with suppress(FileExistsError):
                        os.mkdir(name, 0o700, dir_fd=parent)
                    with _opened(name, _DIRECTORY | os.O_NOFOLLOW, parent) as fd:
                        self._set_status(fd, member)
                case Kind.SYMLINK:
                    os.symlink(member.link, name, dir_fd=parent)
                    os.chown(name, member.uid, member.gid, dir_fd=parent, follow_symlinks=False)
                    _set_time(name, member.mtime_ns, parent)
                case Kind.FIFO:
                    os.mkfifo(name, 0o600, dir_fd=parent)
                    with _opened(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW, parent) as fd:
                        self._set_status(fd, member)
                    _set_time(name, member.mtime_ns, parent)

    def _write(self, name: bytes, parent: int, member: Member, reader: TarReader) -> None:
        with _created(name, parent) as fd:
            for offset, chunk in reader.data(member):
                view = memoryview(chunk)
                while view:
                    written = os.pwrite(fd, view, offset)
                    offset, view = offset + written, view[written:]
            if member.size > sum(extent.length for extent in member.extents):
                os.ftruncate(fd, member.size)
            self._set_status(fd, member)
            os.utime(fd, ns=(member.mtime_ns, member.mtime_ns))

    def _set_status(self, fd: int, member: Member) -> None:
        """Set owner, mode and attributes: in this order, since a new owner takes set-user-id and capabilities away."""
        os.fchown(fd, member.uid, member.gid)
        os.fchmod(fd, member.mode)
        for key, value in member.xattrs.items():
            if key == _CAPABILITY or key.startswith(_USER):
                self._set_xattr(fd, key, value, member)

    def _set_xattr(self, fd: int, key: bytes, value: bytes, member: Member) -> None:
        try:
            os.setxattr(fd, key, value)
        except OSError as error:
            if error.errno == errno.ENOTSUP:
                raise Unavailable(f"{self._what}: {member}: the file system keeps no extended attributes") from error
            raise

    def _set_root(self, member: Member) -> None:
        if member.kind is not Kind.DIRECTORY:
            raise InvalidArgument(f"{self._what}: the root is a {member.kind}")
        self._set_status(self._root, member)
        self._root_time = member.mtime_ns

    def _link(self, name: bytes, parent: int, member: Member) -> None:
        target = self._split(member.link, member)
        if not target:
            raise InvalidArgument(f"{self._what}: {member}: a hard link to the root")
        with self._parent(target) as directory:
            wanted = os.stat(target[-1], dir_fd=directory, follow_symlinks=False)
            if stat.S_ISDIR(wanted.st_mode):
                raise InvalidArgument(f"{self._what}: {member}: a hard link to a directory")
            with suppress(FileNotFoundError):
                if os.path.samestat(wanted, os.stat(name, dir_fd=parent, follow_symlinks=False)):
                    return
            _remove(name, parent)
            os.link(target[-1], name, src_dir_fd=directory, dst_dir_fd=parent, follow_symlinks=False)

    # Whiteouts

    def _whiteout(self, parts: list[bytes], name: bytes, member: Member) -> None:
        """Remove what layers below this one have put there; what comes from this one stays, whichever came first."""
        path = b"".join(part + b"/" for part in parts)
        with suppress(FileNotFoundError, NotADirectoryError), self._parent([*parts, name]) as parent:
            if name == _OPAQUE:
                if path not in self._opaque:
                    self._opaque.add(path)
                    self._prune_all(parent, path)
            # AUFS kept notes of its own under such names (layer.md says nothing of them; nobody unpacks them).
            elif not name.startswith(_WHITEOUT * 2):
                hidden = name.removeprefix(_WHITEOUT)
                if hidden in (b"", b".", b".."):
                    raise InvalidArgument(f"{self._what}: {member}: a whiteout of nothing")
                self._prune(hidden, path, parent)

    def _prune(self, name: bytes, prefix: bytes, parent: int) -> None:
        path = prefix + name
        with suppress(FileNotFoundError):
            if path not in self._own:
                _remove(name, parent)
            elif _is_directory(name, parent):
                with _opened(name, _DIRECTORY | os.O_NOFOLLOW, parent) as fd:
                    self._prune_all(fd, path + b"/")

    def _prune_all(self, directory: int, prefix: bytes) -> None:
        for child in os.listdir(directory):
            self._prune(os.fsencode(child), prefix, directory)

    def _note(self, path: bytes) -> None:
        while path and path not in self._own:
            self._own.add(path)
            self._own_bytes += len(path)
            if self._own_bytes > _OWN_MAX:
                raise InvalidArgument(f"{self._what}: more than {_OWN_MAX} bytes of paths")
            path = path.rpartition(b"/")[0]

    # Paths

    def _split(self, name: bytes, member: Member) -> list[bytes]:
        """Return the components of a path of the archive, which is relative to the root even where it begins with /."""
        parts = [part for part in name.split(b"/") if part not in (b"", b".")]
        if b".." in parts:
            raise InvalidArgument(f"{self._what}: {member}: a path with '..'")
        if len(name) > _PATH_MAX or len(parts) > _DEPTH_MAX:
            raise InvalidArgument(f"{self._what}: {member}: a path that is too long")
        return parts

    @contextmanager
    def _parent(self, parts: list[bytes], *, make: bool = False) -> Iterator[int]:
        """Give the directory that holds the last of ``parts``, made where it is missing if ``make``."""
        fd = self._open(parts[:-1], make=make)
        try:
            yield fd
        finally:
            os.close(fd)

    def _open(self, parts: list[bytes], *, make: bool) -> int:
        path = os.fsdecode(b"/".join(parts)) or "."
        try:
            return linux.openat2(self._root, path, _DIRECTORY, resolve=_RESOLVE)
        except FileNotFoundError:
            if not make:
                raise
        with self._parent(parts, make=True) as above:
            # One that no member names counts like one that does.
            self._budget.add_member()
            os.mkdir(parts[-1], 0o755, dir_fd=above)
        return linux.openat2(self._root, path, _DIRECTORY, resolve=_RESOLVE)

    @contextmanager
    def _blame(self, member: Member) -> Iterator[None]:
        """Say of which member an error is, and who is to blame."""
        try:
            yield
        except KatapyError:
            raise
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            kind = Unavailable if error.errno in _OF_THE_HOST else InvalidArgument
            raise kind(f"{self._what}: cannot unpack {member}: {reason}") from error


@contextmanager
def _opened(name: bytes, flags: int, parent: int) -> Iterator[int]:
    fd = os.open(name, flags | os.O_CLOEXEC, 0o600, dir_fd=parent)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _created(name: bytes, parent: int) -> Iterator[int]:
    """Make a new file, in the place of whatever has its name."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(name, flags, 0o600, dir_fd=parent)
    except FileExistsError:
        _remove(name, parent)
        fd = os.open(name, flags, 0o600, dir_fd=parent)
    try:
        yield fd
    finally:
        os.close(fd)


def _is_directory(name: bytes, parent: int) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _remove(name: bytes, parent: int) -> None:
    """Remove what has this name, whatever it is."""
    try:
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        return
    except IsADirectoryError:
        with _opened(name, _DIRECTORY | os.O_NOFOLLOW, parent) as fd:
            empty_directory(fd)
        os.rmdir(name, dir_fd=parent)


def _set_time(name: bytes, mtime_ns: int, parent: int, *, only_directory: bool = False) -> None:
    if not only_directory or _is_directory(name, parent):
        os.utime(name, ns=(mtime_ns, mtime_ns), dir_fd=parent, follow_symlinks=False)
