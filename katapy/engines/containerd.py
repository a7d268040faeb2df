"""containerd: a runtime handler of its CRI plugin.

The table is appended to config.toml between two marks. From version 2 of containerd on, files that config.toml imports
are merged with it, and where it imports a directory the table becomes a file there. An older one takes the whole
section of a plugin from the file that it has read last, and all other settings of that section would be lost.
Source: containerd 1.6, services/server/config; 2.x, cmd/containerd/server/config (LoadConfig, mergeConfig).
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from katapy.engines.change import Change
from katapy.engines.engine import SHIM, Engine, Runtime, in_parent, parse_toml, refuse_default, refuse_other, table
from katapy.engines.host import Host
from katapy.errors import InvalidArgument, InvalidState, KatapyError

RUNTIME_TYPE: Final = "io.containerd.katapy.v2"
# The CRI plugin, by the version of the file. Not of the daemon: a newer one reads older files.
_PLUGINS: Final = {
    1: "cri",
    2: "io.containerd.grpc.v1.cri",
    3: "io.containerd.cri.v1.runtime",
    4: "io.containerd.cri.v1.runtime",
}
_MERGED: Final = 3  # a version that only those daemons read which merge what is imported
_KEYS: Final = ("containerd", "runtimes")


class Containerd(Engine):
    """containerd, for Kubernetes; ``ctr`` needs no configuration."""

    name = "containerd"
    program = "containerd"
    config = "/etc/containerd/config.toml"
    then = "restart containerd: service containerd restart"

    def plan_install(self, host: Host, runtime: Runtime, config: str) -> Change | None:
        """See Engine."""
        main = _File.read(host, config)
        made = main.made(runtime.name)
        if made is None and (found := main.find(runtime.name)) is not None:
            if not _is_ours(found.runtimes[runtime.name]):
                raise refuse_other(runtime.name, found.name)
            return None
        target = made or main.for_addition(runtime.name)
        # What is not katapy's. All of a file that is only imported for it is.
        kept = _File(host, target.name, _without(target.text, runtime.name) if target.name == main.name else b"")
        version = main.version
        if target.name == main.name and not kept.document:
            version = 3 if host.version(self.program) >= (2,) else 2
        others = {key for file in main.all() if file.name != target.name for key in file.runtimes}
        lines = [] if kept.document else [f"version = {version}", ""]
        lines += _tables(version, runtime, only="runc" not in {*others, *kept.runtimes})
        first = not kept.text and (target.contents is None or _is_alone(target.text, runtime.name))
        after = kept.text + _block(runtime.name, lines, first=first)
        if after == target.text:
            return None
        self._check(host, main, target.name, after, runtime.name)
        return Change(host.locate(target.name), target.contents, after, _backup(target, main))

    def plan_uninstall(self, host: Host, name: str, config: str) -> Change | None:
        """See Engine."""
        main = _File.read(host, config)
        file = main.made(name)
        if file is None:
            return None
        kept = _File(host, file.name, _without(file.text, name))
        if kept.document and kept.version != file.version:
            # It came with katapy, and what has been added since is written for it.
            kept = _File(host, file.name, _without(file.text, name, f"version = {file.version}\n"))
        rest = [each for each in main.all() if each.name != file.name] + [kept]
        left = {key for each in rest for key in each.runtimes}
        default = str(table(main.cri, main.name, "containerd").get("default_runtime_name", "runc"))
        if default == name:
            raise refuse_default(name, main.name)
        if left and default not in left:
            raise InvalidState(f"{file.name}: {default} came with {name}: take out {', '.join(sorted(left))} first")
        gone = file.name != main.name or _is_alone(file.text, name)
        return Change(host.locate(file.name), file.contents, None if gone else kept.text, _backup(file, main))

    def warning(self, host: Host, config: str) -> str | None:
        """See Engine. Docker's package of containerd comes with the plugin disabled."""
        disabled = _File.read(host, config).document.get("disabled_plugins", [])
        if isinstance(disabled, list) and set(_PLUGINS.values()).intersection(map(str, disabled)):
            return f"disabled_plugins in {config} has the CRI plugin: Kubernetes cannot use this containerd"
        return None

    def names(self, host: Host) -> list[str]:
        """See Engine."""
        main = _File.read(host, self.config)
        return sorted({key for file in main.all() for key, found in file.runtimes.items() if _is_ours(found)})

    def _check(self, host: Host, main: _File, target: str, text: bytes, name: str) -> None:
        """Raise InvalidArgument unless the text is TOML, and the daemon takes it where it is installed."""
        try:
            parse_toml(text, target)
        except InvalidArgument as error:
            raise InvalidArgument(f"nothing can be added to tables that are written like these: {error}") from error
        program = host.find_program(self.program)
        if program is None:
            return
        try:
            dump = parse_toml(_dump(host, program, main, target, text).encode(), "its answer")
        except KatapyError as error:
            raise InvalidArgument(f"containerd refuses {target} with katapy: {error}") from error
        plugins = [found for key, found in dump.get("plugins", {}).items() if key in _PLUGINS.values()]
        # There is none where the plugin is disabled.
        if plugins and not any(name in table(found, target, *_KEYS) for found in plugins):
            why = "a file that it imports has a section of the CRI plugin, which counts instead"
            raise InvalidArgument(f"{target}: {why}: name that one by --config")


@dataclass(frozen=True)
class _File:
    """One file of containerd's configuration; ``contents`` None is no file."""

    host: Host
    name: str
    contents: bytes | None

    @classmethod
    def read(cls, host: Host, name: str) -> _File:
        """Read it. Raises InvalidArgument for what is no configuration that is known."""
        file = cls(host, name, host.read(name))
        if file.version not in _PLUGINS:
            raise InvalidArgument(f"{name}: version {file.version} is not known")
        return file

    @property
    def text(self) -> bytes:
        return self.contents or b""

    @cached_property
    def document(self) -> dict[str, Any]:
        return parse_toml(self.contents, self.name)

    @property
    def version(self) -> int:
        return int(found) if isinstance(found := self.document.get("version", 1), int) else 0

    @property
    def cri(self) -> dict[str, Any]:
        """The section of the plugin."""
        return table(self.document, self.name, "plugins", _PLUGINS[self.version])

    @property
    def runtimes(self) -> dict[str, Any]:
        return table(self.cri, self.name, *_KEYS)

    @property
    def imports(self) -> list[str]:
        """The patterns of what it imports, absolute."""
        found = self.document.get("imports", [])
        if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
            raise InvalidArgument(f"{self.name}: imports is not an array of strings")
        return [os.path.normpath(Path(self.name).parent / each) for each in found]

    def all(self) -> Iterator[_File]:
        """Yield it and what it imports; what that imports again is not looked at."""
        yield self
        for pattern in self.imports:
            for name in self.host.glob(pattern):
                if name != self.name:
                    yield _File.read(self.host, name)

    def find(self, runtime: str) -> _File | None:
        """Return the file that has a runtime of this name."""
        return next((file for file in self.all() if runtime in file.runtimes), None)

    def made(self, runtime: str) -> _File | None:
        """Return the file that has what ``install`` wrote for the runtime."""
        return next((file for file in self.all() if _marked(runtime).search(file.text)), None)

    def for_addition(self, runtime: str) -> _File:
        """Return the file that a runtime is added to: this one, or one more in a directory that it imports."""
        if self.version >= _MERGED:
            for pattern in self.imports:
                if pattern.endswith("/*.toml"):
                    return _File(self.host, f"{pattern.removesuffix('*.toml')}{runtime}.toml", None)
        return self


def _tables(version: int, runtime: Runtime, *, only: bool) -> list[str]:
    """Return the lines; ``only`` where no other runtime is named: a table of some takes the place of the defaults."""
    prefix = f'plugins."{_PLUGINS[version]}".containerd.runtimes'
    # containerd 1.6 reads runtime_path and does not heed it (its issue 8207); all take a path for a type.
    found = [f'runtime_type = "{runtime.shim}"']
    if version >= _MERGED:
        found = [f'runtime_type = "{RUNTIME_TYPE}"', f'runtime_path = "{runtime.shim}"']
    lines = [f"[{prefix}.{runtime.name}]", *found, "privileged_without_host_devices = true"]
    return [*lines, "", f"[{prefix}.runc]", 'runtime_type = "io.containerd.runc.v2"'] if only else lines


def _block(name: str, lines: list[str], *, first: bool) -> bytes:
    """Return what is written. ``first`` is for a file of nothing else, which ``uninstall`` removes."""
    marked = [f"# BEGIN katapy install: {name}", *lines, f"# END katapy install: {name}", ""]
    return ("" if first else "\n").encode() + "\n".join(marked).encode()


def _marked(name: str) -> re.Pattern[bytes]:
    return re.compile(
        rb"\n?# BEGIN katapy install: %b\n.*?# END katapy install: %b\n" % ((name.encode(),) * 2), re.DOTALL
    )


def _without(text: bytes, name: str, instead: str = "") -> bytes:
    return _marked(name).sub(instead.encode(), text, count=1)


def _is_alone(text: bytes, name: str) -> bool:
    found = _marked(name).fullmatch(text)
    return found is not None and found[0].startswith(b"#")


def _is_ours(runtime: object) -> bool:
    return isinstance(runtime, dict) and Path(str(runtime.get("runtime_type"))).name in (RUNTIME_TYPE, SHIM)


def _backup(file: _File, main: _File) -> Path:
    path = file.host.locate(file.name)
    return path if file.name == main.name else in_parent(path)


def _dump(host: Host, program: str, main: _File, target: str, text: bytes) -> str:
    """Return what the daemon makes of its configuration with ``text`` in ``target``, which is not written yet."""
    with tempfile.TemporaryDirectory(prefix="katapy-", dir=host.locate("/tmp")) as name:
        there = f"/tmp/{Path(name).name}"
        if target == main.name:
            # What it imports by relative paths is where they lead from its own place.
            for pattern, path in zip(main.document.get("imports", []), main.imports, strict=True):
                text = text.replace(f'"{pattern}"'.encode(), f'"{path}"'.encode())
            (Path(name) / "config.toml").write_bytes(text)
        else:
            (Path(name) / "added.toml").write_bytes(text)
            imports = f'version = {main.version}\nimports = ["{main.name}", "{there}/added.toml"]\n'
            (Path(name) / "config.toml").write_text(imports)
        return host.output(program, "--config", f"{there}/config.toml", "config", "dump")
