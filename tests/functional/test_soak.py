"""The long ones: `make soak`."""

from __future__ import annotations

import pytest
from harness import Katapy, MakeBundle

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


def test_thirty_lives(katapy: Katapy, bundle: MakeBundle) -> None:
    """Run, exec, kill, delete, thirty times over with one id; the fixtures see that nothing has piled up."""
    directory = bundle(["sleep", "1000"])
    for _ in range(30):
        katapy.detach("run", "--detach", "--bundle", directory, "c1")
        assert katapy("exec", "c1", "echo", "here").stdout == b"here\n"
        katapy("kill", "c1", "KILL", check=True)
        katapy("delete", "--force", "c1", check=True)
        assert katapy("list", "-q", check=True).stdout == b""
