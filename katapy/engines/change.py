"""One file that is to be different: shown as a diff, or written so that there is always a whole one."""

from __future__ import annotations

import difflib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from katapy.errors import InvalidState, Unavailable


@dataclass(frozen=True)
class Change:
    """``path`` as it is from here, links followed; None is no file, before or after.

    ``backup`` begins the names of the copies of what was there before; None where all of that was written by katapy.
    """

    path: Path
    before: bytes | None
    after: bytes | None
    backup: Path | None = None

    def diff(self) -> str:
        """Return the change as ``diff -u`` shows it."""
        old, new = ((text or b"").decode(errors="replace").splitlines(True) for text in (self.before, self.after))
        before, after = ("/dev/null" if text is None else str(self.path) for text in (self.before, self.after))
        lines = difflib.unified_diff(old, new, before, after)
        return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)

    def apply(self) -> Path | None:
        """Make the change and return the copy of what was there before, None where there is none.

        Owner, mode and extended attributes stay. Raises InvalidState where the file is no longer as it was read,
        Unavailable where it cannot be written; then it is as it was.
        """
        try:
            if (self.path.read_bytes() if self.path.exists() else None) != self.before:
                raise InvalidState(f"{self.path} has changed meanwhile")
            copy = self._back_up()
            if self.after is None:
                self.path.unlink()
            else:
                self._replace(self.after)
        except OSError as error:
            raise Unavailable(f"cannot write {self.path}: {(error.strerror or str(error)).lower()}") from error
        return copy

    def _back_up(self) -> Path | None:
        if self.before is None or self.backup is None:
            return None
        number = 1
        while True:
            copy = self.backup.with_name(f"{self.backup.name}.katapy-{number}.bak")
            try:
                os.close(os.open(copy, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            except FileExistsError:
                number += 1
                continue
            _write(copy, self.before, like=self.path)
            return copy

    def _replace(self, text: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        os.close(fd)
        try:
            Path(name).chmod(0o644)
            _write(Path(name), text, like=self.path)
            os.replace(name, self.path)
        except BaseException:
            os.unlink(name)
            raise


def _write(path: Path, text: bytes, *, like: Path) -> None:
    with path.open("wb") as file:
        file.write(text)
        if like.exists():
            shutil.copystat(like, path)
            os.chown(path, like.stat().st_uid, like.stat().st_gid)
            os.utime(path)
        file.flush()
        os.fsync(file.fileno())
