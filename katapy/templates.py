"""VM templates under a data directory: which there are, taking one, adding, checking and removing them.

    templates/<key>/template.json, state, ram, map      key: SHA-256 of all that the saved VM depends on
    templates/<key>/checked                             which files were found intact, during this boot
    templates/<key>.lock                                held by whoever makes it

A template gets its name by one rename when it is complete, and loses it by another: whoever has opened its files is
not hurt by that. Its files are hashed at the first use in each boot of the host, and again whenever anything about
them has changed; in between, a look at their inodes is enough. How a VM is saved and restored is ``hypervisor``'s.
"""

from __future__ import annotations

import array
import hashlib
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from katapy.errors import InvalidArgument, KatapyError, NotFound, Unavailable
from katapy.jsonfile import dump, parse, read, shown

DIRECTORY: Final = "templates"
"""What the directory is called in the data directory."""

RAM: Final = "ram"
STATE: Final = "state"
_MAP: Final = "map"
_JSON: Final = "template.json"
_CHECKED: Final = "checked"
_SCHEMA: Final = 1
_KEY: Final = re.compile(r"[0-9a-f]{64}")
_PREFIX: Final = re.compile(r"[0-9a-f]{4,64}")
_STAGING: Final = ".new-"
_TRASH: Final = ".old-"
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_RUNS_MAX: Final = 64 << 20  # bytes

Run = tuple[int, int]


@dataclass(frozen=True)
class Template:
    """A VM that was saved.

    ``shape`` says for people what it was made of, ``created`` and ``used`` are seconds since the epoch, ``size_bytes``
    what it takes on disk. ``content`` is a hash of its files, which one that is made anew has another of.
    """

    key: str
    directory: Path
    shape: dict[str, Any]
    created: float
    used: float
    size_bytes: int
    content: str

    @property
    def short_key(self) -> str:
        """The key as people are shown it."""
        return self.key[:12]

    def runs(self) -> tuple[Run, ...]:
        """Return which parts of the guest's memory the file ``ram`` holds: offset and length in bytes, in order."""
        numbers = array.array("Q", read(str(self.directory / _MAP), limit=_RUNS_MAX))
        return tuple(zip(numbers[::2], numbers[1::2], strict=True))


def find(directory: Path, key: str) -> Template | None:
    """Return the template called ``key``, intact and marked as used; None where there is none.

    Raises Unavailable for one that is damaged.
    """
    place = directory / key
    try:
        template = _load(place)
        _check(template, thorough=False)
        _mark_used(place)
    except (NotFound, FileNotFoundError):
        if place.exists():
            raise _incomplete(key) from None
        return None
    return template


def list_templates(directory: Path) -> tuple[list[Template], list[KatapyError]]:
    """Return the templates, the one used last first, and what is wrong with others. Contents are not hashed."""
    found: list[Template] = []
    errors: list[KatapyError] = []
    for place in _places(directory):
        try:
            found.append(_load(place))
        except KatapyError as error:
            errors.append(error)
        except FileNotFoundError:
            if place.exists():
                errors.append(_incomplete(place.name))
    return sorted(found, key=lambda template: template.used, reverse=True), errors


def verify(directory: Path, prefix: str) -> Template:
    """Read a template, named by the start of its key, as a whole. Raises Unavailable when it is damaged, NotFound."""
    template = _load(_place(directory, prefix))
    _check(template, thorough=True)
    return template


def remove(directory: Path, prefix: str) -> str:
    """Remove a template, named by the start of its key, damaged or not; return the key. Raises NotFound."""
    place = _place(directory, prefix)
    discard(directory, place.name)
    return place.name


def remove_all(directory: Path) -> list[str]:
    """Remove all templates, and what crashed makers left. Returns the keys."""
    keys = [place.name for place in _places(directory)]
    for key in keys:
        discard(directory, key)
    for left in [*directory.glob(f"{_STAGING}*"), *directory.glob(f"{_TRASH}*")]:
        _remove_tree(left)
    return keys


def discard(directory: Path, key: str) -> None:
    """Remove the template ``key`` if there is one: at once, as everybody else sees it."""
    # No directory to move it into: a disk that is full may have none left.
    trash = directory / f"{_TRASH}{os.urandom(8).hex()}"
    try:
        with suppress(FileNotFoundError):
            (directory / key).rename(trash)
        (directory / f"{key}.lock").unlink(missing_ok=True)
    finally:
        _remove_tree(trash)


def prepare(directory: Path, key: str) -> Path:
    """Return a new directory to put ``ram`` and ``state`` into; what a crashed maker of ``key`` left goes.

    Call with the lock of ``key``. Raises Unavailable.
    """
    staging = directory / f"{_STAGING}{key}"
    try:
        _remove_tree(staging)
        staging.mkdir(mode=0o700)
    except OSError as error:
        raise Unavailable(f"cannot make a template in {directory}: {error.strerror}") from error
    return staging


def abandon(directory: Path, key: str) -> None:
    """Remove what was put into the prepared directory. Call with the lock of ``key``."""
    _remove_tree(directory / f"{_STAGING}{key}")


def install(directory: Path, key: str, *, shape: dict[str, Any], runs: tuple[Run, ...]) -> Template:
    """Give what was put into the prepared directory its place as the template ``key``. Call with its lock.

    Raises Unavailable.
    """
    staging, place = directory / f"{_STAGING}{key}", directory / key
    try:
        (staging / _MAP).write_bytes(array.array("Q", [number for run in runs for number in run]).tobytes())
        hashes = {name: _hash(staging / name) for name in (RAM, STATE, _MAP)}
        facts = {"schema": _SCHEMA, "created": time.time(), "sha256": hashes, "shape": shape}
        (staging / _JSON).write_bytes(dump(facts))
        for path in (*staging.iterdir(), staging):
            path.chmod(0o700 if path.is_dir() else 0o600)
            _sync(path)
        if place.exists():
            discard(directory, key)
        staging.rename(place)
        _sync(directory)
    except OSError as error:
        raise Unavailable(f"cannot install template {key[:12]}: {error.strerror}") from error
    template = _load(place)
    _remember(template)
    return template


def prune(directory: Path, *, count: int, size_bytes: int) -> list[str]:
    """Remove the templates that were not used for longest, down to ``count`` of ``size_bytes`` together.

    The newest stays in any case. Returns the keys of what went; what is damaged goes, too.
    """
    kept, errors = list_templates(directory)
    whole = {template.key for template in kept}
    gone = [place.name for place in _places(directory) if place.name not in whole] if errors else []
    while len(kept) > 1 and (len(kept) > count or sum(template.size_bytes for template in kept) > size_bytes):
        gone.append(kept.pop().key)
    for key in gone:
        discard(directory, key)
    return gone


def _mark_used(place: Path) -> None:
    try:
        os.utime(place)
    except FileNotFoundError:
        raise
    except OSError:
        # On a file system that is read-only none makes room for another either.
        return


def _incomplete(key: str) -> Unavailable:
    return Unavailable(f"template {key[:12]} is damaged: files are missing")


def _places(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _KEY.fullmatch(path.name) and path.is_dir())


def _place(directory: Path, prefix: str) -> Path:
    if not _PREFIX.fullmatch(prefix):
        raise InvalidArgument(f"no template {shown(prefix)}: give 4 to 64 digits of its key")
    found = [place for place in _places(directory) if place.name.startswith(prefix)]
    if not found:
        raise NotFound(f"no template {prefix} in {directory}; what there is shows: katapy template ls")
    if len(found) > 1:
        raise InvalidArgument(f"{len(found)} templates start with {prefix}: give more digits")
    return found[0]


def _load(place: Path) -> Template:
    try:
        document = _document(place)
        status = place.stat()
        # Not all that is there: another start may be replacing what it notes of it.
        files = [(place / name).stat() for name in (RAM, STATE, _MAP, _JSON)]
        return Template(
            key=place.name,
            directory=place,
            shape=dict(document["shape"]),
            created=float(document["created"]),
            used=status.st_mtime,
            size_bytes=sum(file.st_blocks * 512 for file in files),
            content=hashlib.sha256(dump(document["sha256"])).hexdigest(),
        )
    except (KeyError, TypeError, ValueError, InvalidArgument) as error:
        raise Unavailable(f"template {place.name[:12]} is damaged: {_JSON} does not hold what it should") from error


def _document(place: Path) -> dict[str, Any]:
    document = parse(read(str(place / _JSON)), what=_JSON)
    if document["schema"] != _SCHEMA:
        raise ValueError(document["schema"])
    return document


def _check(template: Template, *, thorough: bool) -> None:
    """Raise Unavailable unless the files are what was installed, by their inodes or ``thorough``ly by their bytes."""
    if not thorough and _recall(template) == _fingerprint(template):
        return
    hashes = _document(template.directory)["sha256"]
    for name in (RAM, STATE, _MAP):
        if _hash(template.directory / name) != hashes.get(name):
            raise Unavailable(f"template {template.short_key} is damaged: {name} is not what was saved")
    _remember(template)


def _fingerprint(template: Template) -> dict[str, Any]:
    """Return what changes with any write to the files, and with a new boot of the host."""
    files = {name: (template.directory / name).stat() for name in (RAM, STATE, _MAP, _JSON)}
    inodes = {
        name: [file.st_ino, file.st_size, file.st_mtime_ns, file.st_ctime_ns, file.st_uid, file.st_mode]
        for name, file in files.items()
    }
    return {"boot_id": _BOOT_ID.read_text().strip(), **inodes}


def _recall(template: Template) -> dict[str, Any] | None:
    try:
        return parse(read(str(template.directory / _CHECKED)), what=_CHECKED)
    except KatapyError:
        return None


def _remember(template: Template) -> None:
    # Where that is not possible, the next start hashes again.
    with suppress(OSError):
        temporary = template.directory / f"{_CHECKED}.{os.getpid()}"
        temporary.touch(mode=0o600)
        temporary.write_bytes(dump(_fingerprint(template)))
        temporary.rename(template.directory / _CHECKED)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _remove_tree(path: Path | str) -> None:
    import shutil  # only for what is seldom done: it costs as much as all that a start needs of this module

    shutil.rmtree(path, ignore_errors=True)
