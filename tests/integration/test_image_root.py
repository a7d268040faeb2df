"""Images become roots: once, whoever is at it, the same files as other tools show; and what is kept of them."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from oci_images import LAYER, MANIFEST, Layout, hard_link, member, tar

from katapy.errors import InvalidArgument, KatapyError, PermissionDenied, Unavailable
from katapy.storage.image_root import CacheSize, open_root, remove_unused
from katapy.storage.unpack import Limits

pytestmark = pytest.mark.root


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """A cache in which nothing half-made is left."""
    cache = tmp_path / "cache"
    yield cache
    assert not list(cache.glob(".*"))


def roots(cache: Path) -> list[str]:
    """Return the names of the roots that are kept."""
    return sorted(path.name for path in cache.iterdir() if path.name != "lock")


def test_a_root_is_unpacked_once_and_known_by_every_name(layout: Layout, cache: Path, tmp_path: Path) -> None:
    digest = layout.add_image([member("etc/a", b"1")], [member("etc/b"), member("etc/.wh.a")], tag="v1")
    with open_root(str(layout.path), cache=cache) as root:
        assert (root.digest, root.path) == (digest, cache / digest.removeprefix("sha256:") / "rootfs")
        assert [path.name for path in root.path.rglob("*")] == ["etc", "b"]
        assert root.config.cmd == ("/bin/sh",)
        inode = root.path.stat().st_ino
    archive = layout.archive(tmp_path / "image.tar")
    # Were it unpacked again, this would be found.
    for blob in (layout.path / "blobs/sha256").iterdir():
        if blob.read_bytes().startswith(b"\x1f\x8b"):
            blob.unlink()
    for name in (f"{layout.path}:v1", str(archive)):
        with open_root(name, cache=cache) as root:
            assert root.path.stat().st_ino == inode
    assert roots(cache) == [digest.removeprefix("sha256:")]
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_only_root_unpacks(layout: Layout, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout.add_image([member("a")])
    cache.mkdir()
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(PermissionDenied, match="only root"), open_root(str(layout.path), cache=cache):
        pass


def test_a_cache_that_cannot_be_written(layout: Layout, tmp_path: Path) -> None:
    layout.add_image([member("a")])
    (tmp_path / "file").touch()
    with pytest.raises(Unavailable, match="cannot use"), open_root(str(layout.path), cache=tmp_path / "file/cache"):
        pass


@pytest.mark.parametrize("damage", ["changed", "compressed otherwise", "cut off", "longer", "another tar"])
def test_a_damaged_layer_leaves_nothing(layout: Layout, cache: Path, damage: str) -> None:
    good = gzip.compress(tar([member("a", os.urandom(10_000))]), 1)
    manifest = layout.manifest([gzip.decompress(good)])
    layout.add(manifest)
    (path,) = [blob for blob in (layout.path / "blobs/sha256").iterdir() if blob.read_bytes()[:2] == b"\x1f\x8b"]
    match damage:
        case "changed":
            path.write_bytes(good[:5000] + bytes([good[5000] ^ 1]) + good[5001:])
        case "compressed otherwise":
            # The time in gzip's header: what is in it stays the same.
            path.write_bytes(good[:4] + b"time" + good[8:])
        case "cut off":
            path.write_bytes(good[:-1])
        case "longer":
            path.write_bytes(good + b"\0")
        case _:
            # All there is fits together, but for the digest of what is in it.
            other = layout.blob(gzip.compress(tar([member("b")])), f"{LAYER}+gzip")
            document = json.loads((layout.path / "blobs" / manifest["digest"].replace(":", "/")).read_bytes())
            layout.manifests = []
            layout.add(layout.blob({**document, "layers": [other]}, MANIFEST))
    with pytest.raises(InvalidArgument, match="layer 1"), open_root(str(layout.path), cache=cache):
        pass
    assert roots(cache) == []


def test_bytes_behind_the_end_of_an_archive_are_verified_too(layout: Layout, cache: Path) -> None:
    archive = tar([member("a")])
    layout.add(layout.manifest([archive + b"hidden" * 1000], compressed=False))
    with open_root(str(layout.path), cache=cache) as root:
        assert [path.name for path in root.path.iterdir()] == ["a"]


def test_bombs_are_refused(layout: Layout, cache: Path) -> None:
    layout.add_image([member("zeros", bytes(8 << 20))])
    for limits, problem in (
        (Limits(total_bytes=1 << 20), "larger than 1048576 bytes"),
        (Limits(ratio=100, ratio_from_bytes=1 << 20), "100 times as large as compressed"),
        (Limits(members=0), "more than 0 members"),
    ):
        with pytest.raises(InvalidArgument, match=problem), open_root(str(layout.path), cache=cache, limits=limits):
            pass
    assert roots(cache) == []


def test_a_full_disk_is_the_hosts_fault(layout: Layout, tmp_path: Path) -> None:
    layout.add_image([member("large", os.urandom(4 << 20))])
    cache = tmp_path / "small"
    cache.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2M", "none", str(cache)], check=True)
    try:
        with pytest.raises(Unavailable, match=r"large: no space left"), open_root(str(layout.path), cache=cache):
            pass
        assert [path.name for path in cache.iterdir()] == ["lock"]
    finally:
        subprocess.run(["umount", str(cache)], check=True)


# Several processes

OPEN = """
import signal, sys
from pathlib import Path
from katapy.storage import image_root
if sys.argv[3:]:  # to stop there
    image_root._sync = lambda directory: (print(directory, flush=True), signal.pause())
with image_root.open_root(sys.argv[1], cache=Path(sys.argv[2])) as root:
    print(root.path.stat().st_ino, flush=True)
    sys.stdin.read()
"""


def start(layout: Layout, cache: Path, *options: str) -> subprocess.Popen[str]:
    """Start a process that holds the root until its standard input ends."""
    command = [sys.executable, "-c", OPEN, str(layout.path), str(cache), *options]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_processes_that_want_the_same_image_at_once_share_it(layout: Layout, cache: Path) -> None:
    layout.add_image([member(f"file{number}", os.urandom(1000)) for number in range(2000)])
    processes = [start(layout, cache) for _ in range(4)]
    answers = [process.communicate(timeout=120)[0] for process in processes]
    assert len(set(answers)) == 1
    assert answers[0].strip().isdecimal()
    assert len(roots(cache)) == 1


def test_what_a_killed_process_has_left_is_removed(layout: Layout, cache: Path) -> None:
    layout.add_image([member(f"file{number}", os.urandom(1000)) for number in range(3000)])
    process = start(layout, cache, "unfinished")
    assert process.stdout is not None
    assert ".unpack-" in process.stdout.readline()
    process.kill()
    process.communicate()
    assert roots(cache)[0].startswith(".unpack-")
    with open_root(str(layout.path), cache=cache) as root:
        assert len(list(root.path.iterdir())) == 3000


def test_a_root_in_use_is_not_removed(layout: Layout, cache: Path) -> None:
    layout.add_image([member("a")])
    user = start(layout, cache)
    assert user.stdout is not None
    assert user.stdout.readline()
    assert remove_unused(cache) == []
    # Nor after a user that was killed: the kernel lets go of what it held.
    user.kill()
    user.communicate()
    assert len(remove_unused(cache)) == 1
    assert roots(cache) == []
    assert remove_unused(cache / "none") == []


def test_the_least_recently_used_goes_first_and_never_one_in_use(layout: Layout, cache: Path) -> None:
    digests = [layout.add_image([member(name, b"x" * 100_000)], tag=name).partition(":")[2] for name in "abcd"]
    size = CacheSize(roots=2)

    def use(tag: str, stack: ExitStack, size: CacheSize = size) -> None:
        stack.enter_context(open_root(f"{layout.path}:{tag}", cache=cache, size=size))

    with ExitStack() as unused:
        for tag in "aba":
            use(tag, unused)
    with ExitStack() as used:
        use("c", used)
        assert roots(cache) == sorted([digests[0], digests[2]])
        use("a", used)
        use("b", used)
        # Both others are in use: there are more than there should be.
        assert roots(cache) == sorted(digests[:3])
    with ExitStack() as last:
        use("d", last, CacheSize(total_bytes=250_000))
        assert roots(cache) == sorted([digests[1], digests[3]])


@pytest.mark.parametrize("damage", ["no description", "no rootfs", "other version"])
def test_a_damaged_root_is_unpacked_again(layout: Layout, cache: Path, damage: str) -> None:
    layout.add_image([member("a", b"1")])
    with open_root(str(layout.path), cache=cache) as root:
        place = root.path.parent
    match damage:
        case "no description":
            (place / "image.json").unlink()
        case "no rootfs":
            root.path.rename(place / "gone")
        case _:
            (place / "image.json").write_text('{"schema": 0}')
    with open_root(str(layout.path), cache=cache) as root:
        assert (root.path / "a").read_bytes() == b"1"
    with place.joinpath("image.json").open() as file:
        assert json.load(file)["schema"] == 1


def test_a_damaged_root_in_use_is_an_error(layout: Layout, cache: Path) -> None:
    layout.add_image([member("a")])
    with open_root(str(layout.path), cache=cache) as root:
        (root.path.parent / "image.json").unlink()
        with pytest.raises(Unavailable, match="is damaged, and in use"), open_root(str(layout.path), cache=cache):
            pass


def test_nothing_is_held_after_an_error(layout: Layout, cache: Path) -> None:
    layout.add_image([hard_link("a", "none")])
    before = os.listdir("/proc/self/fd")
    for name in (str(layout.path), f"{layout.path}:none", str(layout.path / "none")):
        with pytest.raises(KatapyError), open_root(name, cache=cache):
            pass
    assert os.listdir("/proc/self/fd") == before
    with (cache / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


# Beside other tools


@pytest.fixture(scope="module")
def image() -> Iterator[tuple[str, Path]]:
    """An image of several layers that buildah has made, and where buildah shows its files."""

    def buildah(*args: str) -> str:
        return subprocess.run(["buildah", *args], check=True, capture_output=True, text=True).stdout.strip()

    name = f"localhost/katapy-test-{os.getpid()}"
    container = buildah("from", "scratch")
    containers = [container]
    try:
        mount = Path(buildah("mount", container))
        _first_layer(mount)
        buildah("config", "--cmd", '["/bin/sh"]', "--env", "GREETING=hello", "--user", "1000:100", container)
        buildah("commit", "--quiet", container, f"{name}:base")
        derived = buildah("from", f"{name}:base")
        containers.append(derived)
        _second_layer(Path(buildah("mount", derived)))
        buildah("commit", "--quiet", derived, f"{name}:final")
        shown = buildah("from", f"{name}:final")
        containers.append(shown)
        yield f"{name}:final", Path(buildah("mount", shown))
    finally:
        for each in reversed(containers):
            buildah("rm", each)
        for tag in ("final", "base"):
            subprocess.run(["buildah", "rmi", "--force", f"{name}:{tag}"], check=False, capture_output=True)


def _first_layer(mount: Path) -> None:
    (mount / "bin").mkdir()
    subprocess.run(["cp", "/bin/busybox", str(mount / "bin/busybox")], check=True)
    for name in ("sh", "ls", "cat"):
        (mount / "bin" / name).symlink_to("busybox")
    os.link(mount / "bin/busybox", mount / "bin/linked")
    (mount / "bin/busybox").chmod(0o4755)
    (mount / "tmp").mkdir()
    (mount / "tmp").chmod(0o1777)
    for name in ("gone", "replaced", "opaque"):
        (mount / "etc" / name).mkdir(parents=True)
        (mount / "etc" / name / "old").write_text("old")
    (mount / "etc/capable").write_text("x")
    os.setxattr(mount / "etc/capable", "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
    os.setxattr(mount / "etc/capable", "user.note", b"a note")
    os.mkfifo(mount / "etc/fifo", 0o600)
    os.chown(mount / "etc/capable", 1000, 100)
    Path(os.fsdecode(os.fsencode(mount) + b"/etc/\xff\xfe name")).write_text("no text")
    (mount / ("deep/" * 30)).mkdir(parents=True)


def _second_layer(mount: Path) -> None:
    subprocess.run(["rm", "-r", *(str(mount / "etc" / name) for name in ("gone", "replaced", "opaque"))], check=True)
    (mount / "etc/replaced").symlink_to("/etc/passwd")
    (mount / "etc/opaque").mkdir(mode=0o700)
    (mount / "etc/opaque/new").write_text("new")
    os.utime(mount / "etc/opaque", (1_000_000_000, 1_000_000_000))
    (mount / "bin/cat").unlink()
    (mount / "bin/linked").write_bytes(b"no longer linked")


def described(root: Path) -> dict[bytes, object]:
    """Return all that there is to say of every file of a tree."""
    top = os.fsencode(root)
    found: dict[bytes, object] = {}
    same: dict[tuple[int, int], set[bytes]] = {}
    for parent, directories, files in os.walk(top):
        for path in (parent, *(os.path.join(parent, name) for name in (*directories, *files))):
            status = os.lstat(path)
            # By inode: the count of links of an overlay's is that of the layer below.
            names = same.setdefault((status.st_dev, status.st_ino), set())
            names.add(os.path.relpath(path, top))
            kind = stat.S_IFMT(status.st_mode)
            content = None
            if kind == stat.S_IFREG:
                content = Path(os.fsdecode(path)).read_bytes()
            elif kind == stat.S_IFLNK:
                content = os.readlink(path)
            keys = () if kind == stat.S_IFLNK else os.listxattr(path, follow_symlinks=False)
            attributes = {key: os.getxattr(path, key) for key in keys if not key.startswith("trusted.")}
            facts = (status.st_mode, status.st_uid, status.st_gid, names, int(status.st_mtime), content, attributes)
            found[os.path.relpath(path, top)] = facts
    return found


@pytest.mark.parametrize("transport", ["oci", "oci-archive", "docker-archive"])
def test_an_image_of_buildahs_is_the_same_file_by_file(
    image: tuple[str, Path], transport: str, cache: Path, tmp_path: Path
) -> None:
    name, mount = image
    target = tmp_path / "pushed"
    tag = name if transport == "docker-archive" else "tag"
    subprocess.run(["buildah", "push", "--quiet", name, f"{transport}:{target}:{tag}"], check=True, capture_output=True)
    with open_root(f"{target}:{tag}", cache=cache) as root:
        expected, found = described(mount), described(root.path)
        assert found.keys() == expected.keys()
        # Whose the root itself is, and when it was made, the image does not say.
        for path in expected.keys() - {b"."}:
            assert found[path] == expected[path], path
        assert len(found) > 40
        assert (root.config.cmd, root.config.user) == (("/bin/sh",), "1000:100")
        assert "GREETING=hello" in root.config.env
        listed = subprocess.run(
            ["/usr/sbin/chroot", str(root.path), "/bin/ls", "/etc"], check=True, capture_output=True
        )
        assert b"opaque" in listed.stdout
