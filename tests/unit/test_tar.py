"""Reading tar archives: what tarfile and GNU tar write comes out the same, and what is hostile is refused."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oci_images import directory, hard_link, member, symlink, tar

from katapy.errors import InvalidArgument
from katapy.storage.tar import Kind, Member, TarReader

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def read(data: bytes, limit: int = 10_000) -> list[tuple[Member, bytes]]:
    """Return all members with their contents, holes filled."""
    count = 0

    def add() -> None:
        nonlocal count
        count += 1
        if count > limit:
            raise InvalidArgument("too many")

    reader = TarReader(io.BytesIO(data), what="layer", count=add)
    members = []
    for each in reader:
        content = bytearray(each.size if each.kind is Kind.FILE else 0)
        for offset, chunk in reader.data(each):
            content[offset : offset + len(chunk)] = chunk
        members.append((each, bytes(content)))
    return members


def read_one(data: bytes) -> Member:
    """Return the only member."""
    ((found, _),) = read(data)
    return found


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_every_kind_of_member(format: int) -> None:  # noqa: A002 - tarfile's own word
    long = "d/" + "n" * 90 + "/" + "m" * 90
    made = [
        directory("d/", mode=0o1777, uid=1000, gid=100),
        member(long, b"x" * 1000, mode=0o4755, mtime=1),
        symlink("d/link", "../" * 20),
        hard_link("d/hard", long if format != tarfile.USTAR_FORMAT else "d/x"),
        member("fifo", type=tarfile.FIFOTYPE),
        member("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        member("sda", type=tarfile.BLKTYPE),
        member("empty"),
    ]
    found = read(tar(made, format=format))
    assert [(os.fsdecode(each.name).rstrip("/"), data) for each, data in found] == [
        (info.name.rstrip("/"), data) for info, data in made
    ]
    assert [each.kind for each, _ in found] == [
        Kind.DIRECTORY,
        Kind.FILE,
        Kind.SYMLINK,
        Kind.HARD_LINK,
        Kind.FIFO,
        Kind.CHARACTER_DEVICE,
        Kind.BLOCK_DEVICE,
        Kind.FILE,
    ]
    first, second, link, hard = (each for each, _ in found[:4])
    assert (first.mode, first.uid, first.gid, first.mtime_ns) == (0o1777, 1000, 100, 10**18)
    assert (second.mode, second.mtime_ns, second.size) == (0o4755, 10**9, 1000)
    assert (link.link, hard.link) == (b"../" * 20, os.fsencode(made[3][0].linkname))


NAMES = st.binary(min_size=1, max_size=300).filter(lambda name: b"\0" not in name and name.strip(b"/"))
HEADERS = st.dictionaries(st.sampled_from(["SCHILY.xattr.user.a", "comment"]), st.text("ab=\n \\ü", min_size=1))


@given(
    st.lists(
        st.tuples(
            NAMES,
            st.binary(max_size=1500),
            st.integers(0, 0o7777),
            st.integers(0, (1 << 32) - 2),
            st.integers(0, 1 << 33),
            HEADERS,
        ),
        max_size=5,
    ),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_what_is_written_is_read(files: list[tuple[bytes, bytes, int, int, int, dict[str, str]]], kind: int) -> None:
    made = []
    for name, data, mode, uid, mtime, headers in files:
        info, _ = member(os.fsdecode(name), data, mode=mode, uid=uid, mtime=mtime)
        info.pax_headers = headers if kind == tarfile.PAX_FORMAT else {}
        made.append((info, data))
    found = read(tar(made, format=kind))
    for (each, data), (info, content) in zip(found, made, strict=True):
        assert (each.name, data) == (os.fsencode(info.name), content)
        assert (each.mode, each.uid, each.mtime_ns) == (info.mode, info.uid, int(info.mtime) * 10**9)
        expected = info.pax_headers.get("SCHILY.xattr.user.a")
        assert each.xattrs == ({} if expected is None else {b"user.a": expected.encode()})


@given(st.binary(max_size=3000))
def test_noise_is_refused_or_empty(data: bytes) -> None:
    with suppress(InvalidArgument):
        assert read(data) == []


@given(st.data())
@settings(max_examples=300)
def test_a_damaged_archive_is_refused_or_read(data: st.DataObject) -> None:
    """Whatever is changed, nothing else comes out than members or one error; checksums are made right again."""
    info, content = member("name" * 50, b"data" * 200, pax_headers={"SCHILY.xattr.user.a": "value"})
    archive = bytearray(tar([(info, content), symlink("l", "t")]))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(archive) - 1))
        archive[at] = data.draw(st.integers(0, 255))
        start = at - at % 512
        block = archive[start : start + 512]
        if data.draw(st.booleans()):
            archive[start + 148 : start + 156] = b"%06o\0 " % sum(block[:148] + b" " * 8 + block[156:])
    problem = ""
    try:
        read(bytes(archive[: data.draw(st.integers(0, len(archive)))]))
    except InvalidArgument as error:
        problem = str(error)
    assert not problem or problem.startswith("layer: not a usable tar archive: ")
    assert "\n" not in problem


@pytest.mark.parametrize("version", ["0.0", "0.1", "1.0", "old"])
def test_sparse_files_as_gnu_tar_writes_them(tmp_path: Path, version: str) -> None:
    parts = {0: b"first", 1 << 20: b"middle" * 1000, (3 << 20) + 4096 * 7: b"last"}
    with (tmp_path / "sparse").open("wb") as file:
        for offset, data in parts.items():
            os.pwrite(file.fileno(), data, offset)
        file.truncate(5 << 20)
    # More parts than the old format has room for in its header.
    with (tmp_path / "many").open("wb") as file:
        for number in range(40):
            os.pwrite(file.fileno(), b"%d" % number, number * 65536)
    (tmp_path / "after").write_text("after")
    options = ["--format=gnu"] if version == "old" else ["--format=pax", f"--sparse-version={version}"]
    tar_program = shutil.which("tar")
    assert tar_program is not None
    command = [tar_program, "--create", "--sparse", *options, "--directory", str(tmp_path), "sparse", "many", "after"]
    archive = subprocess.run(command, check=True, capture_output=True).stdout
    assert len(archive) < 1 << 20
    found = {each.name: (each, data) for each, data in read(archive)}
    assert list(found) == [b"sparse", b"many", b"after"]
    for name, (each, data) in found.items():
        assert data == (tmp_path / os.fsdecode(name)).read_bytes()
        assert each.size == len(data)
    assert sum(extent.length for extent in found[b"many"][0].extents) < 40 * 65536


def header(name: bytes = b"name", flag: bytes = b"0", size: bytes = b"00000000000", **fields: bytes) -> bytes:
    """Return a header as it stands in an archive, with a checksum that is right."""
    block = bytearray(512)
    places = {"mode": (100, b"0000644"), "uid": (108, b"0000000"), "gid": (116, b"0000000"), "mtime": (136, b"0")}
    for field, (at, value) in places.items():
        content = fields.get(field, value)
        block[at : at + len(content)] = content
    block[0 : len(name)] = name
    block[124 : 124 + len(size)] = size
    block[156:157] = flag
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(text: bytes, flag: bytes = b"x") -> bytes:
    """Return a pax header with these records, written as they are."""
    return header(flag=flag, size=b"%011o" % len(text)) + text + bytes(-len(text) % 512)


def record(key: bytes, value: bytes) -> bytes:
    """Return a record with its length."""
    body = b" " + key + b"=" + value + b"\n"
    length = len(body)
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return b"%d" % length + body


@pytest.mark.parametrize(
    ("archive", "problem"),
    [
        (header().replace(b"name", b"mane", 1)[:148] + b"0000000\0" + header()[156:], "wrong checksum"),
        (header(flag=b"V"), "unknown type b'V'"),
        (header(size=b"0000000000x"), "a size that is no number"),
        (header(size=b"\xff" * 12), "a negative size"),
        (header(size=b"\x80" + b"\x7f" * 11), "the size "),
        (header(uid=b"\x80\0\0\0\xff\xff\xff\xff"), "the uid 4294967295"),
        (header(flag=b"x", size=b"%011o" % (2 << 20)), "a header of 2097152 bytes"),
        (header(flag=b"L", size=b"\x80" + b"\0" * 6 + b"\x10" + b"\0" * 4), "a header of 68719476736 bytes"),
        (pax(record(b"path", b"a")), "ends after a header"),
        (pax(b"9 path=a\n" + b"0 path=b\n") + header(), "pax header that makes no sense"),
        (pax(b"99 path=a\n") + header(), "pax header that makes no sense"),
        (pax(b"-9 path=a\n") + header(), "pax header that makes no sense"),
        (pax(b"7 path\n") + header(), "pax header that makes no sense"),
        (pax(record(b"path", b"a\0b")) + header(), "a name with NUL"),
        (pax(record(b"size", b"-1")) + header(), "no number"),
        (pax(record(b"size", b"9" * 20)) + header(), "no number"),
        (pax(record(b"uid", b"4294967295")) + header(), "the uid 4294967295"),
        (pax(record(b"mtime", b"nan")) + header(), "a time that is no number"),
        (pax(record(b"GNU.sparse.map", b"0,5,3,1") + record(b"GNU.sparse.size", b"9")) + header(), "out of order"),
        (pax(record(b"GNU.sparse.map", b"0,5") + record(b"GNU.sparse.size", b"9")) + header(), "do not add up"),
        (pax(record(b"GNU.sparse.map", b"0") + record(b"GNU.sparse.size", b"9")) + header(), "do not add up"),
        (pax(record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.minor", b"0")) + header(), "no number"),
    ],
)
def test_hostile_headers_are_refused(archive: bytes, problem: str) -> None:
    with pytest.raises(InvalidArgument, match=problem) as caught:
        read(archive + bytes(1024))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("archive", [header()[:-1], header(size=b"00000001000") + b"x" * 100, header() + b"\0"])
def test_an_archive_that_is_cut_off_is_refused(archive: bytes) -> None:
    with pytest.raises(InvalidArgument, match="cut off"):
        read(archive)


@pytest.mark.parametrize("text", [b"1\n0\n" + b"9" * 30, b"9999999\n", b"1" * 1024, b"x\n"])
def test_a_hostile_map_of_a_sparse_file_is_refused(text: bytes) -> None:
    records = [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"9")]
    data = text.ljust(2048, b"\0")
    archive = pax(b"".join(record(*each) for each in records)) + header(size=b"%011o" % len(data)) + data
    with pytest.raises(InvalidArgument, match="not a usable tar archive"):
        read(archive + bytes(1024))


def test_global_headers_hold_until_they_are_taken_back_and_are_bounded() -> None:
    archive = pax(record(b"uid", b"7"), b"g") + header(b"a") + pax(record(b"uid", b"")) + header(b"b") + header(b"c")
    assert [(each.name, each.uid) for each, _ in read(archive)] == [(b"a", 7), (b"b", 0), (b"c", 7)]
    large = b"".join(pax(record(b"%d" % number, b"x" * 600_000), b"g") for number in range(2))
    with pytest.raises(InvalidArgument, match="global headers that are too large"):
        read(large + header())


def test_every_header_counts() -> None:
    """Headers that describe no member, one after the other, would be read for ever."""
    with pytest.raises(InvalidArgument, match="too many"):
        read(pax(record(b"path", b"a")) * 20 + header(), limit=10)


def test_only_files_have_data() -> None:
    """A hard link of a size: readers that disagree on it see two different images."""
    archive = header(b"a", flag=b"1", size=b"00000001000") + header(b"b")
    assert [each.name for each, _ in read(archive)] == [b"a", b"b"]


def test_a_lone_block_of_zeros_ends_the_archive() -> None:
    assert [each.name for each, _ in read(header(b"a") + bytes(512) + header(b"b"))] == [b"a"]


@pytest.mark.parametrize(
    ("mtime", "expected"),
    [(b"1.5", 1_500_000_000), (b"-1.5", -1_500_000_000), (b"9" * 20, (1 << 33) * 10**9), (b"1.0000000019", 10**9 + 1)],
)
def test_times(mtime: bytes, expected: int) -> None:
    assert read_one(pax(record(b"mtime", mtime)) + header()).mtime_ns == expected


def test_data_that_is_not_asked_for_is_skipped() -> None:
    archive = tar([member("a", b"x" * 5000), member("b", b"y")])
    reader = TarReader(io.BytesIO(archive), what="layer", count=lambda: None)
    contents: dict[bytes, Any] = {}
    for each in reader:
        if each.name == b"b":
            contents[each.name] = b"".join(chunk for _, chunk in reader.data(each))
    assert contents == {b"b": b"y"}
