"""Bundles on disk: what is found, and one line for each thing that is missing or not what it should be."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from katapy.errors import InvalidArgument, KatapyError, NotFound
from katapy.oci.bundle import load_bundle
from katapy.oci.default import default_spec


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A valid bundle whose path has everything in it that a command line could trip over."""
    directory = tmp_path / 'a b,c="d" é'
    (directory / "rootfs").mkdir(parents=True)
    write(directory, default_spec())
    return directory


def write(directory: Path, document: dict[str, Any]) -> None:
    (directory / "config.json").write_text(json.dumps(document))


def message_of(path: Path | str) -> str:
    with pytest.raises(KatapyError) as caught:
        load_bundle(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_valid_bundle(bundle: Path) -> None:
    loaded = load_bundle(str(bundle))
    assert loaded.path == str(bundle)
    assert loaded.rootfs == f"{bundle}/rootfs"
    assert loaded.spec.rootfs == loaded.rootfs


def test_a_relative_bundle_and_a_link_to_one(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bundle.parent / "link").symlink_to(bundle)
    monkeypatch.chdir(bundle.parent)
    assert load_bundle("link").path == str(bundle)


def test_no_bundle(tmp_path: Path) -> None:
    assert message_of(tmp_path / "gone") == f"bundle {tmp_path}/gone: no such directory"
    (tmp_path / "loop").symlink_to("loop")
    assert message_of(tmp_path / "loop") == f"bundle {tmp_path}/loop: too many levels of symbolic links"
    (tmp_path / "file").touch()
    assert message_of(tmp_path / "file") == f"bundle {tmp_path}/file: not a directory"
    assert message_of("a\0b") == "bundle 'a\\x00b': not a valid path"
    assert message_of("x" * 5000).endswith("(5000 characters): file name too long")


def test_no_config(tmp_path: Path) -> None:
    assert message_of(tmp_path) == f"{tmp_path}/config.json: no such file"
    os.mkfifo(tmp_path / "config.json")
    assert message_of(tmp_path) == f"{tmp_path}/config.json: not a regular file"


def test_a_config_of_100_megabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(100_000_000)
    assert message_of(tmp_path) == f"{tmp_path}/config.json: larger than 3145728 bytes"


def test_no_rootfs(tmp_path: Path) -> None:
    write(tmp_path, default_spec())
    assert message_of(tmp_path) == f"rootfs is missing or unusable: {tmp_path}/rootfs: no such directory"
    (tmp_path / "rootfs").touch()
    assert message_of(tmp_path) == f"rootfs is missing or unusable: {tmp_path}/rootfs: not a directory"


def test_a_relative_rootfs_stays_in_the_bundle(bundle: Path) -> None:
    (bundle / "rootfs").rmdir()
    (bundle / "rootfs").symlink_to("/")
    with pytest.raises(InvalidArgument, match=r"root\.path: rootfs leads out of the bundle$"):
        load_bundle(str(bundle))
    (bundle / "rootfs").unlink()
    (bundle / "real").mkdir()
    (bundle / "rootfs").symlink_to("real")
    assert load_bundle(str(bundle)).rootfs == f"{bundle}/real"
    write(bundle, {**default_spec(), "root": {"path": "."}})
    assert load_bundle(str(bundle)).rootfs == str(bundle)


def test_an_absolute_rootfs_may_be_anywhere(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    write(bundle, {**default_spec(), "root": {"path": f"{tmp_path}/elsewhere"}})
    assert load_bundle(str(bundle)).rootfs == f"{tmp_path}/elsewhere"


def test_mounts_inside_a_read_only_rootfs(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of nested ones only the outermost counts, files not at all; and a user namespace cannot have them."""
    rootfs = bundle / "rootfs"
    for name in ("a/in", "a-x", "b c"):
        (rootfs / name).mkdir(parents=True)
    (rootfs / "file").touch()
    points = [str(rootfs / name) for name in (".", "a", "a", "a/in", "a-x", "b c", "file", "gone")]
    monkeypatch.setattr("katapy.oci.bundle.mounts_below", lambda _path: points)
    assert [bind.destination for bind in load_bundle(str(bundle)).spec.bind_mounts] == ["/a", "/a-x", "/b c"]
    write(bundle, {**default_spec(), "root": {"path": "rootfs"}})
    assert load_bundle(str(bundle)).spec.bind_mounts == ()
    write(bundle, default_spec(rootless=True))
    assert message_of(bundle).endswith(
        "root.readonly: /a is a mount of its own, which is not supported in a user namespace"
    )


def test_a_missing_bind_source(tmp_path: Path) -> None:
    (tmp_path / "rootfs").mkdir()
    write(tmp_path, {**default_spec(), "mounts": [{"destination": "/d", "type": "bind", "source": "data"}]})
    with pytest.raises(NotFound, match=rf"config\.json: mounts\[0\]\.source: no such path: {tmp_path}/data$"):
        load_bundle(str(tmp_path))
    (tmp_path / "data").touch()
    assert load_bundle(str(tmp_path)).spec.bind_mounts[0].source == f"{tmp_path}/data"
