"""CRI-O and podman: each reads a directory of configuration files, and gets one of katapy's own.

Source: CRI-O, crio.conf.d(5), crio.conf(5); containers.conf(5).
"""

from __future__ import annotations

import re
from abc import abstractmethod
from pathlib import PurePosixPath
from typing import Any, ClassVar, Final

from katapy.engines.change import Change
from katapy.engines.engine import (
    PROGRAM,
    SHIM,
    Engine,
    Runtime,
    in_parent,
    parse_toml,
    refuse_default,
    refuse_other,
    table,
)
from katapy.engines.host import Host
from katapy.errors import InvalidArgument

_HEADER: Final = "# Written by `katapy install`, which removes it too.\n"


class _DropIn(Engine):
    """``others`` are patterns of the files that are read too, ``keys`` lead to the table of runtimes."""

    others: ClassVar[tuple[str, ...]]
    keys: ClassVar[tuple[str, ...]]
    default: ClassVar[str]  # the key, beside the table, of the runtime that is used where none is named

    @abstractmethod
    def text(self, runtime: Runtime) -> str:
        """Return the file."""

    @abstractmethod
    def is_ours(self, entry: object) -> bool:
        """Whether what is in the table of runtimes is katapy."""

    def plan_install(self, host: Host, runtime: Runtime, config: str) -> Change | None:
        """See Engine."""
        for path, document in self._read(host, config).items():
            found = table(document, path, *self.keys).get(runtime.name)
            if found is None or path == config:
                continue
            if not self.is_ours(found):
                raise refuse_other(runtime.name, path)
            return None
        before, after = host.read(config), (_HEADER + self.text(runtime)).encode()
        if before == after:
            return None
        if before is not None and not before.startswith(_HEADER.encode()):
            raise InvalidArgument(f"{config} is there, and not written by katapy install: name another by --config")
        parse_toml(after, config)
        return Change(host.locate(config), before, after, in_parent(host.locate(config)))

    def plan_uninstall(self, host: Host, name: str, config: str) -> Change | None:
        """See Engine."""
        before = host.read(config)
        if before is None or not before.startswith(_HEADER.encode()):
            return None
        runtimes = table(parse_toml(before, config), config, *self.keys)
        if name not in runtimes:
            return None
        for path, document in self._read(host, config).items():
            if table(document, path, *self.keys[:-1]).get(self.default) == name:
                raise refuse_default(name, path)
        whole = any(before == (_HEADER + self.text(runtime)).encode() for runtime in _possible(name, before))
        return Change(host.locate(config), before, None, None if whole else in_parent(host.locate(config)))

    def names(self, host: Host) -> list[str]:
        """See Engine."""
        tables = (table(document, path, *self.keys) for path, document in self._read(host).items())
        return sorted({name for runtimes in tables for name, found in runtimes.items() if self.is_ours(found)})

    def _read(self, host: Host, *more: str) -> dict[str, dict[str, Any]]:
        """Return all that the engine reads, and ``more``, which may be files that it does not read."""
        paths = [path for pattern in self.others for path in host.glob(pattern)]
        return {path: parse_toml(host.read(path), path) for path in dict.fromkeys([*paths, *more])}


class Crio(_DropIn):
    """CRI-O, which talks to the shim as containerd does."""

    name = "crio"
    program = "crio"
    config = "/etc/crio/crio.conf.d/10-{name}.conf"
    then = "restart CRI-O: service crio restart"
    others = ("/etc/crio/crio.conf", "/etc/crio/crio.conf.d/*")
    keys = ("crio", "runtime", "runtimes")
    default = "default_runtime"

    def text(self, runtime: Runtime) -> str:
        """See _DropIn. The root is where CRI-O keeps its fifos."""
        return (
            f"[crio.runtime.runtimes.{runtime.name}]\n"
            f'runtime_path = "{runtime.shim}"\n'
            'runtime_type = "vm"\n'
            'runtime_root = "/run/katapy-crio"\n'
            "privileged_without_host_devices = true\n"
        )

    def is_ours(self, entry: object) -> bool:
        """See _DropIn."""
        return isinstance(entry, dict) and PurePosixPath(str(entry.get("runtime_path"))).name == SHIM


class Podman(_DropIn):
    """podman, and what else reads containers.conf."""

    name = "podman"
    program = "podman"
    config = "/etc/containers/containers.conf.d/{name}.conf"
    then = "nothing has to be restarted"
    others = (
        "/usr/share/containers/containers.conf",
        "/etc/containers/containers.conf",
        "/etc/containers/containers.conf.d/*.conf",
    )
    keys = ("engine", "runtimes")
    default = "runtime"

    def text(self, runtime: Runtime) -> str:
        """See _DropIn."""
        return f'[engine.runtimes]\n{runtime.name} = ["{runtime.program}"]\n'

    def is_ours(self, entry: object) -> bool:
        """See _DropIn."""
        programs = entry if isinstance(entry, list) else []
        return any(PurePosixPath(str(program)).name == PROGRAM for program in programs)


def _possible(name: str, text: bytes) -> list[Runtime]:
    """Return what a file may have been written for: each directory that is named in it."""
    return [Runtime(name, found.decode()) for found in re.findall(rb'"(/[^"]*)/[^/"]+"', text)]
