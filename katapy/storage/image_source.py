"""Where an image layout is: a directory, or a tar archive, also gzipped; and the streams that are read from it.

All that is read is bounded and verified here; what it means is image_layout's business.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import posixpath
import stat
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

from katapy import linux
from katapy.errors import InvalidArgument, NotFound, Unsupported
from katapy.jsonfile import printable
from katapy.storage.tar import Kind, Stream, TarReader
from katapy.storage.unpack import Budget, Limits

_FILES_MAX: Final = 20_000
_NAME_MAX: Final = 4096
_GZIP: Final = b"\x1f\x8b"
_OTHER_ARCHIVES: Final = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_CHUNK: Final = 1 << 20


class Source(Protocol):
    """The files of a layout, by their paths in it."""

    def open(self, name: str) -> BinaryIO:
        """Open a regular file. Raises NotFound, InvalidArgument."""


def split_reference(reference: str) -> tuple[Path, str | None]:
    """Split LAYOUT[:TAG] into a path that is there and the tag; a tag may have colons. Raises NotFound."""
    for end in (len(reference), *(at for at in range(len(reference) - 1, 0, -1) if reference[at] == ":")):
        if "\0" not in reference and os.path.exists(reference[:end]):
            return Path(reference[:end]), reference[end + 1 :] or None
    raise NotFound(f"{printable(reference)}: no such image layout; give a directory or an archive, and :TAG if need be")


@contextmanager
def open_source(path: Path, limits: Limits, *, temporary: Path) -> Iterator[Source]:
    """Open a layout; one in a gzipped archive is unzipped into ``temporary`` first, under no name.

    Raises NotFound, InvalidArgument, Unsupported for other compressions.
    """
    what = printable(str(path))
    with ExitStack() as stack:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise NotFound(f"{what}: no such image layout") from error
        except OSError as error:
            raise InvalidArgument(f"{what}: cannot be opened: {(error.strerror or '').lower()}") from error
        stack.callback(os.close, fd)
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            yield _Directory(fd, what)
            return
        if not stat.S_ISREG(mode):
            raise InvalidArgument(f"{what}: neither a directory nor an archive")
        start = os.pread(fd, 6, 0)
        for magic, name in _OTHER_ARCHIVES.items():
            if start.startswith(magic):
                raise Unsupported(f"{what}: compressed with {name}, which katapy does not read: unpack it, or use gzip")
        if start.startswith(_GZIP):
            unzipped = stack.enter_context(tempfile.TemporaryFile(dir=temporary))
            _unzip(fd, unzipped, Budget(limits, what))
            yield _Archive(unzipped.fileno(), what, limits)
        else:
            yield _Archive(fd, what, limits)


class _Directory:
    def __init__(self, fd: int, what: str) -> None:
        self._fd = fd
        self._what = what

    def open(self, name: str) -> BinaryIO:
        flags = os.O_RDONLY | os.O_NONBLOCK
        try:
            # Links are followed, as some tools share blobs, but not out of the layout: it may come from anybody.
            resolve = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_MAGICLINKS
            fd = linux.openat2(self._fd, name, flags, resolve=resolve)
        except FileNotFoundError as error:
            raise NotFound(f"{self._what}: {name}: no such file") from error
        except OSError as error:
            raise InvalidArgument(
                f"{self._what}: {name}: cannot be opened: {(error.strerror or '').lower()}"
            ) from error
        # Looked at first: Python does not make a file of a directory, and leaves it open.
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise InvalidArgument(f"{self._what}: {name}: not a regular file")
        return os.fdopen(fd, "rb")


class _Archive:
    def __init__(self, fd: int, what: str, limits: Limits) -> None:
        self._fd = fd
        self._what = what
        self._files: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        # Layers have millions of members, layouts a few hundred: all of their names are remembered.
        budget = Budget(replace(limits, members=min(limits.members, _FILES_MAX)), what)
        stream = _Slice(fd, 0, os.fstat(fd).st_size)
        reader = TarReader(stream, what=what, count=budget.add_member)
        for member in reader:
            if max(len(member.name), len(member.link)) > _NAME_MAX:
                raise InvalidArgument(f"{what}: a name of {len(member.name)} bytes")
            name = posixpath.normpath(os.fsdecode(member.name))
            if member.kind is Kind.FILE and member.extents == ((0, member.size),):
                self._files[name] = (reader.position, member.size)
                # Not read for nothing: the layers are in here.
                reader.skip(member, stream.skip)
            elif member.kind is Kind.SYMLINK:
                # docker saves a layer once, and links to it.
                target = posixpath.join(posixpath.dirname(name), os.fsdecode(member.link))
                self._links[name] = posixpath.normpath(target)

    def open(self, name: str) -> BinaryIO:
        name = posixpath.normpath(name)
        place = self._files.get(self._links.get(name, name))
        if place is None:
            raise NotFound(f"{self._what}: {printable(name)}: no such file in the archive")
        return io.BufferedReader(_Slice(self._fd, *place), _CHUNK)


class _Slice(io.RawIOBase):
    """A part of an open file, which others may read at the same time."""

    def __init__(self, fd: int, start: int, size: int) -> None:
        self._fd = fd
        self._at = start
        self._end = start + size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: self._end - self._at]
        size = os.preadv(self._fd, [view], self._at) if view else 0
        self._at += size
        return size

    def skip(self, size: int) -> None:
        self._at = min(self._at + size, self._end)


def _unzip(fd: int, target: BinaryIO, budget: Budget) -> None:
    raw = Verified(_Slice(fd, 0, os.fstat(fd).st_size), None, None, budget.what)
    stream = Unpacked(raw, "gzip", budget, budget.what)
    while chunk := stream.read(_CHUNK):
        target.write(chunk)
    target.flush()


# Streams of layers


class Verified:
    """A stream that is counted, read to its end, and then compared with a digest and a size, unless these are None."""

    def __init__(self, stream: Stream, digest: str | None, size: int | None, what: str) -> None:
        self._digest = digest
        self._hash = hashlib.new(digest.partition(":")[0], usedforsecurity=False) if digest else None
        self._stream = stream
        self._size = size
        self._what = what
        self.count = 0

    def read(self, size: int, /) -> bytes:
        """Read. Raises InvalidArgument for more than there should be."""
        data = self._stream.read(size) or b""
        self.count += len(data)
        if self._size is not None and self.count > self._size:
            raise InvalidArgument(f"{self._what}: larger than the {self._size} bytes that it should have")
        if self._hash is not None:
            self._hash.update(data)
        return data

    def finish(self) -> None:
        """Read what is left. Raises InvalidArgument where it is not what it should be."""
        while self.read(_CHUNK):
            pass
        if self._size is not None and self.count != self._size:
            raise InvalidArgument(f"{self._what}: has {self.count} bytes, not {self._size}")
        if self._hash is not None and f"{self._hash.name}:{self._hash.hexdigest()}" != self._digest:
            raise InvalidArgument(f"{self._what}: is damaged: its {self._hash.name} is {self._hash.hexdigest()}")


class Unpacked:
    """What is in ``raw``, gzip or the empty string being its compression, as far as the budget goes."""

    def __init__(self, raw: Verified, compression: str, budget: Budget, what: str) -> None:
        self._raw = raw
        self._budget = budget
        self._what = what
        self._count = 0
        self._stream: Stream = raw
        if compression == "gzip":
            self._stream = gzip.GzipFile(fileobj=raw, mode="rb")  # type: ignore[call-overload]

    def read(self, size: int, /) -> bytes:
        """Read. Raises InvalidArgument beyond the budget, and where gzip has not made this."""
        try:
            data = self._stream.read(size)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InvalidArgument(f"{self._what}: not what gzip makes: {str(error).lower()}") from error
        self._count += len(data)
        self._budget.add_bytes(len(data), unpacked=self._count, compressed=self._raw.count)
        return data


def sniff_compression(file: BinaryIO) -> str:
    """Return the compression of a layer by its first bytes, without reading them."""
    assert isinstance(file, io.BufferedReader)
    return "gzip" if file.peek(2)[:2] == _GZIP else ""
