"""``linux.cgroupsPath`` as runc reads it (runtime-spec, config-linux.md, "Cgroups Path").

The text comes from outside. What becomes of it is a path below a hierarchy, never one that leaves it.
"""

from __future__ import annotations

import os
import re
from enum import StrEnum
from typing import Final, NamedTuple

from katapy.cgroups.layout import Hierarchy
from katapy.errors import InvalidArgument
from katapy.jsonfile import shown

DEFAULT_PARENT: Final = "/katapy"
_FIELD: Final = "linux.cgroupsPath"
_PATH_MAX: Final = 3072  # bytes: leaves room for the mount point and a file's name within the kernel's 4096
_NAME_MAX: Final = 255  # bytes
_UNIT: Final = re.compile(r"[A-Za-z0-9:_.@\\-]+")
_SLICE: Final = ".slice"


class Driver(StrEnum):
    """Who makes the cgroup: katapy itself, or systemd (``--systemd-cgroup``)."""

    CGROUPFS = "cgroupfs"
    SYSTEMD = "systemd"


class CgroupPath(NamedTuple):
    """Where the cgroup of a pod is.

    ``path`` is below each hierarchy's root, or, where ``relative``, below the caller's own cgroup. With systemd it
    is what ``unit``, a scope in ``slice``, gets. ``asked`` says that the caller named it.
    """

    path: str
    relative: bool = False
    unit: str = ""
    slice: str = ""
    asked: bool = True

    def within(self, hierarchy: Hierarchy) -> str:
        """Return the path below the hierarchy's mount point, with a leading slash."""
        if not self.relative:
            return self.path
        # In cgroup v2 the caller's own cgroup holds processes, so its children could not limit anything: a sibling.
        base = os.path.dirname(hierarchy.own) if hierarchy.version == 2 else hierarchy.own
        return f"{base.rstrip('/')}/{self.path}"


def parse_cgroups_path(text: str, driver: Driver, container_id: str) -> CgroupPath:
    """Read ``linux.cgroupsPath``; ``container_id`` names the cgroup where it is empty. Raises InvalidArgument."""
    if any(ord(char) < 0x20 or ord(char) == 0x7F for char in text):
        raise InvalidArgument(f"{_FIELD}: {shown(text)} holds a control character")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"{_FIELD}: {shown(text)} is not valid Unicode") from error
    if size > _PATH_MAX:
        raise InvalidArgument(f"{_FIELD}: longer than {_PATH_MAX} bytes")
    return _systemd(text, container_id) if driver is Driver.SYSTEMD else _cgroupfs(text, container_id)


def _cgroupfs(text: str, container_id: str) -> CgroupPath:
    if not text:
        return CgroupPath(f"{DEFAULT_PARENT}/{container_id}", asked=False)
    parts = [part for part in text.split("/") if part not in ("", ".")]
    for part in parts:
        if part == "..":
            raise InvalidArgument(f"{_FIELD}: {shown(text)} leaves the hierarchy by '..'")
        if len(part.encode()) > _NAME_MAX:
            raise InvalidArgument(f"{_FIELD}: a name in {shown(text)} is longer than {_NAME_MAX} bytes")
    if not parts:
        raise InvalidArgument(f"{_FIELD}: {shown(text)} is the cgroup of the whole host or of the caller")
    relative = not text.startswith("/")
    return CgroupPath("/".join(parts) if relative else "/" + "/".join(parts), relative)


def _systemd(text: str, container_id: str) -> CgroupPath:
    parts = text.split(":") if text else ["", "katapy", container_id]
    if len(parts) != 3:
        raise InvalidArgument(f"{_FIELD}: {shown(text)} is not slice:prefix:name, which --systemd-cgroup needs")
    slice_name, prefix, name = parts
    slice_name = slice_name or "system.slice"
    if not name:
        raise InvalidArgument(f"{_FIELD}: {shown(text)} has no name")
    if name.endswith(_SLICE):
        raise InvalidArgument(f"{_FIELD}: {shown(text)} names a slice, which cannot hold processes")
    unit = f"{prefix}-{name}.scope" if prefix else f"{name}.scope"
    if not _UNIT.fullmatch(unit) or len(unit) > _NAME_MAX:
        raise InvalidArgument(f"{_FIELD}: {shown(unit)} cannot be the name of a systemd unit")
    return CgroupPath(f"{_expand(slice_name)}/{unit}", unit=unit, slice=slice_name, asked=bool(text))


def _expand(slice_name: str) -> str:
    """Return the path of a slice: a-b.slice is in a.slice (systemd.slice(5)); -.slice is the root."""
    if slice_name == "-.slice":
        return ""
    stem = slice_name.removesuffix(_SLICE)
    parts = stem.split("-")
    if stem == slice_name or not all(parts) or not _UNIT.fullmatch(slice_name) or len(slice_name) > _NAME_MAX:
        raise InvalidArgument(f"{_FIELD}: {shown(slice_name)} is not the name of a systemd slice")
    return "".join(f"/{'-'.join(parts[: count + 1])}{_SLICE}" for count in range(len(parts)))
