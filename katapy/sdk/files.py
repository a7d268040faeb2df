"""The files of a sandbox, from the host: bounded, and never a way out of the sandbox's root.

Every path starts at the root of the sandbox, whatever it says: symbolic links, ``..`` and absolute names are followed
by the kernel as a process in the sandbox would have them followed (openat2(2), RESOLVE_IN_ROOT). What is no regular
file is neither read nor written: not a FIFO that nobody writes to, and not a device.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from katapy import linux
from katapy.errors import AlreadyExists, InvalidArgument, KatapyError, NotFound, PermissionDenied, Unavailable

READ_MAX: Final = 64 << 20
_LIST_MAX: Final = 100_000
_RESOLVE: Final = linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_MAGICLINKS
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_CHUNK: Final = 1 << 20
_PATH_MAX: Final = 4095  # bytes, limits.h, without the NUL
# How often what a guest changes meanwhile is looked up again (EAGAIN of openat2(2)).
_TRIES: Final = 16


@dataclass(frozen=True)
class Entry:
    """One name in a directory; ``kind`` is file, directory, link or other.

    ``size`` is in bytes, ``mtime`` in seconds since 1970.
    """

    name: str
    kind: str
    size: int
    mode: int
    mtime: float


class Files:
    """The files of one sandbox; paths are text or bytes, what is written belongs to ``owner`` (uid, gid)."""

    def __init__(self, root: Callable[[], int], owner: tuple[int, int]) -> None:
        """``root`` returns the descriptor of the root directory, which stays the caller's."""
        self._root, self._owner = root, owner

    def read(self, path: str | bytes, *, max_bytes: int = READ_MAX) -> bytes:
        """Return what is in a file.

        Raises NotFound, and InvalidArgument where it is no regular file, or longer than ``max_bytes``.
        """
        with self._errors("read", path), self._regular(path) as fd:
            parts: list[bytes] = []
            left = max_bytes + 1
            while left and (data := os.read(fd, min(left, _CHUNK))):
                parts.append(data)
                left -= len(data)
            if not left:
                raise InvalidArgument(f"cannot read {_shown(path)}: it is longer than {max_bytes} bytes")
            return b"".join(parts)

    def read_text(self, path: str | bytes, *, encoding: str = "utf-8", max_bytes: int = READ_MAX) -> str:
        """Return the text in a file; what is not of that encoding is replaced."""
        return self.read(path, max_bytes=max_bytes).decode(encoding, errors="replace")

    def write(self, path: str | bytes, data: bytes | str, *, mode: int = 0o644) -> None:
        """Make a file with ``data`` in it, and the directories above it; what has the name is replaced, as a whole.

        Raises Unavailable where there is no room for it: then all is as before.
        """
        content = data.encode() if isinstance(data, str) else data
        directory, name = os.path.split(_encoded(path))
        if name in (b"", b".", b".."):
            raise InvalidArgument(f"cannot write {_shown(path)}: no name of a file")
        with self._errors("write", path):
            parent = self._make_directories(directory)
            try:
                self._replace(parent, name, content, mode)
            finally:
                os.close(parent)

    def list(self, path: str | bytes = "/") -> list[Entry]:
        """Return what is in a directory, by name. Names that are not UTF-8 are as os.fsdecode gives them."""
        with self._errors("list", path):
            fd = self._open(path, _DIRECTORY)
            try:
                return sorted(self._entries(fd, path), key=lambda entry: entry.name)
            finally:
                os.close(fd)

    def exists(self, path: str | bytes) -> bool:
        """Tell whether there is something of that name."""
        try:
            with self._errors("look at", path):
                os.close(self._open(path, os.O_PATH))
        except NotFound:
            return False
        return True

    def make_directory(self, path: str | bytes) -> None:
        """Make a directory and those above it; one that is there is no error."""
        with self._errors("make", path):
            os.close(self._make_directories(_encoded(path)))

    def remove(self, path: str | bytes) -> None:
        """Remove a file, a link or an empty directory. Raises NotFound."""
        directory, name = os.path.split(_encoded(path).rstrip(b"/"))
        if name in (b"", b".", b".."):
            raise InvalidArgument(f"cannot remove {_shown(path)}: no name")
        with self._errors("remove", path):
            parent = self._open(directory or b"/", _DIRECTORY)
            try:
                try:
                    os.unlink(name, dir_fd=parent)
                except IsADirectoryError:
                    os.rmdir(name, dir_fd=parent)
            finally:
                os.close(parent)

    def _entries(self, fd: int, path: str | bytes) -> Iterator[Entry]:
        with os.scandir(fd) as entries:
            for number, entry in enumerate(entries):
                if number == _LIST_MAX:
                    raise InvalidArgument(f"cannot list {_shown(path)}: more than {_LIST_MAX} names")
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    yield Entry(
                        entry.name, _kind(status.st_mode), status.st_size, stat.S_IMODE(status.st_mode), status.st_mtime
                    )

    @contextmanager
    def _regular(self, path: str | bytes) -> Iterator[int]:
        # Looked at before it is opened: opening a device or a FIFO may do something.
        seen = self._open(path, os.O_PATH)
        try:
            if not stat.S_ISREG(os.fstat(seen).st_mode):
                raise InvalidArgument(f"cannot read {_shown(path)}: not a regular file")
            fd = os.open(f"/proc/self/fd/{seen}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        finally:
            os.close(seen)
        try:
            yield fd
        finally:
            os.close(fd)

    def _make_directories(self, path: bytes) -> int:
        """Return a descriptor of a directory, made where it is missing."""
        fd = self._open(b"/", _DIRECTORY)
        done = b""
        try:
            for part in path.split(b"/"):
                if part in (b"", b"."):
                    continue
                done += b"/" + part
                try:
                    below = self._open(done, _DIRECTORY)
                except FileNotFoundError:
                    with suppress(FileExistsError):
                        os.mkdir(part, 0o755, dir_fd=fd)
                        os.chown(part, *self._owner, dir_fd=fd, follow_symlinks=False)
                    below = self._open(done, _DIRECTORY)
                os.close(fd)
                fd = below
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _replace(self, parent: int, name: bytes, content: bytes, mode: int) -> None:
        temporary = f".katapy-{secrets.token_hex(8)}".encode()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(temporary, flags, 0o600, dir_fd=parent)
        try:
            try:
                view = memoryview(content)
                while view:
                    view = view[os.write(fd, view) :]
                os.fchown(fd, *self._owner)
                os.fchmod(fd, mode & 0o777)
            finally:
                os.close(fd)
            os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=parent)
            raise

    def _open(self, path: str | bytes, flags: int) -> int:
        encoded = _encoded(path) or b"."
        for _ in range(_TRIES):
            with suppress(BlockingIOError):
                return linux.openat2(self._root(), os.fsdecode(encoded), flags, resolve=_RESOLVE)
        raise Unavailable(f"cannot open {_shown(path)}: it changes all the time")

    @contextmanager
    def _errors(self, verb: str, path: str | bytes) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            kind = _ERRORS.get(error.errno or 0, InvalidArgument)
            raise kind(f"cannot {verb} {_shown(path)}: {(error.strerror or str(error)).lower()}") from error


_ERRORS: Final[dict[int, type[KatapyError]]] = {
    errno.ENOENT: NotFound,
    errno.ENOSPC: Unavailable,
    errno.EDQUOT: Unavailable,
    errno.EEXIST: AlreadyExists,
    errno.EACCES: PermissionDenied,
    errno.EPERM: PermissionDenied,
}


def _kind(mode: int) -> str:
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISDIR(mode):
        return "directory"
    return "link" if stat.S_ISLNK(mode) else "other"


def _encoded(path: str | bytes) -> bytes:
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError:
        raise InvalidArgument(f"{_shown(path)} is no path: it cannot be encoded") from None
    if b"\0" in encoded:
        raise InvalidArgument(f"{_shown(path)} is no path: it has a NUL byte")
    if len(encoded) > _PATH_MAX:
        raise InvalidArgument(f"{_shown(path)} is no path: it is longer than {_PATH_MAX} bytes")
    return encoded


def _shown(path: str | bytes) -> str:
    return ascii(os.fsdecode(path)[:200])
