"""Debian's packages, through the host's apt: which archives there are, download and unpack. Installs nothing."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from steps import BuildError, call

# The release whose Python and kernel katapy's guest is made of; the wheels and the agent are for this Python.
CODENAME: Final = "bookworm"
_KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"
_ARCHIVES: Final = (CODENAME, f"{CODENAME}-updates", f"{CODENAME}-security")
# apt-get does not wait while another one fetches the lists.
_updating: Final = threading.Lock()

_Result = TypeVar("_Result")


def with_current_lists(download: Callable[[], _Result]) -> _Result:
    """Return what ``download`` returns; where it fails, apt's lists are fetched and it is called once more.

    Old lists name packages and versions that the archives no longer have. Raises BuildError.
    """
    try:
        return download()
    except BuildError:
        _update_lists()
        return download()


def _update_lists() -> None:
    with _updating:
        call(["apt-get", "update", "-qq"])


def archives() -> str:
    """Return Debian's own archives of the release that the host uses, mirrors included, as a sources.list(5).

    Third-party sources are left out. What calls itself Debian must be signed by Debian. Raises BuildError when the
    host's apt knows none.
    """
    found = _find_archives()
    if not found:
        _update_lists()
        found = _find_archives()
    if not found:
        raise BuildError(f"apt knows no archive of Debian {CODENAME}; see /etc/apt/sources.list.d and sources.list(5)")
    return "".join(f"deb [signed-by={_KEYRING}] {archive}\n" for archive in found)


def _find_archives() -> list[str]:
    fields = "$(CODENAME) $(REPO_URI) $(RELEASE) $(COMPONENT)"
    lines = call(["apt-get", "indextargets", "--format", fields, "Created-By: Packages", "Origin: Debian"]).splitlines()
    targets = [line.split(" ", 1) for line in lines]
    return sorted({archive for codename, archive in targets if codename in _ARCHIVES and archive.endswith(" main")})


def dependency(package: str, pattern: str) -> str:
    """Return the name of the dependency of a metapackage that matches ``pattern``. Raises BuildError."""
    listed = call(["apt-cache", "depends", "--important", package])
    names = re.findall(rf"Depends: ({pattern})$", listed, re.MULTILINE)
    if not names:
        raise BuildError(f"apt knows no {package} of Debian {CODENAME}; see sources.list(5)")
    return str(names[0])


def candidate(package: str) -> str:
    """Return the version of a package that apt would take. Raises BuildError."""
    found = re.search(r"Candidate: ([0-9]\S*)", call(["apt-cache", "policy", package]))
    if found is None:
        raise BuildError(f"apt knows no {package} of Debian {CODENAME}; see sources.list(5)")
    return found[1]


def unpack(package: str, directory: Path) -> str:
    """Download a package, unpack it in the directory ``directory``, made anew, and return its version.

    Raises BuildError.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    call(["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", package], cwd=directory)
    (archive,) = directory.glob("*.deb")
    call(["dpkg-deb", "--extract", archive, directory])
    version = call(["dpkg-deb", "--field", archive, "Version"]).strip()
    archive.unlink()
    return version


def unpack_dependency(package: str, pattern: str, directory: Path) -> tuple[str, str]:
    """Unpack the dependency of a metapackage that matches ``pattern``; return name and version. Raises BuildError."""

    def download() -> tuple[str, str]:
        name = dependency(package, pattern)
        return name, unpack(name, directory)

    return with_current_lists(download)
