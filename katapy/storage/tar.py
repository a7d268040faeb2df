"""Reads a tar archive that somebody else has made, member by member, from a stream.

ustar, pax and GNU's extensions, sparse files included (tar(5) of libarchive; POSIX pax). Names are bytes. Python's own
reader is made for archives that one trusts: it reads headers of any size into memory, and guesses where it should
refuse. What the members mean, and where they may lead, is the business of the caller.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple, NoReturn, Protocol

from katapy.errors import InvalidArgument
from katapy.jsonfile import printable

_BLOCK: Final = 512
_CHUNK: Final = 1 << 20
# The longest path has 4096 bytes, extended attributes 64 KiB; both fit many times.
_HEADER_MAX: Final = 1 << 20
_EXTENTS_MAX: Final = 100_000
_ID_MAX: Final = (1 << 32) - 2
_SIZE_MAX: Final = (1 << 63) - 1
# What every file system keeps, in seconds.
_TIME_MIN, _TIME_MAX = -(1 << 31), 1 << 33
_XATTR: Final = b"SCHILY.xattr."
_DECIMAL: Final = re.compile(rb"[0-9]{1,20}")
_TIME: Final = re.compile(rb"(-?)([0-9]{1,20})(?:\.([0-9]{0,40}))?")
# Headers for the next member, and the pax record that each of GNU's stands for.
_DESCRIBES_NEXT: Final = {b"x": b"", b"g": b"", b"L": b"path", b"K": b"linkpath"}
# Some numbers end with NUL, some with a space, and some fill their field.
_OCTAL: Final = re.compile(rb" *([0-7]*)[ \0]*")


class Kind(StrEnum):
    """What a member is."""

    FILE = "file"
    HARD_LINK = "hard link"
    SYMLINK = "symbolic link"
    CHARACTER_DEVICE = "character device"
    BLOCK_DEVICE = "block device"
    DIRECTORY = "directory"
    FIFO = "FIFO"


_KINDS: Final = {
    b"\0": Kind.FILE,
    b"0": Kind.FILE,
    b"1": Kind.HARD_LINK,
    b"2": Kind.SYMLINK,
    b"3": Kind.CHARACTER_DEVICE,
    b"4": Kind.BLOCK_DEVICE,
    b"5": Kind.DIRECTORY,
    b"6": Kind.FIFO,
    b"7": Kind.FILE,
    b"S": Kind.FILE,
}


class Extent(NamedTuple):
    """A part of a file that the archive holds, in bytes; between them are holes."""

    offset: int
    length: int


@dataclass(frozen=True)
class Member:
    """One file of an archive. ``size`` in bytes with holes, ``link`` is where a link leads."""

    name: bytes
    kind: Kind
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size: int
    link: bytes
    xattrs: Mapping[bytes, bytes]
    extents: tuple[Extent, ...]

    def __str__(self) -> str:
        """Return the name as an error message may show it."""
        return printable(os.fsdecode(self.name))


class Stream(Protocol):
    """What archives are read from."""

    def read(self, size: int, /) -> bytes:
        """Return up to ``size`` bytes, b"" at the end."""


class TarReader:
    """Iterates over the members of ``stream``; the data of each is read before the next is asked for, or skipped.

    ``what`` names the archive in errors; ``count`` is called for every header, and may refuse to go on. All that is
    wrong with an archive raises InvalidArgument.
    """

    def __init__(self, stream: Stream, *, what: str, count: Callable[[], None]) -> None:
        self.what = what
        self.position = 0
        self._stream = stream
        self._count = count
        self._globals: dict[bytes, bytes] = {}
        self._left = 0  # of the present member's data
        self._padding = 0

    def __iter__(self) -> Iterator[Member]:
        """Yield the members in their order."""
        while (block := self._next_header()) is not None:
            yield self._member(block)

    def data(self, member: Member) -> Iterator[tuple[int, bytes]]:
        """Yield what the present ``member`` holds, as offset and bytes, a MiB at most at once."""
        for offset, length in member.extents:
            end = offset + length
            while offset < end:
                chunk = self._take(min(_CHUNK, end - offset))
                yield offset, chunk
                offset += len(chunk)

    def skip(self, member: Member, seek: Callable[[int], None]) -> None:
        """Leave out the data of the present ``member``, which is no sparse file, by ``seek`` in the stream."""
        if self._left != member.size:
            raise ValueError("its data has been read from")
        seek(self._left)
        self.position += self._left
        self._left = 0

    def _member(self, block: bytes) -> Member:
        """Read what describes a member: its header ``block``, and the headers that come before it for what is long."""
        records = _Records()
        long: dict[bytes, bytes] = {}
        while (flag := block[156:157]) in _DESCRIBES_NEXT:
            text = self._long_header(block)
            if flag == b"g":
                self._globals |= self._records(text).values
                if sum(map(len, self._globals.values())) > _HEADER_MAX:
                    self._fail("global headers that are too large")
            elif flag == b"x":
                records = self._records(text)
            else:
                long[_DESCRIBES_NEXT[flag]] = text.partition(b"\0")[0]
            following = self._next_header()
            if following is None:
                self._fail("ends after a header for the next member")
            block = following
        kind = _KINDS.get(flag)
        if kind is None:
            self._fail(f"a member of the unknown type {flag!r}")
        # An empty record takes a global one back.
        merged = self._globals | records.values | long
        records.values = {key: value for key, value in merged.items() if value}
        return self._describe(block, kind, records)

    def _describe(self, block: bytes, kind: Kind, records: _Records) -> Member:
        values = records.values
        name = values.get(b"GNU.sparse.name", values.get(b"path", _name(block)))
        link = values.get(b"linkpath", block[157:257].partition(b"\0")[0])
        if b"\0" in name or b"\0" in link:
            self._fail("a name with NUL")
        if kind is Kind.FILE and block[156:157] == b"\0" and name.endswith(b"/"):
            kind = Kind.DIRECTORY  # as before POSIX
        # Whatever is written there: only files have data, for all who read images.
        stored = self._number(values.get(b"size"), block[124:136], _SIZE_MAX, "size") if kind is Kind.FILE else 0
        self._left, self._padding = stored, -stored % _BLOCK
        size = stored
        extents: tuple[Extent, ...] = (Extent(0, stored),)
        if kind is Kind.FILE and (block[156:157] == b"S" or any(key.startswith(b"GNU.sparse.") for key in values)):
            size, extents = self._sparse(block, records)
        return Member(
            name=name,
            kind=kind,
            mode=self._number(None, block[100:108], _SIZE_MAX, "mode") & 0o7777,
            uid=self._number(values.get(b"uid"), block[108:116], _ID_MAX, "uid"),
            gid=self._number(values.get(b"gid"), block[116:124], _ID_MAX, "gid"),
            mtime_ns=self._time(values.get(b"mtime"), block[136:148]),
            size=size,
            link=link,
            xattrs={key.removeprefix(_XATTR): value for key, value in values.items() if key.startswith(_XATTR)},
            extents=extents,
        )

    # Sparse files: https://www.gnu.org/software/tar/manual/html_node/Sparse-Formats.html

    def _sparse(self, block: bytes, records: _Records) -> tuple[int, tuple[Extent, ...]]:
        values = records.values
        if block[156:157] == b"S":
            size, numbers = self._old_sparse(block)
        elif (values.get(b"GNU.sparse.major"), values.get(b"GNU.sparse.minor")) == (b"1", b"0"):
            size, numbers = self._decimal(values.get(b"GNU.sparse.realsize")), self._sparse_map()
        elif b"GNU.sparse.map" in values:
            size = self._decimal(values.get(b"GNU.sparse.size"))
            numbers = [self._decimal(number) for number in values[b"GNU.sparse.map"].split(b",")]
        else:
            size = self._decimal(values.get(b"GNU.sparse.size"))
            numbers = [self._decimal(number) for number in records.sparse]
        extents = tuple(Extent(*pair) for pair in zip(numbers[::2], numbers[1::2], strict=False))
        end = 0
        for extent in extents:
            if extent.offset < end:
                self._fail("a sparse file with parts out of order")
            end = extent.offset + extent.length
        if len(numbers) % 2 or end > size or sum(extent.length for extent in extents) != self._left:
            self._fail("a sparse file whose parts do not add up")
        return size, extents

    def _old_sparse(self, block: bytes) -> tuple[int, list[int]]:
        """Read GNU's first format: in the header, and in blocks after it."""
        size = self._number(None, block[483:495], _SIZE_MAX, "size")
        entries, more = block[386:482], block[482]
        numbers: list[int] = []
        while True:
            fields = [entries[at : at + 12] for at in range(0, len(entries), 12)]
            for offset, length in zip(fields[::2], fields[1::2], strict=True):
                if offset.strip(b"\0 ") or length.strip(b"\0 "):
                    numbers += (self._number(None, each, _SIZE_MAX, "offset") for each in (offset, length))
            if not more:
                return size, numbers
            if len(numbers) > 2 * _EXTENTS_MAX:
                self._fail("a sparse file of too many parts")
            extension = self._read(_BLOCK)
            entries, more = extension[:504], extension[504]

    def _sparse_map(self) -> list[int]:
        """Read format 1.0: numbers in lines, in whole blocks before the data."""
        text = b""
        numbers: list[int] = []
        wanted = 1
        while len(numbers) < wanted:
            if self._left < _BLOCK or len(text) > _BLOCK:
                self._fail("a sparse file without its map")
            text += self._take(_BLOCK)
            *lines, text = text.split(b"\n")
            numbers += map(self._decimal, lines)
            if numbers:
                wanted = 1 + 2 * numbers[0]
            if wanted > 2 * _EXTENTS_MAX:
                self._fail("a sparse file of too many parts")
        return numbers[1:wanted]

    def _records(self, text: bytes) -> _Records:
        """Parse pax records: each its length, key and value."""
        records = _Records()
        at = 0
        while at < len(text):
            digits, space, _ = text[at : at + 12].partition(b" ")
            length = int(digits) if space and _DECIMAL.fullmatch(digits) else 0
            record = text[at : at + length]
            key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
            if not equals or not record.endswith(b"\n") or len(record) != length:
                self._fail("a pax header that makes no sense")
            if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
                records.sparse.append(value)
            records.values[key] = value
            at += length
        return records

    def _long_header(self, block: bytes) -> bytes:
        size = self._number(None, block[124:136], _SIZE_MAX, "size")
        if size > _HEADER_MAX:
            self._fail(f"a header of {size} bytes")
        self._left, self._padding = size, -size % _BLOCK
        return self._take(size) if size else b""

    def _next_header(self) -> bytes | None:
        """Skip what is left of the present member; return the next header, None at the end."""
        while self._left:
            self._take(min(_CHUNK, self._left))
        if self._padding:
            self._read(self._padding)
            self._padding = 0
        block = self._read(_BLOCK, may_end=True)
        if not block.strip(b"\0"):
            return None
        self._count()
        fields = block[:148] + b" " * 8 + block[156:]
        if self._number(None, block[148:156], _SIZE_MAX, "checksum") != sum(fields):
            self._fail("a header with a wrong checksum")
        return block

    def _take(self, size: int) -> bytes:
        """Read from the present member's data."""
        data = self._read(size)
        self._left -= size
        return data

    def _read(self, size: int, *, may_end: bool = False) -> bytes:
        parts = []
        missing = size
        while missing:
            part = self._stream.read(missing)
            if not part:
                if may_end and missing == size:
                    return b""
                self._fail("it is cut off")
            parts.append(part)
            missing -= len(part)
        self.position += size
        return b"".join(parts) if len(parts) > 1 else parts[0]

    def _number(self, record: bytes | None, text: bytes, limit: int, what: str) -> int:
        """Return a number: of a pax record, else of a header's field in octal or, beyond that, in base 256."""
        if record is not None:
            value = self._decimal(record)
        elif text[0] & 0x80:
            if text[0] == 0xFF:
                self._fail(f"a negative {what}")
            value = int.from_bytes(text, "big") - (1 << (8 * len(text) - 1))
        else:
            match = _OCTAL.fullmatch(text)
            if match is None:
                self._fail(f"a {what} that is no number")
            value = int(match[1] or b"0", 8)
        if value > limit:
            self._fail(f"the {what} {value}")
        return value

    def _decimal(self, text: bytes | None) -> int:
        if text is None or not _DECIMAL.fullmatch(text) or int(text) > _SIZE_MAX:
            self._fail("a pax record that is no number")
        return int(text)

    def _time(self, record: bytes | None, text: bytes) -> int:
        if record is None:
            # Before 1970, in base 256, is of no use to anybody.
            seconds = 0 if text[0] == 0xFF else self._number(None, text, _SIZE_MAX, "time")
            return min(seconds, _TIME_MAX) * 10**9
        match = _TIME.fullmatch(record)
        if match is None:
            self._fail("a time that is no number")
        nanoseconds = int(match[2]) * 10**9 + int((match[3] or b"").ljust(9, b"0")[:9])
        return max(_TIME_MIN * 10**9, min(-nanoseconds if match[1] else nanoseconds, _TIME_MAX * 10**9))

    def _fail(self, problem: str) -> NoReturn:
        raise InvalidArgument(f"{self.what}: not a usable tar archive: {problem} (at byte {self.position})")


@dataclass
class _Records:
    """Records of pax headers; ``sparse`` are those that may come several times, in their order."""

    values: dict[bytes, bytes] = field(default_factory=dict)
    sparse: list[bytes] = field(default_factory=list)


def _name(block: bytes) -> bytes:
    name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name
