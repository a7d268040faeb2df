"""Root file systems of OCI images: unpacked once, and kept in a cache by the digest of the image.

    <cache>/<digest>/rootfs/, image.json     the root, and what its configuration says
    <cache>/lock                             held by whoever adds or removes

A root gets its name by one rename when it is complete and on the disk, so that a crash leaves nothing half-made under
it. Users hold a root (``katapy.held``), and it is not removed; of the others, the least recently used go when there
are too many or when they are too large. The cache is nobody's but root's: images hold programs with set-user-id.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from katapy import held, jsonfile, linux
from katapy.errors import InvalidArgument, KatapyError, NotFound, PermissionDenied, Unavailable
from katapy.jsonfile import printable
from katapy.storage.image_config import ImageConfig
from katapy.storage.image_layout import Image, Layer, find_image
from katapy.storage.image_source import Source, Unpacked, Verified, open_source, sniff_compression, split_reference
from katapy.storage.unpack import Budget, Limits, unpack_layer
from katapy.tree import empty_directory

DEFAULT_CACHE: Final = Path("/var/lib/katapy/roots")

_SCHEMA: Final = 1
_ROOTFS: Final = "rootfs"
_JSON: Final = "image.json"
_STAGING: Final = ".unpack-"
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW


@dataclass(frozen=True)
class ImageRoot:
    """An unpacked image: its root file system is the directory ``path``; ``digest`` names the image."""

    path: Path
    digest: str
    config: ImageConfig


@dataclass(frozen=True)
class CacheSize:
    """How many roots are kept, and how many bytes of unpacked layers; those in use stay beyond that."""

    roots: int = 32
    total_bytes: int = 20 << 30


@contextmanager
def open_root(
    layout: str,
    *,
    cache: Path = DEFAULT_CACHE,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    size: CacheSize = CacheSize(),
) -> Iterator[ImageRoot]:
    """Give the root of the image LAYOUT[:TAG], unpacked if it is not yet; it is not removed meanwhile.

    The layout is a directory or an archive as the OCI specifies it, or an archive of `docker save`. Nobody may write
    to the root: others use it, too. Needs root. Raises NotFound when there is no such image, InvalidArgument for one
    that is damaged or beyond the ``limits``, Unsupported for one that katapy cannot use, Unavailable where the cache
    cannot be written.
    """
    if os.geteuid() != 0:
        raise PermissionDenied("cannot unpack an image: only root can give files their owners")
    path, tag = split_reference(layout)
    _make_cache(cache)
    what = printable(str(path))
    with ExitStack() as stack:
        with open_source(path, limits, temporary=cache) as source:
            image = find_image(source, what, tag, limits)
            while not _hold(stack, _place(cache, image.digest)):
                with _lock(cache):
                    _make(source, image, cache, what, limits)
                    _evict(cache, size, keep=image.digest)
        yield ImageRoot(_place(cache, image.digest) / _ROOTFS, image.digest, image.config)


def remove_unused(cache: Path = DEFAULT_CACHE) -> list[str]:
    """Remove all roots that nobody uses, and return their names. Raises Unavailable."""
    if not cache.is_dir():
        return []
    with _lock(cache):
        return [directory.name for directory in _entries(cache) if _remove_unheld(directory)]


def _hold(stack: ExitStack, place: Path) -> bool:
    """Hold an unpacked image until the end of ``stack``, and note that it was used. Returns whether it is there."""
    with ExitStack() as ours:
        try:
            fd = ours.enter_context(held.hold(place))
            _read(place)
        except KatapyError:
            return False
        # The kernel's own clock for this is coarse: two uses in one tick would be the same.
        os.utime(fd, ns=(time.time_ns(), time.time_ns()))
        stack.push(ours.pop_all())
    return True


def _make(source: Source, image: Image, cache: Path, what: str, limits: Limits) -> None:
    """Unpack an image unless somebody else has done it by now; one that is damaged is made anew. Call with the lock."""
    place = _place(cache, image.digest)
    try:
        _read(place)
    except KatapyError as error:
        if place.exists() and not _remove_unheld(place):
            raise Unavailable(f"the unpacked image {place} is damaged, and in use: {error}") from error
        _unpack(source, image, cache, what, limits)


def _unpack(source: Source, image: Image, cache: Path, what: str, limits: Limits) -> None:
    budget = Budget(limits, what)
    _sweep(cache)
    with _host_errors(f"cannot unpack {what} in {cache}"):
        staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=cache))
        try:
            (staging / _ROOTFS).mkdir(mode=0o755)
            fd = os.open(staging / _ROOTFS, _DIRECTORY)
            try:
                os.fchmod(fd, 0o755)
                for number, layer in enumerate(image.layers, start=1):
                    _unpack_layer(source, layer, fd, budget, f"{what}: layer {number}")
            finally:
                os.close(fd)
            (staging / _JSON).write_bytes(_describe(image, budget))
            _sync(staging)
            staging.rename(_place(cache, image.digest))
        finally:
            if staging.exists():
                _remove(staging)


def _unpack_layer(source: Source, layer: Layer, root_fd: int, budget: Budget, what: str) -> None:
    with source.open(layer.name) as file:
        compression = sniff_compression(file) if layer.compression is None else layer.compression
        blob = Verified(file, layer.digest, layer.size, what)
        archive = Verified(Unpacked(blob, compression, budget, what), layer.diff_id, None, f"{what}, unpacked")
        unpack_layer(archive, root_fd, budget, what=what)
        # The digests are of all there is, also behind the end of the archive.
        archive.finish()
        blob.finish()


def _describe(image: Image, budget: Budget) -> bytes:
    return jsonfile.dump({"schema": _SCHEMA, "digest": image.digest, "bytes": budget.total_bytes})


def _read(place: Path) -> dict[str, Any]:
    """Return what image.json says of a root that is there. Raises KatapyError."""
    document = jsonfile.parse(jsonfile.read(str(place / _JSON), what=_JSON), what=_JSON)
    if document.get("schema") != _SCHEMA or not isinstance(document.get("bytes"), int):
        raise InvalidArgument(f"{_JSON}: made by another version of katapy")
    if not (place / _ROOTFS).is_dir():
        raise NotFound(f"{_ROOTFS}: no such directory")
    return document


# The cache


def _make_cache(cache: Path) -> None:
    with _host_errors(f"cannot use {cache}"):
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        cache.chmod(0o700)


@contextmanager
def _lock(cache: Path) -> Iterator[None]:
    """Hold the cache to add or remove: one after the other, since all that takes long is bound by the disk."""
    with _host_errors(f"cannot use {cache}"):
        fd = os.open(cache / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _place(cache: Path, digest: str) -> Path:
    return cache / digest.partition(":")[2]


def _entries(cache: Path) -> list[Path]:
    """Return the roots, the least recently used first."""
    found = [path for path in cache.iterdir() if not path.name.startswith(".") and path.is_dir()]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def _evict(cache: Path, size: CacheSize, *, keep: str) -> None:
    """Remove the least recently used roots that are too many or too large and that nobody holds."""
    entries = _entries(cache)
    sizes = {entry: _size(entry) for entry in entries}
    for entry in entries:
        if len(sizes) <= size.roots and sum(sizes.values()) <= size.total_bytes:
            return
        if entry != _place(cache, keep) and _remove_unheld(entry):
            del sizes[entry]


def _size(entry: Path) -> int:
    try:
        return int(_read(entry)["bytes"])
    except KatapyError:
        return 0


def _sweep(cache: Path) -> None:
    """Remove what unpacking has left that did not come to its end: with the lock, nobody is about it."""
    for path in cache.glob(f"{_STAGING}*"):
        _remove(path)


def _remove_unheld(directory: Path) -> bool:
    with held.claim(directory) as free:
        if free:
            # Under another name first: a crash must not leave half of a root under its own.
            trash = directory.with_name(f"{_STAGING}{directory.name}")
            directory.rename(trash)
            _remove(trash)
    return free


def _remove(directory: Path) -> None:
    fd = os.open(directory, _DIRECTORY)
    try:
        empty_directory(fd)
    finally:
        os.close(fd)
    directory.rmdir()


def _sync(directory: Path) -> None:
    fd = os.open(directory, _DIRECTORY)
    try:
        linux.syncfs(fd)
    finally:
        os.close(fd)


@contextmanager
def _host_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Unavailable(f"{what}: {(error.strerror or str(error)).lower()}") from error
