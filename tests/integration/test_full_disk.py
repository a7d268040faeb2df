"""Removing what fills a disk, where not even an inode is left."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from katapy import templates
from katapy.assets.store import remove_image

pytestmark = pytest.mark.root


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=32", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def fill(disk: Path) -> None:
    def make_files() -> None:
        for number in count():
            (disk / f"file{number}").touch()

    with pytest.raises(OSError, match="No space left on device"):
        make_files()


def test_a_template_and_an_image_can_be_removed(disk: Path) -> None:
    key, digest = "5" * 64, "6" * 64
    for file in (disk / "templates" / key / "ram", disk / "image" / digest / "root.squashfs"):
        file.parent.mkdir(parents=True)
        file.touch()
    (disk / "lock").touch()
    fill(disk)
    assert remove_image(disk, digest) == digest
    fill(disk)
    assert templates.remove(disk / "templates", key) == key
    assert list((disk / "image").iterdir()) == list((disk / "templates").iterdir()) == []
    assert not list(disk.glob(".*"))
