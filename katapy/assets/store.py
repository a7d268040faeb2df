"""Adding assets to a data directory, and removing them.

Only the holder of the lock does either. A running VM has its image open: removing it does not hurt it. A root that is
in use is not removed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from katapy import held
from katapy.assets.asset import SCHEMA, directories, read_json, reason
from katapy.assets.guest import (
    IMAGE_JSON,
    IMAGE_ROOT,
    KERNEL_JSON,
    Image,
    Kernel,
    KernelKind,
    image_directory,
    load_image,
    load_kernel,
)
from katapy.assets.root import ROOT_JSON, ROOTFS, Root, load_root
from katapy.errors import Unavailable
from katapy.jsonfile import dump
from katapy.tree import empty_directory

_FACTS: Final = "facts.json"
_STAGING: Final = ".build-"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")


@contextmanager
def lock(data_dir: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the data directory, made if it is missing; ``waiting`` is called first if somebody else holds it.

    Raises Unavailable when the directory cannot be written.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o755)
        fd = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise Unavailable(f"cannot write to {data_dir}: {reason(error)}") from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextmanager
def staging(data_dir: Path) -> Iterator[Path]:
    """Give a new directory to build in, gone afterwards; what crashed builds left goes, too. Call with the lock."""
    for stale in data_dir.glob(f"{_STAGING}*"):
        with suppress(OSError):
            _remove(stale)
    import tempfile

    directory = Path(tempfile.mkdtemp(prefix=_STAGING, dir=data_dir))
    try:
        yield directory
    finally:
        _remove(directory)


def _remove(directory: Path) -> None:
    """Remove a directory, but nothing that is mounted in it: what a killed build left may hold the host's /dev."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        empty_directory(fd)
    finally:
        os.close(fd)
    directory.rmdir()


def install_image(data_dir: Path, built: Path, *, inputs: str) -> Image:
    """Give the finished image in the directory ``built`` its place. Call with the lock. Raises Unavailable."""
    import hashlib

    with (built / IMAGE_ROOT).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    place = data_dir / "image" / digest
    _install(data_dir, built, place, IMAGE_JSON, inputs=inputs)
    return load_image(place)


def install_kernel(data_dir: Path, built: Path, *, kind: KernelKind, inputs: str) -> Kernel:
    """Give the finished kernel in the directory ``built`` its place. Call with the lock. Raises Unavailable."""
    version = read_json(built / _FACTS).get("version")
    if not isinstance(version, str) or not _NAME.fullmatch(version):
        raise Unavailable(f"cannot install the guest kernel: its build gave no usable version: {version!r}")
    place = data_dir / "kernel" / version
    _install(data_dir, built, place, KERNEL_JSON, inputs=inputs, kind=kind)
    return load_kernel(place)


def install_root(data_dir: Path, built: Path, *, inputs: str) -> Root:
    """Give the finished default root in the directory ``built`` its place. Call with the lock. Raises Unavailable.

    Where the same tree is there already it stays, since it may be in use, and only its description is new.
    """
    from katapy import linux

    place = data_dir / "root" / _tree_digest(built / ROOTFS)
    try:
        facts = {"schema": SCHEMA, "created": time.time(), "inputs": inputs, "files": {}, **read_json(built / _FACTS)}
        (built / _FACTS).unlink()
        if (place / ROOTFS).is_dir() and _tree_digest(place / ROOTFS) == place.name:
            _write_json(place / ROOT_JSON, facts)
            _sync(place)
        else:
            _write_json(built / ROOT_JSON, facts)
            built.chmod(0o755)
            _sync(built, linux.syncfs)  # some thousand files
            place.parent.mkdir(exist_ok=True, mode=0o755)
            _put(data_dir, built, place)
    except OSError as error:
        raise Unavailable(f"cannot install {place}: {reason(error)}") from error
    return load_root(place)


def remove_image(data_dir: Path, prefix: str) -> str:
    """Remove the image whose digest starts with ``prefix``, damaged or not, and return its digest.

    Raises NotFound when there is none, InvalidArgument when several start so.
    """
    with lock(data_dir):
        directory = image_directory(data_dir, prefix)
        _discard(data_dir, directory)
        return directory.name


def remove_all(data_dir: Path) -> list[str]:
    """Remove all images, kernels and default roots, damaged or not, and what their builds downloaded.

    A root that is in use stays. Returns the names of what was removed.
    """
    with lock(data_dir):
        if (data_dir / "cache").is_dir():
            _remove(data_dir / "cache")
        found = [*directories(data_dir / "image"), *directories(data_dir / "kernel")]
        for directory in found:
            _discard(data_dir, directory)
        return [*(directory.name for directory in found), *remove_roots(data_dir)]


def remove_roots(data_dir: Path, *, keep: Root | None = None) -> list[str]:
    """Remove the default roots that nobody uses, but ``keep``, and return their names. Call with the lock."""
    removed = []
    for directory in directories(data_dir / "root"):
        if keep is None or directory.name != keep.digest:
            with held.claim(directory) as free:
                if free:
                    _discard(data_dir, directory)
                    removed.append(directory.name)
    return removed


def _install(data_dir: Path, built: Path, place: Path, name: str, **facts: object) -> None:
    try:
        facts |= read_json(built / _FACTS)
        (built / _FACTS).unlink()
        sizes = {path.name: path.stat().st_size for path in built.iterdir()}
        (built / name).write_bytes(dump({"schema": SCHEMA, "created": time.time(), "files": sizes, **facts}))
        for path in built.iterdir():
            path.chmod(0o644)
            _sync(path)
        built.chmod(0o755)
        place.parent.mkdir(exist_ok=True, mode=0o755)
        _put(data_dir, built, place)
    except OSError as error:
        raise Unavailable(f"cannot install {place}: {reason(error)}") from error


def _put(data_dir: Path, built: Path, place: Path) -> None:
    """Give what was built its place; what is there already leaves it at that moment, for where the other one was."""
    from katapy import linux

    if not place.exists():
        built.rename(place)
    else:
        try:
            linux.exchange(str(built), str(place))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # This file system cannot do that.
            _discard(data_dir, place)
            built.rename(place)
    _sync(place.parent)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    new = path.with_suffix(".new")
    new.write_bytes(dump(document))
    new.chmod(0o644)
    _sync(new)
    new.rename(path)


def _tree_digest(root: Path) -> str:
    """Return a digest of a tree: names, types, modes, owners and contents, whatever the times."""
    import hashlib

    digest = hashlib.sha256()
    for path in (root, *sorted(root.rglob("*"))):
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            content = os.fsencode(path.readlink())
        else:
            content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        facts = b"%o %d %d %d" % (status.st_mode, status.st_uid, status.st_gid, len(content))
        digest.update(b"%s\0%s\0" % (os.fsencode(path.relative_to(root)), facts))
        digest.update(content)
    return digest.hexdigest()


def _discard(data_dir: Path, directory: Path) -> None:
    """Remove an asset: at once, as everybody else sees it."""
    # No directory to move it into: a disk that is full may have none left.
    trash = data_dir / f"{_STAGING}{os.urandom(8).hex()}"
    directory.rename(trash)
    _remove(trash)


def _sync(path: Path, sync: Callable[[int], None] = os.fsync) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync(fd)
    finally:
        os.close(fd)
