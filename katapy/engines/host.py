"""The file system that an engine lives in: this host's, or another one that is mounted below a directory."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from katapy import jsonfile, run
from katapy.errors import InvalidArgument, KatapyError, NotFound

_LINKS_MAX: Final = 40  # the kernel's
_CHROOT: Final = "/usr/sbin/chroot"
_LIMIT: Final = 1 << 20  # bytes; an engine's configuration has a few thousand


@dataclass(frozen=True)
class Host:
    """Paths are what the engine calls them; ``locate`` says where that is from here."""

    root: Path = Path("/")

    def locate(self, path: str | Path) -> Path:
        """Return where an absolute path of the engine's is, its links followed as there. It need not exist.

        Raises InvalidArgument where links lead in a circle.
        """
        pending, found, links = [*reversed(Path(path).parts[1:])], Path(), 0
        while pending:
            part = pending.pop()
            if part == "..":
                found = found.parent
            elif (self.root / found / part).is_symlink():
                if (links := links + 1) > _LINKS_MAX:
                    raise InvalidArgument(f"{path}: too many symbolic links")
                target = Path(os.readlink(self.root / found / part))
                if target.is_absolute():
                    found = Path()
                pending += reversed(target.parts[1:] if target.is_absolute() else target.parts)
            else:
                found /= part
        return self.root / found

    def read(self, path: str | Path) -> bytes | None:
        """Return what is in a file, None where there is none. Raises InvalidArgument for what is no regular file."""
        try:
            return jsonfile.read(str(self.locate(path)), limit=_LIMIT)
        except NotFound:
            return None

    def glob(self, pattern: str) -> list[str]:
        """Return the files, as the engine calls them, that match a pattern whose last part may have wildcards."""
        directory = self.locate(Path(pattern).parent)
        return sorted(str(Path(pattern).parent / found.name) for found in directory.glob(Path(pattern).name))

    def find_program(self, name: str) -> str | None:
        """Return the path of a program, None where it is not installed."""
        for directory in run.ENVIRONMENT["PATH"].split(":"):
            if os.access(self.locate(f"{directory}/{name}"), os.X_OK):
                return f"{directory}/{name}"
        return None

    def output(self, *argv: str) -> str:
        """Run a program of the engine's own and return what it prints. Raises KatapyError."""
        return run.output(argv if self.root == Path("/") else [_CHROOT, str(self.root), *argv])

    def version(self, program: str) -> tuple[int, ...]:
        """Return the version of an engine's program, empty where it is not installed or does not say."""
        path = self.find_program(program)
        try:
            said = self.output(path, "--version") if path else ""
        except KatapyError:
            return ()
        found = re.search(r"\bv?(\d+)\.(\d+)(?:\.(\d+))?", said)
        return tuple(int(part) for part in found.groups() if part) if found else ()
