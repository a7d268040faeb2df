"""Who a user of an image is, by the image's own /etc/passwd and /etc/group (image-spec v1.1, config.md, "User").

Whoever made the image is not trusted: its files are looked up as if its root were ``/``, are
bounded, and are not waited for.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from katapy import linux
from katapy.errors import InvalidArgument, NotFound
from katapy.jsonfile import shown

_ID: Final = re.compile(r"[0-9]{1,10}", re.ASCII)
_ID_MAX: Final = (1 << 32) - 2
_FILE_MAX: Final = 1 << 20
# As many as the kernel takes for one process (NGROUPS_MAX).
_GROUPS_MAX: Final = 65536
_RESOLVE: Final = linux.RESOLVE_IN_ROOT | linux.RESOLVE_NO_MAGICLINKS


@dataclass(frozen=True)
class UserIds:
    """A user in numbers; ``home`` is / for one whom the image does not know."""

    uid: int
    gid: int
    additional_gids: tuple[int, ...]
    home: str


def find_user(root: Path, user: str) -> UserIds:
    """Return who ``user`` is in the image's ``root``: USER[:GROUP], each a name or a number; empty is root.

    Without a group it is the one of /etc/passwd, with the others of /etc/group. Raises NotFound for a name that the
    image does not know, InvalidArgument for a number that is none and for files that make no sense.
    """
    name, colon, group = (user or "0").partition(":")
    if not name or (colon and not group):
        raise InvalidArgument(f"user {shown(user)} is not USER[:GROUP]")
    uid = _number(name)
    entry = next((one for one in _entries(root, "etc/passwd", 7) if _is(one, name, uid)), None)
    if entry is None and uid is None:
        raise NotFound(f"user {shown(name)} is not in the image's /etc/passwd")
    known = entry or [name, "", name, "0", "", "/", ""]
    ids = (_file_number(known[2], "passwd"), _file_number(known[3], "passwd"))
    home = known[5] if known[5].startswith("/") else "/"
    if group:
        return UserIds(ids[0], _find_group(root, group), (), home)
    others = [
        _file_number(one[2], "group")
        for one in _entries(root, "etc/group", 4)
        if entry is not None and entry[0] in one[3].split(",")
    ]
    if len(others) > _GROUPS_MAX:
        raise InvalidArgument(f"user {shown(user)} is in more than {_GROUPS_MAX} groups of the image's /etc/group")
    return UserIds(*ids, tuple(gid for gid in dict.fromkeys(others) if gid != ids[1]), home)


def _find_group(root: Path, group: str) -> int:
    gid = _number(group)
    if gid is not None:
        return gid
    entry = next((one for one in _entries(root, "etc/group", 4) if one[0] == group), None)
    if entry is None:
        raise NotFound(f"group {shown(group)} is not in the image's /etc/group")
    return _file_number(entry[2], "group")


def _is(entry: list[str], name: str, uid: int | None) -> bool:
    return entry[0] == name if uid is None else entry[2] == str(uid)


def _number(text: str) -> int | None:
    """Return the id that a text is, None where it is a name."""
    if not _ID.fullmatch(text):
        return None
    if int(text) > _ID_MAX:
        raise InvalidArgument(f"{text} is not between 0 and {_ID_MAX}")
    return int(text)


def _file_number(text: str, file: str) -> int:
    number = _number(text)
    if number is None:
        raise InvalidArgument(f"the image's /etc/{file}: {shown(text)} is no id")
    return number


def _entries(root: Path, path: str, fields: int) -> Iterator[list[str]]:
    """Yield the lines of a file of the image as their fields; those that have another number of fields are none."""
    for line in _read(root, path).decode(errors="surrogateescape").split("\n"):
        entry = line.split(":")
        if len(entry) == fields and entry[0]:
            yield entry


def _read(root: Path, path: str) -> bytes:
    root_fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = linux.openat2(root_fd, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY, resolve=_RESOLVE)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return b""
        raise InvalidArgument(f"the image's /{path} cannot be opened: {(error.strerror or '').lower()}") from error
    finally:
        os.close(root_fd)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidArgument(f"the image's /{path} is not a regular file")
        with os.fdopen(fd, "rb", closefd=False) as file:
            data = file.read(_FILE_MAX + 1)
    finally:
        os.close(fd)
    if len(data) > _FILE_MAX:
        raise InvalidArgument(f"the image's /{path} is larger than {_FILE_MAX} bytes")
    return data
