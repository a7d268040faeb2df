"""What a sandbox refuses before anything is started."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from katapy import InvalidArgument, InvalidState, NotStarted, Sandbox
from katapy.sdk.document import User
from katapy.sdk.sandbox import parse_user


@pytest.mark.parametrize(
    ("text", "user"), [("0", User(0, 0)), (1000, User(1000, 1000)), ("1000:100", User(1000, 100)), ("4294967294", None)]
)
def test_users(text: str | int, user: User | None) -> None:
    assert parse_user(text) == (user or User(4294967294, 4294967294))


@pytest.mark.parametrize(
    "text", ["", "root", "-1", "1:", ":1", "1:2:3", "4294967295", "1:4294967295", "1 ", "٣", True, 1.5]
)
def test_bad_users(text: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^user: "):
        parse_user(text)


@pytest.mark.parametrize(
    "options",
    [
        {"rootfs": "/", "image": "x"},
        {"memory": "1M"},
        {"timeout": 0},
        {"env": {"A=": ""}},
        {"env": {"A": "\0"}},
        {"env": {"": "x"}},
        {"env": {"A": 1}},
    ],
)
def test_bad_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        Sandbox(**options)


def test_one_that_is_not_started() -> None:
    """It has no id, and is closed as any other."""
    sandbox = Sandbox()
    with pytest.raises(InvalidState, match="not started"):
        _ = sandbox.id
    sandbox.close()
    sandbox.close()
    with pytest.raises(InvalidState, match="closed"):
        sandbox.run(["true"])


def test_a_host_that_lacks_something(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Is no OSError: nothing has run, and that can be told."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/var/lib/katapy/roots/x")

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr("katapy.sdk.root.open_root", full)
    expected = "^the sandbox could not start: No space left on device: /var/lib/katapy/roots/x$"
    with pytest.raises(NotStarted, match=expected):
        Sandbox(state_dir=tmp_path).open()


def test_options_that_there_are_not() -> None:
    options: dict[str, Any] = {"time_out": 3}
    with pytest.raises(InvalidArgument, match="there is no option 'time_out'"):
        Sandbox().run(["true"], **options)


def test_importing_is_light() -> None:
    """Neither gRPC nor protobuf, nor a client of the shim, is loaded for those who start nothing."""
    heavy = ("grpc", "google.protobuf", "asyncio", "katapy.client", "click")
    script = (
        f"import sys; from katapy import Sandbox; Sandbox(); print([each for each in {heavy} if each in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"
