"""What all assets have in common: each is a directory, with a JSON file that says what has to be in it.

An asset gets its name by one rename when it is complete, so that a crash leaves nothing half-made; one that is not as
its JSON says is damaged, and is not used.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from katapy.errors import KatapyError, NotFound, Unavailable
from katapy.jsonfile import parse, read

DEFAULT_DATA_DIR: Final = Path("/var/lib/katapy")
SCHEMA: Final = 1
BUILD: Final = "run: katapy image build"

AnyAsset = TypeVar("AnyAsset", bound="Asset")


@dataclass(frozen=True, kw_only=True)
class Asset:
    """``created`` in seconds since the epoch, ``inputs`` names what it was made of."""

    created: float
    inputs: str


def load_all(parent: Path, load: Callable[[Path], AnyAsset]) -> tuple[list[AnyAsset], list[KatapyError]]:
    """Return the intact assets in ``parent``, newest first, and what is wrong with the others."""
    assets: list[AnyAsset] = []
    errors: list[KatapyError] = []
    for directory in directories(parent):
        try:
            assets.append(load(directory))
        except KatapyError as error:
            errors.append(error)
    return sorted(assets, key=lambda asset: asset.created, reverse=True), errors


def newest(found: tuple[list[AnyAsset], list[KatapyError]], what: str, data_dir: Path) -> AnyAsset:
    """Return the first of what ``load_all`` has found, called ``what`` in errors.

    Raises NotFound when there is none, Unavailable when one is damaged.
    """
    assets, errors = found
    if errors:
        raise errors[0]
    if not assets:
        raise NotFound(f"no {what} in {data_dir}; {BUILD}")
    return assets[0]


def load(directory: Path, name: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Return an asset's JSON and its files' sizes, compared with what is there: hashing would cost every start.

    Call within ``damage``, which puts what it raises into words.
    """
    document = read_json(directory / name)
    if document["schema"] != SCHEMA:
        raise Unavailable("made by another version of katapy")
    sizes = dict(document["files"])
    for file, size in sizes.items():
        if (found := _file_size(directory / file)) != size:
            raise Unavailable(f"{file} has {found} bytes, not {size}")
    return document, sizes


@contextmanager
def damage(what: str, directory: Path) -> Iterator[None]:
    """Say of an asset what is wrong with it, and what to do."""
    try:
        yield
    except (KatapyError, KeyError, TypeError, ValueError, StopIteration) as error:
        detail = str(error) if isinstance(error, KatapyError) else "its json lacks what it needs"
        hint = f"remove it (rm -r {directory}) and {BUILD}"
        raise Unavailable(f"guest {what} {directory.name[:32]} is damaged: {detail}; {hint}") from error


def directories(parent: Path) -> list[Path]:
    """Return the assets' directories in ``parent``, damaged or not."""
    return sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []


def read_json(path: Path) -> dict[str, Any]:
    """Return what is in a JSON file. Raises KatapyError."""
    return parse(read(str(path)), what=path.name)


def _file_size(path: Path) -> int:
    """Return the size of a regular file that can be read. Raises Unavailable."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise Unavailable(f"cannot read {path.name}: {reason(error)}") from error
    try:
        status = os.fstat(fd)
    finally:
        os.close(fd)
    if not stat.S_ISREG(status.st_mode):
        raise Unavailable(f"{path.name} is not a regular file")
    return status.st_size


def reason(error: OSError) -> str:
    """Return what went wrong, as it is told in a message."""
    return (error.strerror or str(error)).lower()
