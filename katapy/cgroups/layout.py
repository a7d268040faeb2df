"""Which cgroup hierarchies this host has: unified (v2), one per controller (v1), or both (hybrid).

It reads /proc/self/mountinfo and /proc/self/cgroup (cgroups(7)) and assumes nothing about /sys/fs/cgroup: inside of
another container a part of it may be missing, read-only, or a subtree.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import StrEnum
from typing import Final, NamedTuple

from katapy.errors import NotFound, Unavailable

_READ_ONLY: Final = "ro"


class Kind(StrEnum):
    """What is mounted."""

    NONE = "none"
    V1 = "v1"
    HYBRID = "hybrid"
    UNIFIED = "unified"


class Hierarchy(NamedTuple):
    """One mounted hierarchy.

    ``mount`` is its directory; ``own`` the cgroup of the process that was asked about, as a path below ``mount`` that
    starts with a slash; ``controllers`` is what it carries, "name=systemd" included, which limits nothing.
    """

    version: int
    mount: str
    own: str
    controllers: tuple[str, ...]
    writable: bool

    @property
    def name(self) -> str:
        """The name as in /proc/self/cgroup: "memory", "cpu,cpuacct", "name=systemd"; "" is v2."""
        return "" if self.version == 2 else ",".join(self.controllers)


class Layout(NamedTuple):
    """All hierarchies, each once."""

    hierarchies: tuple[Hierarchy, ...]

    @property
    def kind(self) -> Kind:
        """What this host has."""
        versions = {hierarchy.version for hierarchy in self.hierarchies}
        if len(versions) == 2:
            return Kind.HYBRID
        return Kind.NONE if not versions else Kind.UNIFIED if 2 in versions else Kind.V1

    def find(self, controller: str) -> Hierarchy | None:
        """Return the hierarchy that carries ``controller``, None where none does."""
        for hierarchy in self.hierarchies:
            if controller in hierarchy.controllers:
                return hierarchy
        return None

    def holding(self, path: str) -> Hierarchy | None:
        """Return the hierarchy that the absolute ``path`` is below of, None where it is below none."""
        for hierarchy in self.hierarchies:
            if path.startswith(f"{hierarchy.mount.rstrip('/')}/"):
                return hierarchy
        return None


def find_layout(pid: int | None = None) -> Layout:
    """Return this host's layout as this process sees it; ``own`` is where the process ``pid`` is, by default this one.

    Raises NotFound where ``pid`` has ended, Unavailable where /proc cannot be read.
    """
    try:
        mounts = _read("/proc/self/mountinfo")
    except FileNotFoundError as error:
        raise Unavailable("cannot look for cgroups: /proc is not mounted") from error
    try:
        own = _read(f"/proc/{'self' if pid is None else pid}/cgroup")
    except (FileNotFoundError, ProcessLookupError) as error:
        if pid is None:
            return Layout(())  # a kernel without cgroups
        raise NotFound(f"cannot look for the cgroups of process {pid}: it has ended") from error
    return parse_layout(mounts, own, _controllers_of)


def parse_layout(mountinfo: str, own: str, controllers_of: Callable[[str], tuple[str, ...]]) -> Layout:
    """Return the layout that /proc/self/mountinfo and /proc/self/cgroup describe.

    ``controllers_of`` returns the controllers of the cgroup v2 that is mounted in a directory.
    """
    memberships = _memberships(own)
    found: dict[tuple[str, ...], tuple[str, Hierarchy]] = {}
    for line in mountinfo.splitlines():
        fields, _, rest = line.partition(" - ")
        root, mount, options = (_unescape(field) for field in fields.split(" ")[3:6])
        kind, _, super_options = rest.split(" ")[:3]
        if kind not in ("cgroup", "cgroup2"):
            continue
        key = () if kind == "cgroup2" else _named(memberships, super_options)
        if key is None or key not in memberships:
            continue
        hierarchy = Hierarchy(
            version=2 if kind == "cgroup2" else 1,
            mount=mount,
            own=_below(memberships[key], root),
            controllers=controllers_of(mount) if kind == "cgroup2" else key,
            writable=_READ_ONLY not in (*options.split(","), *super_options.split(",")),
        )
        # Of several mounts of one hierarchy, the one that shows most of it; of equals, the first.
        if key not in found or (root == "/" and found[key][0] != "/"):
            found[key] = (root, hierarchy)
    return Layout(tuple(hierarchy for _, hierarchy in found.values()))


def _memberships(own: str) -> dict[tuple[str, ...], str]:
    """Return the path by the controllers of the hierarchy; () is v2."""
    found = {}
    for line in own.splitlines():
        _, names, path = line.split(":", 2)
        found[tuple(names.split(",")) if names else ()] = path
    return found


def _named(memberships: dict[tuple[str, ...], str], super_options: str) -> tuple[str, ...] | None:
    options = set(super_options.split(","))
    return next((names for names in memberships if names and options.issuperset(names)), None)


def _below(path: str, root: str) -> str:
    """Return ``path`` as seen below a mount that shows the subtree ``root``; the mount itself where it is outside."""
    if root == "/":
        # With a cgroup namespace of its own, a process may be outside of what it sees: /../x.
        return path if ".." not in path.split("/") else "/"
    return (path.removeprefix(root) or "/") if f"{path}/".startswith(f"{root}/") else "/"


def _controllers_of(mount: str) -> tuple[str, ...]:
    try:
        return tuple(_read(f"{mount}/cgroup.controllers").split())
    except OSError:
        return ()  # another mount hides it


def _read(path: str) -> str:
    with open(path) as file:  # noqa: PTH123 - pathlib is slow to import
        return file.read()


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
