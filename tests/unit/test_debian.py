"""Which of the host's apt sources the guest image is made from, on hosts of the guest's release and of others."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
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
LATER_TARGETS = """\
trixie http://mirror.example/debian/ stable main
trixie http://mirror.example/debian/ stable contrib
trixie-updates http://mirror.example/debian/ stable-updates main
trixie-security http://security.debian.org/debian-security/ trixie-security main
trixie-backports http://mirror.example/debian/ trixie-backports main
"""


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """What was found out about the host is found out once."""
    debian._options.cache_clear()
    yield
    debian._options.cache_clear()


def _be_host_of(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {"ID": "debian", "VERSION_CODENAME": release})


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


def test_a_host_of_another_release_has_the_guest_s_on_its_mirrors(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Debian 13 `make run` ended with: apt knows no archive of Debian bookworm."""
    _be_host_of("trixie", monkeypatch)
    monkeypatch.setattr(debian, "call", lambda argv: LATER_TARGETS)
    assert [line.split(" ", 2)[2] for line in debian.archives().splitlines()] == [
        "http://mirror.example/debian/ bookworm main",
        "http://mirror.example/debian/ bookworm-updates main",
        "http://security.debian.org/debian-security/ bookworm-security main",
    ]
    assert [line.split(" ", 2)[2] for line in debian.archives("trixie").splitlines()] == [
        "http://mirror.example/debian/ stable main",
        "http://mirror.example/debian/ stable-updates main",
        "http://security.debian.org/debian-security/ trixie-security main",
    ]


@pytest.mark.parametrize("release", ["forky", ""])
def test_a_host_without_debian_s_archives_is_told(release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _be_host_of(release, monkeypatch)
    monkeypatch.setattr(debian, "call", lambda argv: "sid http://mirror.example/debian/ sid main\n")
    with pytest.raises(BuildError, match="no archive of Debian bookworm"):
        debian.archives()


def test_a_host_that_says_nothing_of_itself_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> dict[str, str]:
        raise FileNotFoundError

    monkeypatch.setattr(platform, "freedesktop_os_release", missing)
    monkeypatch.setattr(debian, "call", lambda argv: LATER_TARGETS)
    with pytest.raises(BuildError, match="no archive of Debian bookworm"):
        debian.archives()


def test_a_host_of_another_release_gets_lists_of_the_guest_s(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else the guest got the host's kernel. The host's own lists, pins and packages stay out of it."""
    _be_host_of("trixie", monkeypatch)
    calls: list[list[str]] = []

    def call(argv: Sequence[str], *, cwd: Path = Path("/")) -> str:
        calls.append([*argv])
        if argv[1] == "indextargets":
            return LATER_TARGETS
        fetched = ["apt-get", "update"] in [earlier[:2] for earlier in calls]
        return "linux-source\n  Depends: linux-source-6.1\n" if fetched else ""

    monkeypatch.setattr(debian, "call", call)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert debian.with_current_lists(lambda: debian.dependency("linux-source", "linux-source-.*")) == "linux-source-6.1"
    used = [argv for argv in calls if argv[1] != "indextargets"]
    assert [argv[1] for argv in used] == ["depends", "update", "depends"]
    (settings,) = {tuple(word for word in argv if word.startswith("-oDir::")) for argv in used}
    directories = dict(setting.removeprefix("-oDir::").split("=", 1) for setting in settings)
    assert "bookworm-security main" in Path(directories["Etc::SourceList"]).read_text()
    assert "trixie" not in Path(directories["Etc::SourceList"]).read_text()
    assert directories["Etc::SourceParts"] == directories["State::Status"] == "/dev/null"
    assert Path(directories["State::Lists"], "partial").is_dir()


def test_the_dependency_of_a_metapackage(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n"
    monkeypatch.setattr(debian, "call", lambda argv: TARGETS if argv[1] == "indextargets" else listed)
    pattern = "linux-image-[0-9].*-cloud-amd64"
    assert debian.dependency("linux-image-cloud-amd64", pattern) == "linux-image-6.1.0-56-cloud-amd64"
    with pytest.raises(BuildError, match="apt knows no linux-image-cloud-amd64"):
        debian.dependency("linux-image-cloud-amd64", "linux-image-.*-rt-amd64")


class Apt:
    """Lists from before the archives got a new kernel, until they are fetched anew."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, argv: Sequence[str], *, cwd: Path = Path("/")) -> str:
        if argv[1] == "indextargets":
            return TARGETS
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
        if argv[1] == "indextargets":
            return TARGETS
        calls.append(argv[1])
        return ""

    monkeypatch.setattr(debian, "call", call)
    with pytest.raises(BuildError, match="apt knows no linux-source"):
        debian.with_current_lists(lambda: debian.candidate("linux-source"))
    assert calls == ["policy", "update", "policy"]
