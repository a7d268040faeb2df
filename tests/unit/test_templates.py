"""Templates on disk: found when they are whole, told when they are not, bounded, and gone at once when removed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from katapy import templates
from katapy.errors import InvalidArgument, NotFound, Unavailable

KEY = "ab" * 32
OTHER = "ac" * 32
RUNS = ((0, 4096), (8192, 12288))
SHAPE = {"vcpus": 1, "memory": 1 << 28}


def install(directory: Path, key: str = KEY, ram: bytes = b"memory" * 1000) -> templates.Template:
    staging = templates.prepare(directory, key)
    (staging / templates.RAM).write_bytes(ram)
    (staging / templates.STATE).write_bytes(b"devices")
    return templates.install(directory, key, shape=SHAPE, runs=RUNS)


def flip(path: Path) -> None:
    """Change one bit, and neither the size nor, as far as anybody can, the times."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_what_was_installed_is_found(tmp_path: Path) -> None:
    assert templates.find(tmp_path, KEY) is None
    install(tmp_path)
    found = templates.find(tmp_path, KEY)
    assert found is not None
    assert (found.key, found.shape, found.runs()) == (KEY, SHAPE, RUNS)
    assert (found.directory / templates.RAM).read_bytes() == b"memory" * 1000


def test_only_its_owner_can_read_it(tmp_path: Path) -> None:
    """The memory of a VM is in it."""
    directory = install(tmp_path).directory
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in directory.iterdir()} == {0}


@pytest.mark.parametrize("name", [templates.RAM, templates.STATE, "map"])
def test_one_wrong_bit_is_found(tmp_path: Path, name: str) -> None:
    install(tmp_path)
    assert templates.find(tmp_path, KEY) is not None
    flip(tmp_path / KEY / name)
    with pytest.raises(Unavailable, match=f"template abababababab is damaged: {name} is not what was saved"):
        templates.find(tmp_path, KEY)


@pytest.mark.parametrize("name", [templates.RAM, templates.STATE, "map", "template.json"])
def test_a_missing_file_is_found(tmp_path: Path, name: str) -> None:
    install(tmp_path)
    (tmp_path / KEY / name).unlink()
    with pytest.raises(Unavailable, match="damaged"):
        templates.find(tmp_path, KEY)


def test_what_another_start_notes_meanwhile_is_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is renamed once it is written: a template was taken for damaged, and made again, as it was no longer there."""
    install(tmp_path)
    listed = Path.iterdir

    def list_early(path: Path) -> Iterator[Path]:
        yield from listed(path)
        yield path / "checked.4711"

    monkeypatch.setattr(Path, "iterdir", list_early)
    assert templates.find(tmp_path, KEY) is not None
    found, errors = templates.list_templates(tmp_path)
    assert ([template.key for template in found], errors) == ([KEY], [])


def test_one_that_lacks_a_file_is_listed_as_damaged(tmp_path: Path) -> None:
    install(tmp_path)
    (tmp_path / KEY / templates.RAM).unlink()
    found, errors = templates.list_templates(tmp_path)
    assert (found, [str(error) for error in errors]) == ([], ["template abababababab is damaged: files are missing"])


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": 2}', '{"schema": 1, "shape": 3, "created": 0}'])
def test_a_description_that_makes_no_sense_is_damage(tmp_path: Path, text: str) -> None:
    install(tmp_path)
    (tmp_path / KEY / "template.json").write_text(text)
    with pytest.raises(Unavailable, match="damaged"):
        templates.find(tmp_path, KEY)


def test_it_is_read_as_a_whole_once_in_a_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash of all of it takes as long as a restore does."""
    hashed: list[str] = []
    hash_file = templates._hash

    def note(path: Path) -> str:
        hashed.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(templates, "_hash", note)
    install(tmp_path)
    hashed.clear()
    templates.find(tmp_path, KEY)
    assert hashed == []
    boot_id = tmp_path / "boot_id"
    boot_id.write_text("another boot\n")
    monkeypatch.setattr(templates, "_BOOT_ID", boot_id)
    templates.find(tmp_path, KEY)
    assert sorted(hashed) == ["map", "ram", "state"]
    hashed.clear()
    templates.find(tmp_path, KEY)
    assert hashed == []


def test_verify_reads_it_in_any_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk may lose a bit without any inode that tells."""
    install(tmp_path)
    monkeypatch.setattr(templates, "_hash", lambda _path: "wrong")
    assert templates.find(tmp_path, KEY) is not None
    with pytest.raises(Unavailable, match="damaged"):
        templates.verify(tmp_path, KEY[:6])


def test_those_that_were_not_used_for_longest_make_room(tmp_path: Path) -> None:
    for number in range(4):
        install(tmp_path, f"{number:064x}")
        os.utime(tmp_path / f"{number:064x}", (1000 + number, 1000 + number))
    templates.find(tmp_path, f"{0:064x}")
    assert templates.prune(tmp_path, count=2, size_bytes=1 << 30) == [f"{1:064x}", f"{2:064x}"]
    assert [each.key for each in templates.list_templates(tmp_path)[0]] == [f"{0:064x}", f"{3:064x}"]
    assert templates.prune(tmp_path, count=2, size_bytes=1) == [f"{3:064x}"]
    assert templates.find(tmp_path, f"{0:064x}") is not None


def test_what_is_damaged_makes_room_first(tmp_path: Path) -> None:
    install(tmp_path)
    install(tmp_path, OTHER)
    (tmp_path / OTHER / "template.json").write_text("{}")
    assert templates.prune(tmp_path, count=2, size_bytes=1 << 30) == [OTHER]


def test_a_prefix_names_one(tmp_path: Path) -> None:
    install(tmp_path)
    install(tmp_path, OTHER)
    with pytest.raises(InvalidArgument, match="4 to 64 digits"):
        templates.remove(tmp_path, "a")
    with pytest.raises(NotFound, match="katapy template ls"):
        templates.remove(tmp_path, "ffff")
    assert templates.remove(tmp_path, "abab") == KEY
    assert [each.key for each in templates.list_templates(tmp_path)[0]] == [OTHER]


def test_two_that_start_alike_are_unclear(tmp_path: Path) -> None:
    install(tmp_path, "abab" + "0" * 60)
    install(tmp_path, "abab" + "1" * 60)
    with pytest.raises(InvalidArgument, match="2 templates start with abab"):
        templates.remove(tmp_path, "abab")


def test_removing_all_leaves_nothing(tmp_path: Path) -> None:
    install(tmp_path)
    (tmp_path / f"{KEY}.lock").touch()
    templates.prepare(tmp_path, OTHER)  # whose maker was killed
    assert templates.remove_all(tmp_path) == [KEY]
    assert list(tmp_path.iterdir()) == []


def test_a_new_one_takes_the_place_of_an_old_one(tmp_path: Path) -> None:
    install(tmp_path)
    assert install(tmp_path, ram=b"newer").directory == tmp_path / KEY
    assert (tmp_path / KEY / templates.RAM).read_bytes() == b"newer"
    assert [path.name for path in tmp_path.iterdir()] == [KEY]


def test_what_a_killed_maker_left_is_overwritten(tmp_path: Path) -> None:
    (templates.prepare(tmp_path, KEY) / templates.RAM).write_bytes(b"half of it")
    install(tmp_path)
    assert templates.find(tmp_path, KEY) is not None


def test_what_a_maker_gave_up_is_gone(tmp_path: Path) -> None:
    (templates.prepare(tmp_path, KEY) / templates.RAM).write_bytes(b"half of it")
    templates.abandon(tmp_path, KEY)
    assert list(tmp_path.iterdir()) == []


def test_one_on_a_read_only_file_system_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That its use could not be noted made the start of a pod fail."""
    install(tmp_path)

    def refuse(*_arguments: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "utime", refuse)
    found = templates.find(tmp_path, KEY)
    assert found is not None
    assert found.key == KEY
