"""The guest's own mounts: which disk is a container's root."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import cast

import pytest
from katapy_agent import storage
from katapy_agent.container import Services
from katapy_agent.errors import InvalidArgument, NotFound
from katapy_agent.sandbox import Sandbox
from katapy_agent.stdio import Streams


@pytest.fixture
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands for /sys/block. Of those in it, null and zero have nodes in /dev."""
    for name in ("null", "zero", "none"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(storage, "_BLOCK_DEVICES", tmp_path)
    return tmp_path


def test_a_disk_is_found_by_its_serial_number(devices: Path) -> None:
    """The image's disk has another one, and a device of another driver none."""
    (devices / "null/serial").write_text("root\n")
    (devices / "zero/serial").write_text("container-root\n")
    assert storage._find_disk("container-root") == Path("/dev/zero")


def test_a_disk_without_a_node_is_not_there_yet(devices: Path) -> None:
    (devices / "none/serial").write_text("container-root\n")
    with pytest.raises(NotFound, match="there is no disk 'container-root'"):
        storage._find_disk("container-root")


def test_a_flood_of_what_the_kernel_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of it is lost then, and the disk is there all the same."""

    class Flooded(socket.socket):
        def recv(self, *_: int) -> bytes:
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))

    asked: list[None] = []

    def mount_it() -> None:
        asked.append(None)
        if len(asked) < 4:
            raise NotFound("not yet")

    monkeypatch.setattr(socket, "socket", Flooded)
    storage._when_plugged(mount_it)
    assert len(asked) == 4


def test_what_has_no_disk_has_nothing_to_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "ROOTS", tmp_path)
    storage.release_root("c1")
    # What a mount that failed has left.
    (tmp_path / "c2/written").mkdir(parents=True)
    storage.release_root("c2")
    assert not list(tmp_path.iterdir())


async def test_a_create_that_fails_lets_go_of_what_it_has_mounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a container's removal did: a wrong command kept its root on the host busy until the pod's end."""
    released: list[str] = []
    monkeypatch.setattr(storage, "release", released.append)
    box = Sandbox(cast(Services, None))
    await box.create(hostname="", shared_tag="")
    with pytest.raises(InvalidArgument):
        await box.create_container("c1", b"{", Streams())
    assert released == ["c1"]
    with pytest.raises(NotFound):
        box.container("c1")
