"""The process of `exec`: from a file, and from flags over the container's own."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from katapy.errors import InvalidArgument
from katapy.oci.process import Capabilities, ProcessSpec, User, parse_process

BASE = {
    "terminal": True,
    "consoleSize": {"height": 24, "width": 80},
    "user": {"uid": 5, "gid": 6, "additionalGids": [7]},
    "args": ["sh"],
    "env": ["PATH=/bin", "A=1"],
    "cwd": "/srv",
    "capabilities": {"bounding": ["CAP_KILL"], "permitted": ["CAP_KILL"]},
    "noNewPrivileges": True,
    "unknown": [1],
}


def base() -> ProcessSpec:
    return parse_process(json.dumps(BASE).encode(), what="process.json")


def sent(process: ProcessSpec) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(process.to_guest())
    return document


def test_a_process_file_goes_to_the_guest_as_it_is() -> None:
    assert sent(base()) == BASE
    assert base().user == User(5, 6, None, (7,))


def test_without_flags_only_command_and_terminal_change() -> None:
    process = base().with_exec_flags(["ls", "-l"])
    assert sent(process) == {**BASE, "args": ["ls", "-l"], "terminal": False}


def test_all_flags() -> None:
    process = base().with_exec_flags(
        ["id"],
        env=["A=2", "B=x=y"],
        cwd="/tmp",
        user="1000:1001",
        terminal=True,
        capabilities=["CAP_KILL", "CAP_CHOWN"],
        additional_gids=[8],
        no_new_privileges=False,
    )
    assert process.env == ("PATH=/bin", "A=2", "B=x=y")
    assert process.cwd == "/tmp"
    assert process.user == User(1000, 1001, None, (7, 8))
    assert process.terminal
    assert not process.no_new_privileges
    both = ("CAP_KILL", "CAP_CHOWN")
    assert process.capabilities == Capabilities(both, both, (), both, ())
    assert sent(process)["unknown"] == [1]
    assert base().env == ("PATH=/bin", "A=1")


def test_a_user_without_a_group_keeps_the_containers_group() -> None:
    assert base().with_exec_flags(["id"], user="0").user == User(0, 6, None, (7,))


@pytest.mark.parametrize("user", ["", "root", "1:", ":1", "-1", "1:2:3", "1\n", "\u0661", "1" * 12])
def test_users_are_numbers(user: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^exec: user '.*' is not uid\[:gid\], in numbers$"):
        base().with_exec_flags(["id"], user=user)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"args": []}, "exec: args: is empty"),
        ({"user": "4294967295"}, "exec: user.uid: 4294967295 is not between 0 and 4294967294"),
        ({"env": ["A"]}, "exec: env[1]: 'A' is not KEY=VALUE"),
        ({"cwd": "x"}, "exec: cwd: 'x' is not an absolute path"),
        ({"capabilities": ["ALL"]}, "exec: capabilities.bounding[1]: 'ALL' is not a capability (CAP_...)"),
        ({"args": ["a\0b"]}, "exec: args[0]: NUL in 'a\\x00b'"),
        ({"args": [os.fsdecode(b"\xff")]}, "exec: args[0]: lone surrogate in '\\udcff'"),
    ],
)
def test_wrong_flags(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        base().with_exec_flags(**{"args": ["id"], **flags})
    assert str(caught.value) == message


def test_a_wrong_file() -> None:
    with pytest.raises(InvalidArgument, match=r"^p\.json: args: is missing$"):
        parse_process(b'{"cwd": "/"}', what="p.json")
