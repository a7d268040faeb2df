"""virtiofsd's arguments, word for word, for both daemons; and which one is taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from katapy.errors import NotFound, Unavailable
from katapy.storage.virtiofs import command, find_virtiofsd

C_DAEMON = Path("/usr/lib/qemu/virtiofsd")
RUST_DAEMON = Path("/usr/libexec/virtiofsd")
SOURCE = Path("/run/katapy/c1/staging/ro")


def test_the_c_daemon() -> None:
    options = "source=/run/katapy/c1/staging/ro,sandbox=namespace,cache=auto,announce_submounts,modcaps=-mknod"
    assert command(C_DAEMON, SOURCE, 7) == [
        *("/usr/lib/qemu/virtiofsd", "--fd=7", "-f"),
        *("-o", options),
        *("-o", "log_level=err"),
    ]


def test_the_rust_daemon() -> None:
    assert command(RUST_DAEMON, SOURCE, 7) == [
        "/usr/libexec/virtiofsd",
        "--fd=7",
        "--shared-dir=/run/katapy/c1/staging/ro",
        "--sandbox=namespace",
        "--cache=auto",
        "--announce-submounts",
        "--modcaps=-mknod",
        "--log-level=error",
    ]


@pytest.mark.parametrize("program", [C_DAEMON, RUST_DAEMON])
def test_each_is_confined_to_the_tree(program: Path) -> None:
    """Without its namespace the daemon would have the host's root: sandbox=none must never slip in."""
    words = {word for argument in command(program, SOURCE, 7) for word in argument.lstrip("-").split(",")}
    assert [word for word in words if word.startswith("sandbox")] == ["sandbox=namespace"]
    assert "modcaps=-mknod" in words


def test_no_path_can_add_an_option() -> None:
    """The C daemon splits its options at commas and knows no quoting; the other takes any path."""
    path = Path("/run/a,sandbox=none")
    with pytest.raises(Unavailable, match=r"cannot share /run/a,sandbox=none: this virtiofsd takes no comma"):
        command(C_DAEMON, path, 7)
    assert "--shared-dir=/run/a,sandbox=none" in command(RUST_DAEMON, path, 7)


def test_the_first_that_can_be_executed_is_taken(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with pytest.raises(NotFound, match=r"virtiofsd is missing: \S+/first and \S+/second; apt-get install"):
        find_virtiofsd([first, second])
    second.touch(mode=0o755)
    assert find_virtiofsd([first, second]) == second
    first.touch(mode=0o755)
    assert find_virtiofsd(iter([first, second])) == first


def test_a_daemon_is_known_by_its_real_name(tmp_path: Path) -> None:
    """As Debian 13 has it: the C daemon's name is a symbolic link to the other."""
    real, link = tmp_path / "libexec/virtiofsd", tmp_path / "qemu/virtiofsd"
    for path in (real, link):
        path.parent.mkdir()
    real.touch(mode=0o755)
    link.symlink_to("../libexec/virtiofsd")
    found = find_virtiofsd([link])
    assert found == real
    assert f"--shared-dir={SOURCE}" in command(found, SOURCE, 7)
