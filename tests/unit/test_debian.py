"""Which of the host's apt sources the guest image is made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import debian
import pytest
from steps import BuildError

TARGETS = """\
bookworm http://mirror.example/debian/ bookworm main
bookworm http://mirror.example/debian/ bookworm non-free
bookworm-security http://security.debian.org/debian-security/ bookworm-security main
bookworm-backports http://mirror.example/debian/ bookworm-backports main
trixie http://mirror.example/debian/ trixie main
bookworm http://mirror.example/debian/ bookworm main
"""


def test_main_of_the_release_and_its_updates_signed_by_debian(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "call", lambda argv: TARGETS)
    assert [line.split(" ", 2)[2] for line in debian.archives().splitlines()] == [
        "http://mirror.example/debian/ bookworm main",
        "http://security.debian.org/debian-security/ bookworm-security main",
    ]
    assert all("signed-by=/usr/share/keyrings/debian-archive" in line for line in debian.archives().splitlines())


def test_the_lists_are_fetched_once_where_apt_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def call(argv: Sequence[str]) -> str:
        calls.append(argv[1])
        return TARGETS if "update" in calls and argv[1] == "indextargets" else ""

    monkeypatch.setattr(debian, "call", call)
    assert "bookworm main" in debian.archives()
    assert calls == ["indextargets", "update", "indextargets"]


def test_a_host_of_another_release_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "call", lambda argv: "trixie http://mirror.example/debian/ trixie main\n")
    with pytest.raises(BuildError, match="no archive of Debian bookworm"):
        debian.archives()


def test_the_dependency_of_a_metapackage(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n"
    monkeypatch.setattr(debian, "call", lambda argv: listed)
    pattern = "linux-image-[0-9].*-cloud-amd64"
    assert debian.dependency("linux-image-cloud-amd64", pattern) == "linux-image-6.1.0-56-cloud-amd64"
    with pytest.raises(BuildError, match="apt knows no linux-image-cloud-amd64"):
        debian.dependency("linux-image-cloud-amd64", "linux-image-.*-rt-amd64")


class Apt:
    """Lists from before the archives got a new kernel, until they are fetched anew."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, argv: Sequence[str], *, cwd: Path = Path("/")) -> str:
        self.calls.append(argv[1])
        release = "6.1.0-56" if "update" in self.calls else "6.1.0-50"
        match argv[1]:
            case "depends":
                return f"linux-image-cloud-amd64\n  Depends: linux-image-{release}-cloud-amd64\n"
            case "download" if argv[-1] == "linux-image-6.1.0-50-cloud-amd64":
                raise BuildError("apt-get failed with status 100: 404  Not Found")
            case "download":
                (cwd / "kernel.deb").touch()
            case "--field":
                return "6.1.170-1\n"
        return ""


def test_lists_that_name_a_kernel_that_is_gone_are_fetched_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The build ended with a 404, days after the machine's last apt-get update."""
    apt = Apt()
    monkeypatch.setattr(debian, "call", apt)
    pattern = "linux-image-[0-9].*-cloud-amd64"
    unpacked = debian.unpack_dependency("linux-image-cloud-amd64", pattern, tmp_path / "kernel")
    assert unpacked == ("linux-image-6.1.0-56-cloud-amd64", "6.1.170-1")
    assert apt.calls == ["depends", "download", "update", "depends", "download", "--extract", "--field"]


def test_what_current_lists_do_not_name_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def call(argv: Sequence[str]) -> str:
        calls.append(argv[1])
        return ""

    monkeypatch.setattr(debian, "call", call)
    with pytest.raises(BuildError, match="apt knows no linux-source"):
        debian.with_current_lists(lambda: debian.candidate("linux-source"))
    assert calls == ["policy", "update", "policy"]
