"""The long ones: `make soak`."""

from __future__ import annotations

import pytest
from harness import Katapy, MakeBundle

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


def test_two_hundred_lives(katapy: Katapy, bundle: MakeBundle) -> None:
    """Create, start, exec, kill, delete with one id; the fixtures see that nothing has piled up."""
    directory = bundle(["sleep", "1000"])
    for _ in range(200):
        katapy.detach("create", "--bundle", directory, "c1")
        katapy("start", "c1", check=True)
        assert katapy("exec", "c1", "echo", "here").stdout == b"here\n"
        katapy("kill", "c1", "KILL", check=True)
        katapy("delete", "--force", "c1", check=True)
        assert katapy("list", "-q", check=True).stdout == b""
