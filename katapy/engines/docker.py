"""docker: a runtime in daemon.json.

JSON has no comments to mark what was added, and whoever wrote the file has laid it out; so one member is put into the
text, and the same text is taken out again. Docker calls katapy as it calls runc; from version 24 on it has a key for
the program of a shim, and talks to that.
Source: moby 24.0, daemon/config and daemon/runtime_unix.go (``runtimeType``, which 23.0 has not).
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any, Final

from katapy import jsonfile
from katapy.engines.change import Change
from katapy.engines.engine import PROGRAM, SHIM, Engine, Runtime, refuse_default, refuse_other, table
from katapy.engines.host import Host
from katapy.errors import InvalidArgument, KatapyError

_RUNTIME_TYPE: Final = (24,)
_VALIDATE: Final = (23,)


class Docker(Engine):
    """Docker's daemon."""

    name = "docker"
    program = "dockerd"
    config = "/etc/docker/daemon.json"
    then = "restart docker: service docker restart"

    def plan_install(self, host: Host, runtime: Runtime, config: str) -> Change | None:
        """See Engine."""
        before = host.read(config)
        document = _parse(before, config)
        version = host.version(self.program)
        entry = {"runtimeType": runtime.shim} if version >= _RUNTIME_TYPE else {"path": runtime.program}
        found = table(document, config, "runtimes").get(runtime.name)
        if found is not None and not _is_ours(found):
            raise refuse_other(runtime.name, config)
        if found == entry or (found is not None and len(found) > 1):
            return None  # the second with arguments of somebody's own
        kept = before if found is None else _take_out(before or b"", document, runtime.name)
        after = _put_in(kept, runtime.name, entry)
        runtimes = {**table(document, config, "runtimes"), runtime.name: entry}
        assert _parse(after, config) == {**document, "runtimes": runtimes}
        self._check(host, config, after, version)
        return Change(host.locate(config), before, after, host.locate(config))

    def plan_uninstall(self, host: Host, name: str, config: str) -> Change | None:
        """See Engine."""
        before = host.read(config)
        document = _parse(before, config)
        found = table(document, config, "runtimes").get(name)
        if before is None or found is None:
            return None
        if not _is_ours(found):
            raise refuse_other(name, config)
        if document.get("default-runtime") == name:
            raise refuse_default(name, config)
        return Change(host.locate(config), before, _take_out(before, document, name), host.locate(config))

    def names(self, host: Host) -> list[str]:
        """See Engine."""
        runtimes = table(_parse(host.read(self.config), self.config), self.config, "runtimes")
        return sorted(name for name, found in runtimes.items() if _is_ours(found))

    def _check(self, host: Host, config: str, text: bytes, version: tuple[int, ...]) -> None:
        """Raise InvalidArgument unless the daemon takes the text, where it is installed and can say."""
        program = host.find_program(self.program)
        if program is None or version < _VALIDATE:
            return
        with tempfile.NamedTemporaryFile(prefix="katapy-", suffix=".json", dir=host.locate("/tmp")) as file:
            file.write(text)
            file.flush()
            try:
                host.output(program, "--validate", "--config-file", f"/tmp/{Path(file.name).name}")
            except KatapyError as error:
                raise InvalidArgument(f"docker refuses {config} with katapy: {error}") from error


def _parse(text: bytes | None, path: str) -> dict[str, Any]:
    return jsonfile.parse(text, what=path) if text and text.strip() else {}


def _is_ours(entry: object) -> bool:
    if not isinstance(entry, dict):
        return False
    program = str(entry.get("path") or entry.get("runtimeType") or "")
    return Path(program).name in (PROGRAM, SHIM, "io.containerd.katapy.v2")


def _fresh(before: bytes | None, name: str, entry: object) -> bytes:
    """Return a file of nothing else. Where there was an empty one it is indented less, which tells the two apart."""
    return json.dumps({"runtimes": {name: entry}}, indent=4 if before is None else 2).encode() + b"\n"


def _put_in(before: bytes | None, name: str, entry: object) -> bytes:
    """Return the text with the runtime first among the runtimes, or with these first where there are none."""
    if before is None or not before.strip():
        return (before or b"") + _fresh(before, name, entry)
    text = before.decode()
    member = f"{json.dumps(name)}: {json.dumps(entry)}"
    at = _value(text, "runtimes")
    # In braces that were there and empty a space says so.
    gap = "" if at is None else " "
    if at is None:
        at, member = text.index("{"), f'"runtimes": {{{member}}}'
    start = at + 1
    indent = text[start : _skip(text, start)]
    if text[start + len(indent)] == "}":
        return f"{text[:start]}{gap}{member}{text[start:]}".encode()
    return f"{text[:start]}{indent}{member},{text[start:]}".encode()


def _take_out(before: bytes, document: dict[str, Any], name: str) -> bytes | None:
    """Return the text without the runtime: as it was before, unless the runtime was moved or written in another way."""
    entry = document["runtimes"][name]
    kept = {other: each for other, each in document["runtimes"].items() if other != name}
    for was in (None, b""):
        if before == _fresh(was, name, entry):
            return was
    text = before.decode()
    member = re.escape(f"{json.dumps(name)}: {json.dumps(entry)}")
    at = _value(text, "runtimes")
    assert at is not None
    for start, pattern in (
        (text.index("{") + 1, rf'\s*"runtimes": \{{{member}\}},?'),
        (at + 1, rf"\s*{member},?"),
    ):
        if found := re.compile(pattern).match(text, start):
            return (text[: found.start()] + text[found.end() :]).encode()
    rest = {key: each for key, each in document.items() if key != "runtimes" or kept}
    return json.dumps(rest | ({"runtimes": kept} if kept else {}), indent=4).encode() + b"\n"


def _value(text: str, key: str) -> int | None:
    """Return where the value of a key of the outermost object begins, in a text that is known for one."""
    decoder = json.JSONDecoder()
    at = text.index("{") + 1
    while True:
        at = _skip(text, at, ",")
        if text[at] == "}":
            return None
        found, at = decoder.raw_decode(text, at)
        at = _skip(text, at, ":")
        if found == key:
            return at
        _, at = decoder.raw_decode(text, at)


def _skip(text: str, at: int, mark: str = "") -> int:
    """Return where something begins that is neither space nor ``mark``."""
    while text[at].isspace() or text[at] == mark:
        at += 1
    return at
