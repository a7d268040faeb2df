"""Who holds a directory keeps others from removing it, and who comes too late learns it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from katapy.errors import NotFound
from katapy.held import claim, hold


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "directory"
    directory.mkdir()
    return directory


def test_what_is_held_cannot_be_claimed(directory: Path) -> None:
    with hold(directory), hold(directory), claim(directory) as free:
        assert not free
    with claim(directory) as free:
        assert free


def test_what_one_claims_nobody_else_does(directory: Path) -> None:
    with claim(directory) as first, claim(directory) as second:
        assert (first, second) == (True, False)


def test_who_waits_for_a_claim_learns_that_the_directory_is_gone(directory: Path) -> None:
    """Also where another one has its name by then."""
    outcome: list[object] = []

    def use() -> None:
        try:
            with hold(directory):
                outcome.append("held")
        except NotFound as error:
            outcome.append(error)

    with claim(directory) as free:
        assert free
        user = threading.Thread(target=use)
        user.start()
        _until_locked_by_two(directory)
        directory.rename(directory.with_name("trash"))
        directory.mkdir()
    user.join()
    assert len(outcome) == 1
    assert isinstance(outcome[0], NotFound)


def _until_locked_by_two(directory: Path) -> None:
    """Wait until somebody waits for the lock (proc(5), locks: a line with -> for each)."""
    inode = f":{directory.stat().st_ino} "
    while not any("->" in line and inode in line for line in Path("/proc/locks").read_text().splitlines()):
        pass


@pytest.mark.parametrize("what", ["nothing", "file", "link"])
def test_what_is_no_directory_is_not_found(directory: Path, what: str) -> None:
    path = directory / what
    if what == "file":
        path.touch()
    elif what == "link":
        path.symlink_to(directory)
    with pytest.raises(NotFound, match="no such directory"), hold(path):
        pass
    with claim(path) as free:
        assert not free
