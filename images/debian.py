"""Debian's packages, through the host's apt: which archives there are, download and unpack. Installs nothing.

The host may be of another release than the guest: its mirrors have both, and apt gets lists of its own for the guest's.
"""

from __future__ import annotations

import atexit
import functools
import platform
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

from steps import BuildError, call

# The release whose Python and kernel katapy's guest is made of; the wheels and the agent are for this Python.
CODENAME: Final = "bookworm"
_KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"
_PARTS: Final = ("", "-updates", "-security")
_AS_ROOT: Final = "APT::Sandbox::User=root"
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
        _update_lists(_options())
        return download()


def _update_lists(options: Sequence[str] = ()) -> None:
    with _updating:
        call(["apt-get", "update", *options, "-qq"])


def archives(release: str = CODENAME) -> str:
    """Return Debian's own archives of a release, on the mirrors that the host uses, as a sources.list(5).

    Third-party sources are left out. What calls itself Debian must be signed by Debian. Raises BuildError when the
    host's apt knows none, not even of the host's own release.
    """
    found = _find_archives(release)
    if not found:
        _update_lists()
        found = _find_archives(release)
    if not found:
        raise BuildError(f"apt knows no archive of Debian {release}; see /etc/apt/sources.list.d and sources.list(5)")
    return "".join(f"deb [signed-by={_KEYRING}] {archive}\n" for archive in found)


def _find_archives(release: str) -> list[str]:
    """Return those that apt has lists of, or else where they are if they lie beside those of the host's release."""
    targets = _find_targets()
    found = {f"{uri} {suite} main" for codename, uri, suite in targets if codename in _codenames(release)}
    if not found and (host := _host_release()):
        named = dict(zip(_codenames(host), _codenames(release), strict=True))
        found = {f"{uri} {named[codename]} main" for codename, uri, _ in targets if codename in named}
    return sorted(found)


def _find_targets() -> set[tuple[str, str, str]]:
    """Return the codename, URI and suite of each archive of Debian's main packages that apt has lists of."""
    fields = "$(CODENAME) $(REPO_URI) $(RELEASE) $(COMPONENT)"
    lines = call(["apt-get", "indextargets", "--format", fields, "Created-By: Packages", "Origin: Debian"]).splitlines()
    targets = [line.split(" ") for line in lines]
    return {(codename, uri, suite) for codename, uri, suite, component in targets if component == "main"}


def _codenames(release: str) -> list[str]:
    return [f"{release}{part}" for part in _PARTS]


def _host_release() -> str:
    """Return the codename of the host's Debian; empty where the host has none."""
    try:
        return platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    except OSError:
        return ""


@functools.cache
def _options() -> tuple[str, ...]:
    """Return apt's options for packages of the guest's release. Raises BuildError.

    None where the host's apt has lists of it. Elsewhere it has others for this process alone, empty until they are
    fetched, and whatever is set up or installed on the host does not matter.
    """
    sources = archives()
    if {codename for codename, _, _ in _find_targets()} & set(_codenames(CODENAME)):
        return ()
    directory = tempfile.TemporaryDirectory(prefix="katapy-apt-")
    atexit.register(directory.cleanup)
    lists, sources_list = Path(directory.name, "lists"), Path(directory.name, "sources.list")
    (lists / "partial").mkdir(parents=True)
    sources_list.write_text(sources)
    others = ("Etc::SourceParts", "Etc::Preferences", "Etc::PreferencesParts", "State::Status")
    settings = [f"Dir::{name}=/dev/null" for name in others]
    settings += [f"Dir::Etc::SourceList={sources_list}", f"Dir::State::Lists={lists}"]
    settings += ["Dir::Cache::PkgCache=", "Dir::Cache::SrcPkgCache=", "APT::Default-Release=", _AS_ROOT]
    return tuple(f"-o{setting}" for setting in settings)


def dependency(package: str, pattern: str) -> str:
    """Return the name of the dependency of a metapackage that matches ``pattern``. Raises BuildError."""
    listed = call(["apt-cache", "depends", *_options(), "--important", package])
    names = re.findall(rf"Depends: ({pattern})$", listed, re.MULTILINE)
    if not names:
        raise BuildError(f"apt knows no {package} of Debian {CODENAME}; see sources.list(5)")
    return str(names[0])


def candidate(package: str) -> str:
    """Return the version of a package that apt would take. Raises BuildError."""
    found = re.search(r"Candidate: ([0-9]\S*)", call(["apt-cache", "policy", *_options(), package]))
    if found is None:
        raise BuildError(f"apt knows no {package} of Debian {CODENAME}; see sources.list(5)")
    return found[1]


def unpack(package: str, directory: Path) -> str:
    """Download a package, unpack it in the directory ``directory``, made anew, and return its version.

    Raises BuildError.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    call(["apt-get", "download", *_options(), "-qq", f"-o{_AS_ROOT}", package], cwd=directory)
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
