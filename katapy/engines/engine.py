"""What there is to say of an engine, whichever it is."""

from __future__ import annotations

import tomllib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

from katapy.engines.change import Change
from katapy.engines.host import Host
from katapy.errors import AlreadyExists, InvalidArgument, InvalidState

PROGRAM: Final = "katapy"
SHIM: Final = "containerd-shim-katapy-v2"


@dataclass(frozen=True)
class Runtime:
    """katapy as an engine is told of it: under which name, and the directory of its programs."""

    name: str = "katapy"
    programs: str = "/usr/local/bin"

    @property
    def program(self) -> str:
        """The command line."""
        return f"{self.programs}/{PROGRAM}"

    @property
    def shim(self) -> str:
        """The shim of containerd's API."""
        return f"{self.programs}/{SHIM}"


class Engine(ABC):
    """One engine; ``config`` is the file that it is configured by, or that is added for the runtime ``{name}``."""

    name: ClassVar[str]
    program: ClassVar[str]
    config: ClassVar[str]
    then: ClassVar[str]  # what has to be done after a change

    @abstractmethod
    def plan_install(self, host: Host, runtime: Runtime, config: str) -> Change | None:
        """Return what has to be changed, None where nothing has. Raises KatapyError where it cannot be."""

    @abstractmethod
    def plan_uninstall(self, host: Host, name: str, config: str) -> Change | None:
        """Return the change that removes what ``install`` has added, None where there is nothing of it."""

    def warning(self, _host: Host, _config: str) -> str | None:
        """Return why the engine will not use what was installed, None where nothing speaks against it."""
        return None

    @abstractmethod
    def names(self, host: Host) -> list[str]:
        """Return the names under which the engine has katapy. Raises KatapyError where a file cannot be read."""


def parse_toml(text: bytes | None, path: str) -> dict[str, Any]:
    """Return what a file says, nothing where there is none. Raises InvalidArgument."""
    try:
        return tomllib.loads((text or b"").decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        reason = str(error)
        raise InvalidArgument(f"{path} is not TOML: {reason[:1].lower()}{reason[1:]}") from error


def table(document: dict[str, Any], path: str, *keys: str) -> dict[str, Any]:
    """Return the table at ``keys``, an empty one where there is none. Raises InvalidArgument for what is no table."""
    for count, key in enumerate(keys, 1):
        document = document.get(key, {})
        if not isinstance(document, dict):
            raise InvalidArgument(f"{path}: {'.'.join(keys[:count])} is not a table")
    return document


def refuse_other(name: str, path: str) -> AlreadyExists:
    """Return the error for a runtime of this name that is another, or configured by hand in another way."""
    return AlreadyExists(f"{path} has another runtime {name}: take it out, or choose a name by --name")


def refuse_default(name: str, path: str) -> InvalidState:
    """Return the error for the removal of what the engine runs by default."""
    return InvalidState(f"{path} has {name} as the default runtime: choose another there first")


def in_parent(path: Path) -> Path:
    """Return where the copies of a file are kept whose directory is read whole."""
    return path.parent.parent / path.name
