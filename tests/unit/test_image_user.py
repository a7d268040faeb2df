"""Users of an image by name and by number, and files of the image that are a trap."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from katapy.errors import InvalidArgument, KatapyError, NotFound
from katapy.storage.image_user import UserIds, find_user

PASSWD = """root:x:0:0:root:/root:/bin/sh
# a comment
www:x:33:34:www:/srv/www:/bin/false
odd:x:7:7::nowhere:
broken:x:
none:x:what:0::/:
"""
GROUP = "root:x:0:\nwww:x:34:www\nusers:x:100:other,www,odd\nstaff:x:50:www\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/passwd").write_text(PASSWD)
    (root / "etc/group").write_text(GROUP)
    return root


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", UserIds(0, 0, (), "/root")),
        ("root", UserIds(0, 0, (), "/root")),
        ("www", UserIds(33, 34, (100, 50), "/srv/www")),
        ("33", UserIds(33, 34, (100, 50), "/srv/www")),
        ("www:users", UserIds(33, 100, (), "/srv/www")),
        ("www:0", UserIds(33, 0, (), "/srv/www")),
        ("1000", UserIds(1000, 0, (), "/")),
        ("1000:1001", UserIds(1000, 1001, (), "/")),
        ("4294967294:4294967294", UserIds(4294967294, 4294967294, (), "/")),
        ("odd", UserIds(7, 7, (100,), "/")),
    ],
)
def test_users(root: Path, user: str, expected: UserIds) -> None:
    assert find_user(root, user) == expected


@pytest.mark.parametrize(
    ("user", "error", "problem"),
    [
        ("nobody", NotFound, "user 'nobody' is not in the image's /etc/passwd"),
        ("broken", NotFound, "user 'broken' is not"),
        ("www:wheel", NotFound, "group 'wheel' is not in the image's /etc/group"),
        ("none", InvalidArgument, "/etc/passwd: 'what' is no id"),
        ("4294967295", InvalidArgument, "is not between 0 and 4294967294"),
        ("0:4294967295", InvalidArgument, "is not between"),
        ("-1", NotFound, "user '-1' is not"),
        (":", InvalidArgument, r"is not USER\[:GROUP\]"),
        ("www:", InvalidArgument, r"is not USER\[:GROUP\]"),
        (":users", InvalidArgument, r"is not USER\[:GROUP\]"),
    ],
)
def test_users_that_there_are_not(root: Path, user: str, error: type[KatapyError], problem: str) -> None:
    with pytest.raises(error, match=problem):
        find_user(root, user)


def test_an_image_without_users(tmp_path: Path) -> None:
    assert find_user(tmp_path, "") == UserIds(0, 0, (), "/")
    with pytest.raises(NotFound):
        find_user(tmp_path, "root")


def test_links_of_the_image_are_followed_inside(root: Path, tmp_path: Path) -> None:
    """An absolute link is one of the image's, and none leads to the host's users."""
    (tmp_path / "passwd").write_text("host:x:5:5::/:\n")
    (root / "etc/passwd").rename(root / "users")
    for target in ("/users", "../../../users"):
        (root / "etc/passwd").unlink(missing_ok=True)
        (root / "etc/passwd").symlink_to(target)
        assert find_user(root, "www").uid == 33
    for target in (str(tmp_path / "passwd"), "../../passwd"):
        (root / "etc/passwd").unlink()
        (root / "etc/passwd").symlink_to(target)
        with pytest.raises(NotFound):
            find_user(root, "host")


@pytest.mark.parametrize("trap", ["fifo", "directory", "large", "loop"])
def test_a_trap_in_the_place_of_a_file(root: Path, trap: str) -> None:
    path = root / "etc/passwd"
    path.unlink()
    match trap:
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "large":
            path.write_text("\n" * (2 << 20))
        case _:
            path.symlink_to("passwd")
    with pytest.raises(InvalidArgument, match="the image's /etc/passwd"):
        find_user(root, "www")
