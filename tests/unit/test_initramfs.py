"""The initramfs: the cpio format, read back here as the kernel reads it, and the order of the drivers."""

from __future__ import annotations

from pathlib import Path

import initramfs
import pytest
from initramfs import Entry
from steps import BuildError


def unpack(archive: bytes) -> list[tuple[str, int, bytes]]:
    """Read a newc archive as init/initramfs.c of the kernel does: header, name, padding, data, padding."""
    found: list[tuple[str, int, bytes]] = []
    offset = 0
    while True:
        assert archive[offset : offset + 6] == b"070701"
        fields = [int(archive[offset + 6 + 8 * index :][:8], 16) for index in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        assert archive[offset + 110 + name_size - 1] == 0
        name = archive[offset + 110 : offset + 110 + name_size - 1].decode()
        offset = offset + 110 + name_size + 3 & ~3
        if name == "TRAILER!!!":
            assert offset == len(archive)
            return found
        found.append((name, mode, archive[offset : offset + size]))
        offset = offset + size + 3 & ~3


@pytest.mark.parametrize("size", range(5))
def test_names_and_data_of_any_length_are_aligned(size: int) -> None:
    entries = [Entry("d" * (size + 1), 0o040755), Entry("f" * (5 - size), 0o100644, b"x" * size)]
    assert unpack(initramfs.newc(entries)) == [tuple(entry) for entry in entries]


def make_modules(directory: Path, names: list[str]) -> Path:
    for name in names:
        path = directory / "kernel" / "drivers" / f"{name}.ko"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return directory


def test_drivers_are_loaded_in_the_order_of_their_dependencies(tmp_path: Path) -> None:
    """Debian calls the file of a module virtio_net or virtio-net; the order of loading is that of the names."""
    names = initramfs._MODULES.split()
    dashed = [name.replace("_", "-") if index % 2 else name for index, name in enumerate(names)]
    busybox = tmp_path / "busybox"
    busybox.write_bytes(b"elf")
    entries = unpack(initramfs.build(make_modules(tmp_path / "modules", dashed[::-1]), busybox))
    drivers = sorted(name for name, _, _ in entries if name.startswith("modules/"))
    assert [name.partition("-")[2] for name in drivers] == names
    programs = {name: (mode, data) for name, mode, data in entries}
    assert programs["bin/busybox"] == (0o100755, b"elf")
    assert programs["init"][1].startswith(b"#!/bin/busybox sh\n")


def test_a_missing_driver_is_named(tmp_path: Path) -> None:
    names = [name for name in initramfs._MODULES.split() if name != "virtiofs"]
    busybox = tmp_path / "busybox"
    busybox.write_bytes(b"elf")
    with pytest.raises(BuildError, match="no module virtiofs"):
        initramfs.build(make_modules(tmp_path / "modules", names), busybox)
