"""Finding an image in a layout: by tag, by platform, in indexes, in archives; and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from oci_images import CONFIG, INDEX, LAYER, MANIFEST, Layout, member, tar

from katapy.errors import InvalidArgument, KatapyError, NotFound, Unsupported
from katapy.storage.image_config import ImageConfig, parse_image_config
from katapy.storage.image_layout import Image, find_image
from katapy.storage.image_source import open_source, split_reference
from katapy.storage.unpack import Limits

ARM = {"os": "linux", "architecture": "arm64"}
AMD = {"os": "linux", "architecture": "amd64"}
LAYERS = [tar([member("a")]), tar([member("b")])]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


def find(path: Path, tag: str | None = None, limits: Limits = Limits()) -> Image:  # noqa: B008 - frozen
    with open_source(path, limits, temporary=path.parent) as source:
        return find_image(source, "layout", tag, limits)


def test_the_only_image_needs_no_tag(layout: Layout) -> None:
    digest = layout.add(layout.manifest(LAYERS), "v1")
    for tag in (None, "v1"):
        image = find(layout.path, tag)
        assert image.digest == digest
        assert [layer.compression for layer in image.layers] == ["gzip", "gzip"]
        assert [layer.diff_id for layer in image.layers] == [
            f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in LAYERS
        ]
    with pytest.raises(NotFound, match=r"layout: no image 'v2' for linux/amd64; there is: 'v1'"):
        find(layout.path, "v2")


def test_a_tag_chooses_between_images(layout: Layout) -> None:
    digests = {
        tag: layout.add(layout.manifest(LAYERS, config={"config": {"Cmd": [tag]}}), tag)
        for tag in ("one", "docker.io/library/two:latest", "registry:5000/three:v3")
    }
    assert find(layout.path, "one").digest == digests["one"]
    for tag in ("docker.io/library/two:latest", "library/two:latest", "two:latest", "latest"):
        assert find(layout.path, tag).digest == digests["docker.io/library/two:latest"]
    for unclear in (None, "hree:v3"):
        with pytest.raises(
            KatapyError, match=r"there is: 'one', 'docker.io/library/two:latest', 'registry:5000/three:v3'"
        ):
            find(layout.path, unclear)


def test_two_names_of_one_image_are_one(layout: Layout) -> None:
    manifest = layout.manifest(LAYERS)
    for tag in ("a", "b"):
        layout.add(manifest, tag)
    assert find(layout.path).digest == manifest["digest"]


def test_two_images_of_one_name_are_refused(layout: Layout) -> None:
    for command in "ab":
        layout.add(layout.manifest(LAYERS, config={"config": {"Cmd": [command]}}), "tag")
    with pytest.raises(InvalidArgument, match="2 images of that name or of none"):
        find(layout.path, "tag")


def test_the_platform_is_chosen_in_nested_indexes(layout: Layout) -> None:
    mine = layout.manifest(LAYERS, platform=AMD)
    other = layout.manifest(LAYERS, platform=ARM, config=ARM)
    attestation = layout.blob({"schemaVersion": 2}, MANIFEST, platform={"os": "unknown", "architecture": "unknown"})
    inner = layout.blob({"schemaVersion": 2, "manifests": [other, mine, attestation]}, INDEX)
    outer = layout.blob({"schemaVersion": 2, "manifests": [inner]}, INDEX)
    layout.add(outer, "multi")
    layout.add(layout.blob({"schemaVersion": 2, "manifests": [other]}, INDEX), "arm")
    assert find(layout.path, "multi").digest == mine["digest"]
    with pytest.raises(NotFound, match="no image for linux/amd64"):
        find(layout.path, "arm")


def test_indexes_in_indexes_end_somewhere(layout: Layout) -> None:
    descriptor = layout.manifest(LAYERS)
    for _ in range(6):
        descriptor = layout.blob({"schemaVersion": 2, "manifests": [descriptor]}, INDEX)
    layout.add(descriptor)
    with pytest.raises(InvalidArgument, match="indexes in indexes"):
        find(layout.path)


def test_sha512(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout", "sha512")
    digest = layout.add(layout.manifest(LAYERS))
    assert digest.startswith("sha512:")
    assert find(layout.path).digest == digest


@pytest.mark.parametrize("zipped", [False, True])
def test_an_archive_is_read_like_a_directory(layout: Layout, tmp_path: Path, zipped: bool) -> None:
    digest = layout.add(layout.manifest(LAYERS), "v1")
    archive = layout.archive(tmp_path / "image.tar")
    if zipped:
        archive.write_bytes(gzip.compress(archive.read_bytes()))
    assert find(archive, "v1").digest == digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.tar", "layout"]


def test_an_archive_of_which_the_names_begin_with_dots(layout: Layout, tmp_path: Path) -> None:
    """As `tar --create .` writes them."""
    digest = layout.add(layout.manifest(LAYERS), "v1")
    with tarfile.open(tmp_path / "image.tar", "w") as archive:
        archive.add(layout.path, ".")
    assert find(tmp_path / "image.tar").digest == digest


@pytest.mark.parametrize(("magic", "name"), [(b"BZh91", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstd")])
def test_archives_of_other_compressions_are_named(tmp_path: Path, magic: bytes, name: str) -> None:
    (tmp_path / "image.tar").write_bytes(magic + bytes(1000))
    with pytest.raises(Unsupported, match=f"compressed with {name}, which katapy does not read"):
        find(tmp_path / "image.tar")


def test_a_zipped_archive_that_is_a_bomb_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image.tar").write_bytes(gzip.compress(bytes(10 << 20)))
    with pytest.raises(InvalidArgument, match="larger than 1048576 bytes"):
        find(tmp_path / "image.tar", limits=Limits(total_bytes=1 << 20))
    with pytest.raises(InvalidArgument, match="100 times as large as compressed"):
        find(tmp_path / "image.tar", limits=Limits(ratio=100, ratio_from_bytes=1 << 20))
    assert [path.name for path in tmp_path.iterdir()] == ["image.tar"]


def test_an_archive_of_too_many_or_too_long_names_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image.tar").write_bytes(tar([member("a")] * 20_001))
    with pytest.raises(InvalidArgument, match="more than 20000 members"):
        find(tmp_path / "image.tar")
    (tmp_path / "image.tar").write_bytes(tar([member("a" * 5000)]))
    with pytest.raises(InvalidArgument, match="a name of 5000 bytes"):
        find(tmp_path / "image.tar")


@pytest.mark.parametrize("content", [b"", b"no archive", bytes(10240)])
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "image.tar").write_bytes(content)
    with pytest.raises(InvalidArgument, match=r"not a usable tar archive|neither an OCI image layout nor what docker"):
        find(tmp_path / "image.tar")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(InvalidArgument, match="neither a directory nor an archive"):
        find(tmp_path / "fifo")
    with pytest.raises(NotFound, match="no such image layout"):
        find(tmp_path / "none")
    with pytest.raises(InvalidArgument, match="neither an OCI image layout nor what docker saves"):
        find(tmp_path)


# Damage


def _damage(layout: Layout, descriptor: dict[str, Any], content: bytes) -> None:
    (layout.path / "blobs" / descriptor["digest"].replace(":", "/")).write_bytes(content)


def test_documents_are_verified_before_they_are_believed(layout: Layout) -> None:
    manifest = layout.manifest(LAYERS)
    layout.add(manifest)
    path = layout.path / "blobs" / manifest["digest"].replace(":", "/")
    original = path.read_bytes()
    for content, problem in (
        (original.replace(b"2", b"3", 1), "is damaged: its sha256 is"),
        (original[:-1], f"has {len(original) - 1} bytes, not {len(original)}"),
        (original + b" ", f"larger than the {len(original)} bytes"),
    ):
        path.write_bytes(content)
        with pytest.raises(InvalidArgument, match=problem):
            find(layout.path)
    path.unlink()
    with pytest.raises(NotFound, match="no such file"):
        find(layout.path)


@pytest.mark.parametrize("kind", ["fifo", "directory", "link out", "link in"])
def test_a_blob_is_a_file_of_the_layout(layout: Layout, tmp_path: Path, kind: str) -> None:
    """A layout may come from anybody: a link in it must not make katapy read elsewhere, nor a FIFO wait."""
    manifest = layout.manifest(LAYERS)
    layout.add(manifest)
    path = layout.path / "blobs" / manifest["digest"].replace(":", "/")
    elsewhere = tmp_path / "elsewhere" if kind == "link out" else layout.path / "elsewhere"
    path.rename(elsewhere)
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case _:
            path.symlink_to(os.path.relpath(elsewhere, path.parent))
    if kind == "link in":
        assert find(layout.path).digest == manifest["digest"]
    else:
        before = os.listdir("/proc/self/fd")
        with pytest.raises(InvalidArgument, match=r"not a regular file|cannot be opened"):
            find(layout.path)
        assert os.listdir("/proc/self/fd") == before


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        (lambda manifest: manifest.update(schemaVersion=1), Unsupported, "another version than 2"),
        (
            lambda manifest: manifest["config"].update(mediaType="application/x.helm"),
            Unsupported,
            "not an image to run",
        ),
        (lambda manifest: manifest["config"].update(digest="md5:" + "0" * 32), InvalidArgument, "a digest by sha256"),
        (lambda manifest: manifest["config"].update(digest="sha256:../../../x"), InvalidArgument, "a digest by sha256"),
        (lambda manifest: manifest["config"].update(size=-1), InvalidArgument, "config.size"),
        (lambda manifest: manifest["config"].update(size=4 << 20), InvalidArgument, "larger than 3145728 bytes"),
        (lambda manifest: manifest["layers"].pop(), InvalidArgument, "1 layers, and 2 in the configuration"),
        (
            lambda manifest: manifest["layers"].extend(manifest["layers"] * 300),
            InvalidArgument,
            "more than 500 elements",
        ),
        (
            lambda manifest: manifest["layers"][1].update(mediaType=f"{LAYER}+zstd"),
            Unsupported,
            "zstd, which katapy does",
        ),
        (
            lambda manifest: manifest["layers"][0].update(mediaType="text/plain"),
            Unsupported,
            "'text/plain' is not a layer",
        ),
        (lambda manifest: manifest["layers"][0].update(digest="../a"), InvalidArgument, r"layers\[0\].digest"),
        (lambda manifest: manifest.pop("layers"), InvalidArgument, "layers: is missing"),
    ],
)
def test_manifests_that_make_no_sense(layout: Layout, change: Change, error: type[KatapyError], problem: str) -> None:
    good = layout.manifest(LAYERS)
    manifest = json.loads((layout.path / "blobs" / good["digest"].replace(":", "/")).read_bytes())
    change(manifest)
    layout.add(layout.blob(manifest, MANIFEST))
    with pytest.raises(error, match=problem) as caught:
        find(layout.path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["oci-layout", "index.json"])
@pytest.mark.parametrize("content", ["", "[]", "{}", '{"imageLayoutVersion": "2.0.0"}', "x" * (4 << 20)])
def test_files_of_a_layout_that_make_no_sense(layout: Layout, name: str, content: str) -> None:
    layout.add(layout.manifest(LAYERS))
    (layout.path / name).write_text(content)
    with pytest.raises(InvalidArgument, match=name):
        find(layout.path)


# What docker saves


def save(path: Path, *names: str, config: dict[str, Any] | None = None, link: bool = False) -> str:
    """Write what `docker save` does, and return the digest of the configuration."""
    document = {**AMD, "rootfs": {"type": "layers", "diff_ids": [_sha256(layer) for layer in LAYERS]}, **(config or {})}
    data = json.dumps(document).encode()
    members = [member("config.json", data), *(member(f"{n}/layer.tar", layer) for n, layer in enumerate(LAYERS))]
    if link:
        members[-1] = member("1/layer.tar", type=tarfile.SYMTYPE, linkname="../0/layer.tar")
    manifest = [{"Config": "config.json", "RepoTags": list(names) or None, "Layers": ["0/layer.tar", "1/layer.tar"]}]
    path.write_bytes(tar([*members, member("manifest.json", json.dumps(manifest).encode())]))
    return _sha256(data)


def _sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def test_what_docker_saves(tmp_path: Path) -> None:
    archive = tmp_path / "saved.tar"
    digest = save(archive, "hello:latest", "hello:v1")
    for tag in (None, "hello:latest", "latest", "v1"):
        image = find(archive, tag)
        assert image.digest == digest
        assert [(layer.name, layer.compression) for layer in image.layers] == [
            ("0/layer.tar", None),
            ("1/layer.tar", None),
        ]
    with pytest.raises(NotFound, match="no image 'v2' for linux/amd64; there is: 'hello:latest', 'hello:v1'"):
        find(archive, "v2")
    save(archive)
    assert find(archive).digest == digest


def test_a_layer_that_docker_links_to(tmp_path: Path) -> None:
    save(tmp_path / "saved.tar", link=True)
    with (
        open_source(tmp_path / "saved.tar", Limits(), temporary=tmp_path) as source,
        source.open("1/layer.tar") as file,
    ):
        assert file.read() == LAYERS[0]


# References and configurations


def test_references(tmp_path: Path) -> None:
    (tmp_path / "layout").mkdir()
    (tmp_path / "with:colon").mkdir()
    for reference, expected in (
        ("layout", ("layout", None)),
        ("layout:", ("layout", None)),
        ("layout:v1", ("layout", "v1")),
        ("layout:docker.io/a:v1", ("layout", "docker.io/a:v1")),
        ("with:colon", ("with:colon", None)),
        ("with:colon:v1", ("with:colon", "v1")),
    ):
        assert split_reference(f"{tmp_path}/{reference}") == (tmp_path / expected[0], expected[1])
    for reference in ("", ":", "none", "none:v1", "a\0b", "x" * 5000):
        with pytest.raises(NotFound, match="no such image layout"):
            split_reference(reference)


GOOD = {**AMD, "rootfs": {"type": "layers", "diff_ids": []}}


def parse(document: object) -> ImageConfig:
    return parse_image_config(json.dumps(document).encode(), what="config")


def test_a_configuration() -> None:
    assert parse(
        {
            **GOOD,
            "created": "2026-01-01T00:00:00Z",
            "config": {
                "Entrypoint": ["/entry"],
                "Cmd": ["a", ""],
                "Env": ["PATH=/bin", "EMPTY="],
                "WorkingDir": "/srv",
                "User": "www:users",
                "ExposedPorts": {"80/tcp": {}},
            },
        }
    ) == ImageConfig(("/entry",), ("a", ""), ("PATH=/bin", "EMPTY="), "/srv", "www:users", ())
    assert parse({**GOOD, "config": {"Cmd": ["x"], "Entrypoint": ["e"]}}).args == ("e", "x")


@pytest.mark.parametrize("config", [{}, {"config": None}, {"config": {"Cmd": None, "WorkingDir": "", "User": ""}}])
def test_a_configuration_that_says_nothing(config: dict[str, object]) -> None:
    assert parse({**GOOD, **config}) == ImageConfig((), (), (), "/", "", ())


@pytest.mark.parametrize(
    ("change", "error", "problem"),
    [
        ({"architecture": "arm64"}, Unsupported, "linux/arm64"),
        ({"os": "windows"}, Unsupported, "windows/amd64"),
        ({"os": None}, InvalidArgument, "os: is missing"),
        ({"rootfs": None}, InvalidArgument, "rootfs"),
        ({"rootfs": {"type": "other", "diff_ids": []}}, InvalidArgument, "rootfs.type"),
        ({"rootfs": {"type": "layers", "diff_ids": ["x"]}}, InvalidArgument, r"rootfs.diff_ids\[0\]"),
        ({"config": []}, InvalidArgument, "config: expected an object"),
        ({"config": {"Cmd": "sh"}}, InvalidArgument, "config.Cmd: expected an array"),
        ({"config": {"Env": ["A"]}}, InvalidArgument, "'A' is not KEY=VALUE"),
        ({"config": {"Env": ["=A"]}}, InvalidArgument, "'=A' is not KEY=VALUE"),
        ({"config": {"WorkingDir": "srv"}}, InvalidArgument, "'srv' is not an absolute path"),
        ({"config": {"WorkingDir": "/a/../b"}}, InvalidArgument, "contains '..'"),
        ({"config": {"User": "a b"}}, InvalidArgument, "'a b' is not a user"),
        ({"config": {"User": 0}}, InvalidArgument, "config.User: expected a string"),
        ({"config": {"Cmd": ["a\0b"]}}, InvalidArgument, "NUL"),
    ],
)
def test_configurations_that_make_no_sense(change: dict[str, object], error: type[KatapyError], problem: str) -> None:
    with pytest.raises(error, match=f"config: .*{problem}"):
        parse({**GOOD, **change})


def test_the_configuration_of_another_platform_is_refused(layout: Layout) -> None:
    """Descriptors that name none: only the configuration says it."""
    layout.add(layout.manifest(LAYERS, config=ARM))
    with pytest.raises(Unsupported, match="an image for 'linux/arm64'"):
        find(layout.path)


def test_the_configuration_is_verified(layout: Layout) -> None:
    config = layout.blob({**GOOD}, CONFIG)
    layout.add(layout.blob({"schemaVersion": 2, "config": config, "layers": []}, MANIFEST))
    assert find(layout.path).layers == ()
    _damage(layout, config, json.dumps({**GOOD, "os": "linuX"}).encode())
    with pytest.raises(InvalidArgument, match="is damaged"):
        find(layout.path)
