"""Layers over layers: what comes out, and that nothing hostile leads out of the root."""

from __future__ import annotations

import io
import os
import stat
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oci_images import Member, directory, hard_link, member, symlink, tar

from katapy.errors import InvalidArgument, Unavailable
from katapy.storage.unpack import Budget, Limits, unpack_layer

pytestmark = pytest.mark.root

Unpack = Callable[..., Path]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty root, with something beside it that nobody may touch."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("secret")
    root = tmp_path / "root"
    root.mkdir()
    return root


@pytest.fixture
def unpack(root: Path) -> Unpack:
    """Unpack layers, given as members or as archives, over the root."""

    def unpack(*layers: Iterable[Member] | bytes, limits: Limits = Limits()) -> Path:  # noqa: B008 - frozen
        before = snapshot(root.parent / "outside")
        budget = Budget(limits, "image")
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        descriptors = os.listdir("/proc/self/fd")
        try:
            for layer in layers:
                data = layer if isinstance(layer, bytes) else tar(layer)
                unpack_layer(io.BytesIO(data), fd, budget, what="layer")
        finally:
            assert os.listdir("/proc/self/fd") == descriptors
            os.close(fd)
            assert snapshot(root.parent / "outside") == before
            assert {path.name for path in root.parent.iterdir()} == {"outside", "root"}
        return root

    return unpack


def snapshot(directory: Path) -> dict[str, object]:
    """Return all files with what they are and hold."""
    return {
        str(path.relative_to(directory)): (status := path.lstat()).st_mode
        and (
            status.st_mode,
            status.st_nlink,
            status.st_uid,
            status.st_gid,
            path.read_bytes() if stat.S_ISREG(status.st_mode) else None,
            path.readlink() if stat.S_ISLNK(status.st_mode) else None,
            [(key, os.getxattr(path, key)) for key in os.listxattr(path, follow_symlinks=False)],
        )
        for path in (directory, *sorted(directory.rglob("*")))
    }


def names(root: Path) -> list[str]:
    """Return the paths of all files in the root."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def test_everything_that_a_file_has_is_kept(unpack: Unpack) -> None:
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    attributes = {"SCHILY.xattr.security.capability": os.fsdecode(capability), "SCHILY.xattr.user.note": "a=\nb"}
    times: dict[str, Any] = {"mtime": 1_234_567_890}
    root = unpack(
        [
            directory("./", mode=0o700, uid=5, gid=6, **times),
            directory("tmp", mode=0o1777, **times),
            member("tmp/program", b"elf", mode=0o6755, uid=7, gid=8, pax_headers=attributes, **times),
            symlink("tmp/link", "program", uid=9, gid=10, **times),
            hard_link("tmp/hard", "tmp/program"),
            member("tmp/fifo", type=tarfile.FIFOTYPE, mode=0o620, uid=11, **times),
            member("implied/parents/file"),
        ]
    )
    facts = {}
    for path in (root, *root.rglob("*")):
        status = path.lstat()
        facts[str(path.relative_to(root))] = (status.st_mode, status.st_uid, status.st_gid)
        assert status.st_mtime == 1_234_567_890 or "implied" in path.parts
    assert facts == {
        ".": (stat.S_IFDIR | 0o700, 5, 6),
        "tmp": (stat.S_IFDIR | 0o1777, 0, 0),
        "tmp/program": (stat.S_IFREG | 0o6755, 7, 8),
        "tmp/hard": (stat.S_IFREG | 0o6755, 7, 8),
        "tmp/link": (stat.S_IFLNK | 0o777, 9, 10),
        "tmp/fifo": (stat.S_IFIFO | 0o620, 11, 0),
        "implied": (stat.S_IFDIR | 0o755, 0, 0),
        "implied/parents": (stat.S_IFDIR | 0o755, 0, 0),
        "implied/parents/file": (stat.S_IFREG | 0o644, 0, 0),
    }
    assert os.getxattr(root / "tmp/program", "user.note") == b"a=\nb"
    assert os.getxattr(root / "tmp/program", "security.capability") == capability
    assert (root / "tmp/hard").samefile(root / "tmp/program")


def test_other_attributes_are_left_out(unpack: Unpack) -> None:
    attributes = {"SCHILY.xattr.trusted.overlay.opaque": "y", "SCHILY.xattr.security.selinux": "s"}
    root = unpack([member("file", pax_headers=attributes)])
    assert os.listxattr(root / "file") == []


def test_names_need_not_be_text(unpack: Unpack) -> None:
    odd = [os.fsdecode(b"\xff\xfe"), "new\nline", "\x1b[31m", "ü", " ", "-rf"]
    root = unpack([member(name) for name in odd])
    assert sorted(os.listdir(os.fsencode(root))) == sorted(map(os.fsencode, odd))


def test_absolute_names_are_of_the_root(unpack: Unpack) -> None:
    root = unpack([member("/etc/passwd", b"root"), hard_link("/shadow", "/etc/passwd"), member("//a//./b")])
    assert names(root) == ["a", "a/b", "etc", "etc/passwd", "shadow"]


def test_device_nodes_are_left_out(unpack: Unpack) -> None:
    """Also in place of a file: what the layer says is no longer there, is not."""
    devices = [member(name, type=tarfile.CHRTYPE, devmajor=1, devminor=3) for name in ("dev/null", "file")]
    root = unpack([member("file")], [*devices, member("sda", type=tarfile.BLKTYPE, devmajor=8)])
    assert names(root) == ["dev"]


def test_a_sparse_file_of_a_terabyte_takes_no_room(unpack: Unpack) -> None:
    headers = {"GNU.sparse.map": f"{1 << 39},4", "GNU.sparse.size": str(1 << 40)}
    root = unpack([member("sparse", b"data", pax_headers=headers)])
    status = (root / "sparse").stat()
    assert status.st_size == 1 << 40
    assert status.st_blocks * 512 < 1 << 20
    with (root / "sparse").open("rb") as file:
        file.seek(1 << 39)
        assert file.read(5) == b"data\0"


# Layers over layers


def test_later_layers_replace_whatever_was_there(unpack: Unpack) -> None:
    first = [member("file", b"1"), directory("tree"), member("tree/a/b"), symlink("link", "tree"), member("same", b"1")]
    second = [directory("file"), member("tree", b"2"), directory("link"), member("link/c"), member("same", b"2")]
    root = unpack(first, second)
    assert names(root) == ["file", "link", "link/c", "same", "tree"]
    assert (root / "tree").read_bytes() == b"2"
    assert (root / "same").read_bytes() == b"2"
    assert not (root / "link").is_symlink()


def test_a_directory_is_merged_and_its_status_the_last(unpack: Unpack) -> None:
    root = unpack([directory("d"), member("d/1")], [directory("d", mode=0o700, uid=3), member("d/2")])
    assert names(root) == ["d", "d/1", "d/2"]
    assert ((root / "d").stat().st_mode & 0o777, (root / "d").stat().st_uid) == (0o700, 3)


def test_a_file_that_is_replaced_leaves_its_other_names_alone(unpack: Unpack) -> None:
    root = unpack([member("a", b"1"), hard_link("b", "a")], [member("a", b"2")])
    assert ((root / "a").read_bytes(), (root / "b").read_bytes()) == (b"2", b"1")


def test_a_hard_link_to_itself_and_to_what_it_is_already(unpack: Unpack) -> None:
    root = unpack([member("a", b"1"), hard_link("b", "a")], [hard_link("a", "a"), hard_link("b", "a")])
    assert (root / "a").samefile(root / "b")


def test_whiteouts_hide_what_is_below(unpack: Unpack) -> None:
    first = [member("a/b/c"), member("a/d"), member("e"), symlink("f", "e")]
    root = unpack(first, [member("a/.wh.b"), member(".wh.e"), member(".wh.f"), member(".wh.none"), member("x/.wh.y")])
    assert names(root) == ["a", "a/d"]


@pytest.mark.parametrize("first", [True, False], ids=["before its siblings", "after them"])
def test_an_opaque_directory_shows_its_own_layer_only(unpack: Unpack, first: bool) -> None:
    below = [member("d/old"), member("d/sub/old"), member("d/kept/old"), member("beside")]
    own = [directory("d"), member("d/new"), member("d/kept/new"), member("d/sub/deep/new")]
    opaque = member("d/.wh..wh..opq")
    root = unpack(below, [opaque, *own] if first else [*own, opaque])
    assert names(root) == [
        "beside",
        "d",
        "d/kept",
        "d/kept/new",
        "d/new",
        "d/sub",
        "d/sub/deep",
        "d/sub/deep/new",
    ]


def test_a_whiteout_leaves_its_own_layer_alone(unpack: Unpack) -> None:
    root = unpack(
        [member("d/old"), member("f", b"1")], [member("d/new"), member(".wh.d"), member("f", b"2"), member(".wh.f")]
    )
    assert names(root) == ["d", "d/new", "f"]


def test_what_aufs_left_is_ignored(unpack: Unpack) -> None:
    assert names(unpack([member(".wh..wh.plnk"), member(".wh..wh.aufs"), member("a")])) == ["a"]


def test_a_parent_that_is_a_link_is_followed_inside(unpack: Unpack) -> None:
    """As where a layer that was made before the merge of /usr lies over one that was made after it."""
    first = [directory("usr/lib"), symlink("lib", "usr/lib"), symlink("abs", "/usr"), symlink("up", "../../../usr")]
    root = unpack(
        first, [member("lib/a"), member("abs/b"), member("up/c"), hard_link("d", "lib/a"), member("lib/.wh.a")]
    )
    assert names(root) == ["abs", "d", "lib", "up", "usr", "usr/b", "usr/c", "usr/lib", "usr/lib/a"]


# Hostile layers


def absolute(root: Path, name: str = "") -> str:
    return str(root.parent / "outside" / name)


@pytest.mark.parametrize("target", ["{outside}", "../outside", "../../../../../../../..{outside}", "/proc/self/cwd"])
def test_a_link_leads_nowhere_outside(unpack: Unpack, root: Path, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root.parent / "outside")
    link = symlink("link", target.format(outside=absolute(root)))
    for attack in (
        member("link/new"),
        member("link/secret", b"changed"),
        directory("link/secret"),
        member("link/.wh.secret"),
        member("link/.wh..wh..opq"),
        hard_link("stolen", "link/secret"),
        symlink("link/new", "x"),
    ):
        try:
            unpack([link, attack])
        except InvalidArgument as error:
            assert "layer: " in str(error)  # noqa: PT017 - either is right: what matters is outside
        assert not (root / "stolen").exists()


def test_a_link_in_the_place_of_a_file_is_not_written_through(unpack: Unpack, root: Path) -> None:
    root = unpack([symlink("a", absolute(root, "secret")), member("a", b"changed", mode=0o777)])
    assert (root / "a").read_bytes() == b"changed"
    assert not (root / "a").is_symlink()


def test_a_link_in_the_place_of_a_directory_keeps_its_targets_mode(unpack: Unpack, root: Path) -> None:
    """Times of directories are set at the end, when a link may have taken the name."""
    unpack([directory("d", mtime=5), symlink("d", absolute(root))])
    assert (root.parent / "outside").stat().st_mtime != 5


@pytest.mark.parametrize(
    ("members", "problem"),
    [
        ([member("../x")], r"\.\./x: a path with '\.\.'"),
        ([member("a/../../x")], "a path with"),
        ([member("a"), hard_link("b", "../a")], "a path with"),
        ([member("/..")], "a path with"),
        ([hard_link("b", "none")], "cannot unpack b: no such file"),
        ([hard_link("b", "/")], "a hard link to the root"),
        ([directory("d"), hard_link("b", "d")], "a hard link to a directory"),
        ([member("a"), member("a/b")], "cannot unpack a/b: not a directory"),
        ([symlink("a", "a"), member("a/b")], "cannot unpack a/b: too many levels"),
        ([symlink("a", "none"), member("a/b")], "cannot unpack a/b: file exists"),
        ([member("n" * 300)], "file name too long"),
        ([member("/".join("n" * 250 for _ in range(20)))], "a path that is too long"),
        ([member("a/" * 300)], "a path that is too long"),
        ([member(".", b"data")], "the root is a file"),
        ([symlink("./", "/etc")], "the root is a symbolic link"),
        ([member("a/.wh.")], "a whiteout of nothing"),
        ([member("a/.wh..")], "a whiteout of nothing"),
        ([member("a/.wh...")], "a whiteout of nothing"),
        ([symlink("a", "")], "cannot unpack a: no such file"),
        ([member("a", pax_headers={"SCHILY.xattr.security.capability": "no capability"})], "cannot unpack a: invalid"),
        ([member("a", pax_headers={"SCHILY.xattr.user.a": "x" * 100_000})], "cannot unpack a: "),
    ],
)
def test_what_no_layer_may_hold_is_refused(unpack: Unpack, members: list[Member], problem: str) -> None:
    with pytest.raises((InvalidArgument, Unavailable), match=f"layer: .*{problem}") as caught:
        unpack([directory("a"), *members] if "whiteout" in problem else members)
    assert "\n" not in str(caught.value)


def test_whiteouts_of_dots_remove_nothing(unpack: Unpack, root: Path) -> None:
    for name in (".wh..", ".wh..."):
        with pytest.raises(InvalidArgument):
            unpack([member("d/file"), member(f"d/{name}")])
    assert names(root) == ["d", "d/file"]


def test_members_and_time_are_bounded(unpack: Unpack) -> None:
    with pytest.raises(InvalidArgument, match="image: more than 5 members"):
        unpack([member("a")] * 3, [member("a")] * 3, limits=Limits(members=5))
    with pytest.raises(InvalidArgument, match="image: more than 5 members"):
        unpack([member("implied/" * 10 + "a")], limits=Limits(members=5))
    with pytest.raises(InvalidArgument, match="image: not unpacked within 0 s"):
        unpack([member("a")], limits=Limits(seconds=0))


def test_what_is_remembered_of_paths_is_bounded(unpack: Unpack, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tree under many names, which links give it, would be remembered under each."""
    monkeypatch.setattr("katapy.storage.unpack._OWN_MAX", 10_000)
    links = [each for n in range(100) for each in (symlink(f"l{n}", "d"), member(f"l{n}/{'d/' * 60}file"))]
    with pytest.raises(InvalidArgument, match="more than 10000 bytes of paths"):
        unpack([directory("d"), *links])


def test_trees_deeper_than_any_path_are_removed_again(unpack: Unpack) -> None:
    """Each part is below the one before, where a link leads: recursion would run out of stack or descriptors."""
    part = "d/" * 150
    members = [directory(part)]
    for number in range(8):
        link = f"link{number}"
        members += [symlink(link, f"link{number - 1}/{part}" if number else part), directory(f"{link}/{part}")]
    root = unpack(members, [member(".wh.d"), *(member(f".wh.link{number}") for number in range(8))])
    assert names(root) == []
    root = unpack(members, [member("d", b"file")])
    assert (root / "d").read_bytes() == b"file"


PARTS = st.sampled_from(["a", "b", "c", ".wh.a", ".wh.b", ".wh..wh..opq", "..", ".", "", os.fsdecode(b"\xff")])
PATHS = st.lists(PARTS, min_size=1, max_size=4).map("/".join)
TARGETS = PATHS | PATHS.map(lambda path: f"/{path}") | st.just("../outside/secret") | st.just("../../outside")
KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
MEMBERS = st.builds(
    lambda name, kind, target, mode: member(name, type=kind, linkname=target, mode=mode),
    PATHS,
    KINDS,
    TARGETS,
    st.integers(0, 0o7777),
)


@given(st.lists(st.lists(MEMBERS, max_size=8), min_size=1, max_size=3))
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_leads_outside_whatever_a_layer_holds(unpack: Unpack, layers: list[list[Member]]) -> None:
    """The fixture asserts it, and that no descriptor is left open."""
    problem = ""
    try:
        unpack(*layers)
    except InvalidArgument as error:
        problem = str(error)
    assert "\n" not in problem
