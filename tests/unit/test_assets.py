"""Images and kernels in a data directory: which one is booted, what damage is called, what a crash leaves."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from katapy.assets import guest, store
from katapy.assets.guest import KernelKind
from katapy.assets.root import Root, find_root, hold_root
from katapy.errors import InvalidArgument, NotFound, Unavailable


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def install_image(data: Path, content: bytes, *, created: float | None = None, inputs: str = "i") -> guest.Image:
    with store.lock(data), store.staging(data) as built:
        directory = built / "image"
        directory.mkdir()
        (directory / "root.erofs").write_bytes(content)
        (directory / "facts.json").write_text('{"packages": ["libc6_2.36_amd64"]}')
        image = store.install_image(data, directory, inputs=inputs)
    if created is not None:
        _edit(image.path.with_name("image.json"), created=created)
    return image


def install_kernel(data: Path, version: str, kind: KernelKind, *, created: float) -> guest.Kernel:
    with store.lock(data), store.staging(data) as built:
        directory = built / "kernel"
        directory.mkdir()
        if kind is KernelKind.TUNED:
            (directory / "vmlinux").write_bytes(b"elf")
        else:
            (directory / "vmlinuz").write_bytes(b"bzimage")
            (directory / "initramfs.cpio").write_bytes(b"cpio")
        (directory / "facts.json").write_text(json.dumps({"version": version}))
        kernel = store.install_kernel(data, directory, kind=kind, inputs="k")
    _edit(kernel.kernel.with_name("kernel.json"), created=created)
    return kernel


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_newest_image_is_booted(data: Path) -> None:
    install_image(data, b"old", created=1.0)
    new = install_image(data, b"new", created=3.0)
    install_image(data, b"middle", created=2.0)
    found = guest.find_image(data)
    assert (found.digest, found.path.read_bytes()) == (new.digest, b"new")


def test_an_image_is_named_by_its_content_and_found_by_a_prefix(data: Path) -> None:
    image = install_image(data, b"x")
    install_image(data, b"y")
    assert image.digest == "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"  # sha256sum of "x"
    assert guest.find_image(data, image.digest[:6]).path == image.path
    assert json.loads(image.path.with_name("image.json").read_text())["packages"] == ["libc6_2.36_amd64"]


@pytest.mark.parametrize("choice", ["", "2d7", "../x", "2D711642", "g" * 12])
def test_what_is_no_digest_is_refused(data: Path, choice: str) -> None:
    install_image(data, b"x")
    with pytest.raises(InvalidArgument, match="digits of its digest"):
        guest.find_image(data, choice)


def test_a_prefix_of_two_images_is_refused(data: Path) -> None:
    image = install_image(data, b"x")
    twin = image.path.parent.with_name(image.digest[:8] + "0" * 56)
    shutil.copytree(image.path.parent, twin)
    with pytest.raises(InvalidArgument, match="2 guest images start with"):
        store.remove_image(data, image.digest[:8])
    assert twin.exists()


def test_what_is_missing_says_how_to_get_it(data: Path) -> None:
    for find, how in (
        (lambda: guest.find_image(data), "katapy image build"),
        (lambda: guest.find_image(data, "0000"), "katapy image ls"),
        (lambda: guest.find_kernel(data), "katapy image build"),
        (lambda: find_root(data), "katapy image build"),
        (lambda: guest.find_kernel(data, "tuned"), "make guest-kernel"),
        (lambda: guest.find_kernel(data, "9.9.9-none"), "9.9.9-none"),
    ):
        with pytest.raises(NotFound, match=how):
            find()


def test_a_truncated_image_is_damaged_not_booted(data: Path) -> None:
    image = install_image(data, b"whole")
    image.path.write_bytes(b"who")
    with pytest.raises(Unavailable, match=r"root.erofs has 3 bytes, not 5.*katapy image build") as caught:
        guest.find_image(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"schema": 1}', '{"schema": 2}', '{"schema": 1, "files": {"root.erofs": "5"}}']
)
def test_json_that_makes_no_sense_is_damage(data: Path, text: str) -> None:
    image = install_image(data, b"whole")
    image.path.with_name("image.json").write_text(text)
    with pytest.raises(Unavailable, match=f"{image.digest[:12]}.* is damaged") as caught:
        guest.find_image(data)
    assert "\n" not in str(caught.value)


def test_a_kernel_without_its_initramfs_is_damaged(data: Path) -> None:
    kernel = install_kernel(data, "6.1.0-1-cloud-amd64", KernelKind.DEBIAN, created=1.0)
    assert kernel.initramfs is not None
    kernel.initramfs.unlink()
    with pytest.raises(Unavailable, match=r"cannot read initramfs.cpio"):
        guest.find_kernel(data)


def test_the_tuned_kernel_comes_first_and_any_can_be_named(data: Path) -> None:
    old = install_kernel(data, "6.1.0-1-cloud-amd64", KernelKind.DEBIAN, created=1.0)
    new = install_kernel(data, "6.1.0-2-cloud-amd64", KernelKind.DEBIAN, created=2.0)
    assert guest.find_kernel(data).version == new.version
    tuned = install_kernel(data, "6.1.9-katapy", KernelKind.TUNED, created=0.0)
    assert guest.find_kernel(data).version == tuned.version
    assert (tuned.kernel.name, tuned.initramfs) == ("vmlinux", None)
    assert guest.find_kernel(data, "debian").version == new.version
    assert guest.find_kernel(data, "tuned").version == tuned.version
    assert guest.find_kernel(data, old.version).kernel == old.kernel


@pytest.mark.parametrize("version", ["", "..", "../../etc", ".hidden", "a/b", "x" * 200, None, 6])
def test_a_version_that_is_no_file_name_is_not_installed(data: Path, version: object) -> None:
    with store.lock(data), store.staging(data) as built:
        (built / "facts.json").write_text(json.dumps({"version": version}))
        with pytest.raises(Unavailable, match="no usable version"):
            store.install_kernel(data, built, kind=KernelKind.DEBIAN, inputs="k")


def test_installing_again_mends_a_damaged_image(data: Path) -> None:
    image = install_image(data, b"whole")
    image.path.write_bytes(b"who")
    install_image(data, b"whole")
    assert guest.find_image(data).path.read_bytes() == b"whole"
    assert not list(data.glob(".build-*"))


def test_installing_again_leaves_no_moment_without_one(data: Path) -> None:
    """A pod that starts just then has a kernel."""
    install_kernel(data, "6.1.9-katapy", KernelKind.TUNED, created=1.0)
    missing, done = [], threading.Event()

    def look() -> None:
        while not done.is_set():
            try:
                os.stat(data / "kernel/6.1.9-katapy/vmlinux")
            except FileNotFoundError as error:
                missing.append(error)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(100):
            install_kernel(data, "6.1.9-katapy", KernelKind.TUNED, created=1.0)
    finally:
        done.set()
        looking.join()
    assert not missing
    assert not list(data.glob(".build-*"))


@pytest.mark.parametrize("known", [errno.EINVAL, errno.EIO])
def test_installing_again_where_names_cannot_be_exchanged(
    data: Path, monkeypatch: pytest.MonkeyPatch, known: int
) -> None:
    def exchange(*_: str) -> None:
        raise OSError(known, "cannot")

    image = install_image(data, b"whole")
    image.path.write_bytes(b"who")
    monkeypatch.setattr("katapy.linux.exchange", exchange)
    if known == errno.EINVAL:
        install_image(data, b"whole")
        assert guest.find_image(data).path.read_bytes() == b"whole"
    else:
        with pytest.raises(Unavailable, match="cannot install"):
            install_image(data, b"whole")
    assert not list(data.glob(".build-*"))


def test_a_build_that_fails_leaves_nothing(data: Path) -> None:
    def build() -> None:
        with store.lock(data), store.staging(data) as built:
            (built / "root.erofs").write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        build()
    assert [path.name for path in data.iterdir()] == ["lock"]


def test_the_next_build_removes_what_a_crash_left(data: Path) -> None:
    stale = data / ".build-crashed" / "image"
    stale.mkdir(parents=True)
    assert guest.list_images(data) == ([], [])
    with store.lock(data), store.staging(data) as built:
        assert not stale.exists()
        assert built.exists()


def test_only_one_holds_the_lock(data: Path) -> None:
    class Waited(Exception):
        pass

    def waiting() -> None:
        raise Waited

    with store.lock(data), pytest.raises(Waited), store.lock(data, waiting):
        pass
    with store.lock(data, waiting):
        pass


def test_removing_takes_damaged_ones_too(data: Path) -> None:
    image = install_image(data, b"whole")
    other = install_image(data, b"other")
    image.path.with_name("image.json").unlink()
    assert store.remove_image(data, image.digest[:12]) == image.digest
    assert [one.digest for one in guest.list_images(data)[0]] == [other.digest]
    install_kernel(data, "6.1.9-katapy", KernelKind.TUNED, created=0.0)
    (data / "cache" / "abc").mkdir(parents=True)
    assert store.remove_all(data) == [other.digest, "6.1.9-katapy"]
    assert sorted(path.name for path in data.rglob("*")) == ["image", "kernel", "lock"]


def install_root(data: Path, content: str) -> Root:
    with store.lock(data), store.staging(data) as built:
        program = built / "root/rootfs/usr/bin/python3"
        program.parent.mkdir(parents=True)
        program.write_text(content)
        (built / "root/facts.json").write_text('{"packages": []}')
        return store.install_root(data, built / "root", inputs="r")


def test_the_newest_root_is_used(data: Path) -> None:
    old, new = install_root(data, "1"), install_root(data, "2")
    assert old.digest != new.digest
    assert find_root(data) == new


def test_a_roots_digest_is_that_of_all_that_matters(data: Path) -> None:
    root = install_root(data, "1")
    program = root.path / "usr/bin/python3"
    for change in (
        lambda: program.chmod(0o4755),
        lambda: program.write_text("2"),
        lambda: program.rename(program.with_name("python")),
        lambda: (root.path / "empty").mkdir(),
        lambda: (root.path / "link").symlink_to("python"),
    ):
        before = store._tree_digest(root.path)
        change()
        assert store._tree_digest(root.path) != before


def test_a_root_that_is_used_is_not_removed(data: Path) -> None:
    used, unused = install_root(data, "1"), install_root(data, "2")
    _edit(used.path.with_name("root.json"), created=unused.created + 1)
    with hold_root(data) as held:
        assert held.digest == used.digest
        assert store.remove_all(data) == [unused.digest]
    assert store.remove_all(data) == [used.digest]
    assert not list((data / "root").iterdir())
