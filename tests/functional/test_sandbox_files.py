"""The files of a sandbox from the host, while a program in it does its worst: no path is a way out of its root."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from arena import Arena, python
from harness import DEADLINE

from katapy import KilledBy, Sandbox
from katapy.errors import InvalidArgument, KatapyError, NotFound, Unavailable

pytestmark = [pytest.mark.root, pytest.mark.vm]

SECRET = b"the host's\n"
OWN = b"the sandbox's\n"


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A directory of the host with a secret in it; afterwards it is unchanged."""
    (tmp_path / "secret").write_bytes(SECRET)
    yield tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    assert (tmp_path / "secret").read_bytes() == SECRET


@pytest.fixture
def directory(victim: Sandbox) -> Iterator[str]:
    """A directory of the sandbox, which is gone afterwards."""
    victim.files.make_directory("/attack")
    yield "/attack"
    if victim.alive:
        victim.run(["rm", "-rf", "/attack"]).check()


def test_reading_and_writing(victim: Sandbox, directory: str) -> None:
    """Directories are made, what is there is replaced as a whole, and both sides see the same."""
    files = victim.files
    files.write(f"{directory}/a/b/file", "text\n")
    files.write(f"{directory}/a/b/file", b"other\n", mode=0o4755)
    assert victim.run(
        ["sh", "-c", "cat file; stat -c '%a %u %g' file . ; rm file"], cwd=f"{directory}/a/b"
    ).check().stdout == ("other\n755 0 0\n755 0 0\n")
    assert not files.exists(f"{directory}/a/b/file")
    victim.run(["sh", "-c", "echo from inside > file; ln -s file link; mkdir sub"], cwd=directory).check()
    assert files.read_text(f"{directory}/link") == "from inside\n"
    found = [(each.name, each.kind, each.size) for each in files.list(directory) if each.kind != "directory"]
    assert found == [("file", "file", 12), ("link", "link", 4)]
    assert [each.name for each in files.list(directory) if each.kind == "directory"] == ["a", "sub"]
    files.remove(f"{directory}/link")
    files.remove(f"{directory}/sub")
    assert [each.name for each in files.list(directory)] == ["a", "file"]


@pytest.mark.parametrize(
    "path",
    [
        "{0}/secret",
        "/../../../../../../..{0}/secret",
        "/attack/../../../..{0}/secret",
        "attack/../..{0}/secret",
        "//{0}//secret",
    ],
)
def test_paths_of_the_host(victim: Sandbox, directory: str, outside: Path, path: str) -> None:
    """They name what is there in the sandbox, or nothing."""
    given = path.format(outside)
    with pytest.raises(NotFound):
        victim.files.read(given)
    assert not victim.files.exists(given)
    victim.files.write(given, OWN)
    assert victim.files.read(given) == OWN
    victim.run(["rm", "-r", f"/{outside.parts[1]}"]) if outside.parts[1] != "tmp" else victim.files.remove(given)


@pytest.mark.parametrize(
    "target", ["{0}", "../../../../../..{0}", "/proc/1/root{0}", "/proc/self/root{0}", "/proc/self/cwd/..{0}"]
)
def test_links_to_the_host(victim: Sandbox, directory: str, outside: Path, target: str) -> None:
    """To a directory and to a file; read, listed, written through and removed."""
    files, to = victim.files, target.format(outside)
    victim.run(["sh", "-c", 'ln -s "$0" d; ln -s "$0/secret" f', to], cwd=directory).check()
    for path in ("d/secret", "f"):
        with pytest.raises(NotFound):
            files.read(f"{directory}/{path}")
    with pytest.raises(NotFound):
        files.list(f"{directory}/d")
    with pytest.raises(KatapyError):
        files.write(f"{directory}/d/secret", OWN)
    with pytest.raises(KatapyError):
        files.make_directory(f"{directory}/d/more")
    with pytest.raises(NotFound):
        files.remove(f"{directory}/d/secret")
    # A link is replaced, not followed.
    files.write(f"{directory}/f", OWN)
    assert files.read(f"{directory}/f") == OWN
    files.remove(f"{directory}/d")


def test_links_are_the_sandboxs_own(victim: Sandbox, directory: str) -> None:
    """An absolute one starts at its root, as it does for a program in there."""
    script = 'printf "the sandbox\'s\\n" > shadow; ln -s $PWD/shadow link; ln -s / root; ln -s loop loop'
    victim.run(["sh", "-c", script], cwd=directory).check()
    for path in ("link", "root/attack/shadow", "root/root/attack/link", "root/../../attack/shadow"):
        if not path.startswith("root/root"):
            assert victim.files.read(f"{directory}/{path}") == OWN
    with pytest.raises(InvalidArgument):
        victim.files.read(f"{directory}/loop")
    victim.run(["ln", "-s", "/attack/shadow", "/etc/shadow"]).check()
    assert victim.files.read("/etc/shadow") == OWN
    victim.files.remove("/etc/shadow")


def test_what_is_no_file(victim: Sandbox, directory: str) -> None:
    """It is neither waited for nor opened."""
    make = "import os, socket\nos.mkfifo('fifo')\nsocket.socket(socket.AF_UNIX).bind('socket')\nos.mkdir('directory')"
    victim.run(python(make), cwd=directory).check()
    for name in ("fifo", "socket", "directory"):
        with pytest.raises(InvalidArgument, match="not a regular file"):
            victim.files.read(f"{directory}/{name}")
    kinds = {each.name: each.kind for each in victim.files.list(directory)}
    assert kinds == {"fifo": "other", "socket": "other", "directory": "directory"}
    for name in ("fifo", "socket"):
        victim.files.write(f"{directory}/{name}", OWN)
        assert victim.files.read(f"{directory}/{name}") == OWN
    with pytest.raises(KatapyError):
        victim.files.write(f"{directory}/directory", OWN)
    with pytest.raises(InvalidArgument):
        victim.files.list(f"{directory}/fifo")


def test_devices_cannot_be_made(victim: Sandbox, directory: str) -> None:
    for kind in ("c 1 3", "b 254 0"):
        assert victim.run(["sh", "-c", f"mknod device {kind}"], cwd=directory).exit_code == 1
    assert victim.files.list(directory) == []


def test_names(victim: Sandbox, directory: str) -> None:
    """Those that are not UTF-8, with line breaks, and as long as they may be; and what is no name."""
    make = r"""
for name in (b"\xff\xfe", b"a\nb", b"-rf", b" ", b"n" * 255):
    with open(name, "wb") as file:
        file.write(name)
"""
    victim.run(python(make), cwd=directory).check()
    found = victim.files.list(directory)
    names = {b"\xff\xfe", b"a\nb", b"-rf", b" ", b"n" * 255}
    assert {os.fsencode(each.name) for each in found} == names
    for name in names:
        assert victim.files.read(directory.encode() + b"/" + name) == name
        assert victim.files.read(f"{directory}/{os.fsdecode(name)}") == name
        victim.files.write(directory.encode() + b"/" + name, b"again")
        victim.files.remove(directory.encode() + b"/" + name)
    assert victim.files.list(directory) == []
    for path in ("n" * 256, "a\0b", "a/" * 3000 + "b"):
        for call in (victim.files.read, victim.files.list, victim.files.remove, victim.files.exists):
            with pytest.raises(InvalidArgument):
                call(f"{directory}/{path}")
        with pytest.raises(InvalidArgument):
            victim.files.write(f"{directory}/{path}", b"")
    for path in ("", "/", ".", "..", "attack/..", "attack/"):
        with pytest.raises(InvalidArgument):
            victim.files.write(path, b"")


def test_a_file_that_grows_while_it_is_read(victim: Sandbox, directory: str) -> None:
    """No more of it is read than was asked for."""
    grow = """
import os
file = open("grown", "ab", 0)
file.write(bytes(4096))
os.write(1, b"on")
while True:
    file.write(bytes(4096))
"""
    with victim.start(python(grow), cwd=directory) as process:
        assert process.read(DEADLINE) is not None
        for _ in range(100):
            with pytest.raises(InvalidArgument, match="longer than 4095 bytes"):
                victim.files.read(f"{directory}/grown", max_bytes=4095)
        assert victim.files.exists(f"{directory}/grown")
        # Until there is no room for more.
        verdict = process.wait(DEADLINE)
    assert verdict.killed_by is KilledBy.DISK
    assert len(victim.files.read(f"{directory}/grown")) > 40 << 20


def test_no_room(victim: Sandbox, directory: str) -> None:
    """A file that does not fit leaves all as it was."""
    victim.files.write(f"{directory}/file", OWN)
    with pytest.raises(Unavailable, match="no space left"):
        victim.files.write(f"{directory}/file", bytes(64 << 20))
    assert victim.files.read(f"{directory}/file") == OWN
    assert [each.name for each in victim.files.list(directory)] == ["file"]


_SWAP = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
os.mkdir("here")
open("here/secret", "w").write("the sandbox's\\n")
os.symlink(sys.argv[1], "there")
os.write(1, b"on")
while True:
    # renameat2(2), RENAME_EXCHANGE
    if libc.renameat2(-100, b"here", -100, b"there", 2):
        os.rename("here", "gone")
        os.rename("there", "here")
        os.rename("gone", "there")
"""


def test_a_directory_that_becomes_a_link(victim: Sandbox, directory: str, outside: Path) -> None:
    """And a directory again, all the time: nothing is read, made, written or removed at the other end of it."""
    files = victim.files
    here = f"{directory}/here"
    calls: list[Callable[[], object]] = [
        lambda: files.read(f"{here}/secret"),
        lambda: files.write(f"{here}/new", OWN),
        lambda: files.make_directory(f"{here}/more/and/more"),
        lambda: files.list(here),
        lambda: files.remove(f"{here}/new"),
    ]
    seen: list[object] = []
    with victim.start([*python(_SWAP), str(outside)], cwd=directory) as process:
        assert process.read(DEADLINE) is not None
        for number in range(1000):
            try:
                seen.append(calls[number % len(calls)]())
            except KatapyError as error:
                seen.append(type(error))
        assert process.running
    assert SECRET not in seen
    # Both of what may be seen there was.
    assert OWN in seen
    assert NotFound in seen


def test_an_archive_that_wants_out(victim: Sandbox, directory: str, outside: Path) -> None:
    """Absolute names, links and names above: the sandbox's own tools unpack them into its own root."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, kind, link in (
            (f"{outside}/secret", tarfile.REGTYPE, ""),
            (f"../../../../..{outside}/secret", tarfile.REGTYPE, ""),
            ("link", tarfile.SYMTYPE, str(outside)),
            ("link/secret", tarfile.REGTYPE, ""),
            ("hard", tarfile.LNKTYPE, f"{outside}/secret"),
            ("device", tarfile.CHRTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.devmajor, member.devminor = kind, link, 1, 1
            member.size = len(OWN) if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(OWN))
    victim.files.write(f"{directory}/archive.tar", archive.getvalue())
    unpack = """
import tarfile
with tarfile.open("archive.tar") as tar:
    for member in tar:
        try:
            tar._extract_member(member, "/" + member.name if member.name.startswith("/") else member.name)
            print(member.name)
        except OSError as error:
            print(member.name, error.strerror)
"""
    printed = victim.run(python(unpack), cwd=directory).check().stdout
    assert printed.startswith(f"{outside}/secret\n")
    assert victim.files.read(f"{directory}/link/secret") == OWN
    victim.run(["tar", "xf", "archive.tar"], cwd=directory)
    victim.run(["sh", "-c", 'rm -r "$0"/*', str(outside)])


def test_files_of_a_closed_sandbox(arena: Arena, host: None) -> None:
    sandbox = arena.sandbox()
    files = sandbox.files
    files.write("/file", OWN)
    sandbox.close()
    with pytest.raises(KatapyError):
        files.read("/file")
