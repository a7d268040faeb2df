"""Guest images and kernels under a data directory: which there are, which one is booted, adding and removing them.

    image/<digest>/root.erofs, image.json                     digest: SHA-256 of root.erofs
    kernel/<version>/vmlinuz or vmlinux, [initramfs.cpio], kernel.json
    root/<digest>/rootfs/, root.json                          sandboxes' default root; digest: of all in it
    cache/<recipe>/                                           downloads of builds

An asset is its directory: it gets its name by one rename when it is complete, so that a crash leaves nothing
half-made. Only the holder of the lock adds or removes. A running VM has its image open: removing it does not hurt it.
Who uses a root holds it (``hold_root``), and it is not removed.
How images and kernels are made is another matter (``image_build``, guest-kernel/).
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, TypeVar

from katapy import held
from katapy.errors import InvalidArgument, KatapyError, NotFound, Unavailable
from katapy.jsonfile import dump, parse, read, shown
from katapy.tree import empty_directory

DEFAULT_DATA_DIR: Final = Path("/var/lib/katapy")

_SCHEMA: Final = 1
_ROOT: Final = "root.erofs"
_INITRAMFS: Final = "initramfs.cpio"
_KERNELS: Final = ("vmlinux", "vmlinuz")
_IMAGE_JSON: Final = "image.json"
_KERNEL_JSON: Final = "kernel.json"
_ROOT_JSON: Final = "root.json"
_ROOTFS: Final = "rootfs"
_PYTHON: Final = "usr/bin/python3"
_FACTS: Final = "facts.json"
_STAGING: Final = ".build-"
_PREFIX: Final = re.compile(r"[0-9a-f]{4,64}")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")
_BUILD: Final = "run: katapy image build"

_Asset = TypeVar("_Asset", "Image", "Kernel", "Root")


class KernelKind(StrEnum):
    """Where a kernel comes from."""

    DEBIAN = "debian"
    TUNED = "tuned"


@dataclass(frozen=True)
class Image:
    """A guest's root file system; ``created`` in seconds since the epoch, ``inputs`` names what it was made of."""

    digest: str
    path: Path
    size_bytes: int
    created: float
    inputs: str

    @property
    def short_digest(self) -> str:
        """The digest as people are shown it."""
        return self.digest[:12]


@dataclass(frozen=True)
class Kernel:
    """A guest's kernel; ``initramfs`` is None for one that can mount an image by itself."""

    version: str
    kind: KernelKind
    kernel: Path
    initramfs: Path | None
    created: float
    inputs: str


@dataclass(frozen=True)
class Root:
    """The root file system of a sandbox that is given none: the directory ``path``."""

    digest: str
    path: Path
    created: float
    inputs: str

    @property
    def short_digest(self) -> str:
        """The digest as people are shown it."""
        return self.digest[:12]


def find_image(data_dir: Path, choice: str = "auto") -> Image:
    """Return the newest image, or the one whose digest starts with ``choice``.

    Raises NotFound when there is none, Unavailable when one is damaged, InvalidArgument when ``choice`` is unclear.
    """
    if choice != "auto":
        return _load_image(_image_directory(data_dir, choice))
    images, errors = list_images(data_dir)
    if errors:
        raise errors[0]
    if not images:
        raise NotFound(f"no guest image in {data_dir}; {_BUILD}")
    return images[0]


def find_kernel(data_dir: Path, choice: str = "auto") -> Kernel:
    """Return the newest tuned kernel, else Debian's newest; or what ``choice`` says: debian, tuned, a version.

    Raises NotFound when there is none, Unavailable when one is damaged.
    """
    kernels, errors = list_kernels(data_dir)
    if errors:
        raise errors[0]
    kinds = {kind: [kernel for kernel in kernels if kernel.kind is kind] for kind in KernelKind}
    match choice:
        case "auto":
            found = kinds[KernelKind.TUNED] or kinds[KernelKind.DEBIAN]
        case KernelKind.TUNED | KernelKind.DEBIAN:
            found = kinds[KernelKind(choice)]
        case _:
            found = [kernel for kernel in kernels if kernel.version == choice]
    if not found:
        what = "guest kernel" if choice == "auto" else f"guest kernel {shown(choice)}"
        raise NotFound(f"no {what} in {data_dir}; {'run: make guest-kernel' if choice == KernelKind.TUNED else _BUILD}")
    return found[0]


def find_root(data_dir: Path) -> Root:
    """Return the newest default root. Raises NotFound when there is none, Unavailable when one is damaged."""
    roots, errors = list_roots(data_dir)
    if errors:
        raise errors[0]
    if not roots:
        raise NotFound(f"no default root in {data_dir}; {_BUILD}")
    return roots[0]


@contextmanager
def hold_root(data_dir: Path) -> Iterator[Root]:
    """Give the newest default root, which is not removed meanwhile. Raises as ``find_root`` does."""
    while True:
        root = find_root(data_dir)
        with ExitStack() as stack:
            try:
                stack.enter_context(held.hold(root.path.parent))
            except NotFound:  # a newer one has taken its place
                continue
            yield root
            return


def list_images(data_dir: Path) -> tuple[list[Image], list[KatapyError]]:
    """Return the intact images, newest first, and what is wrong with the others."""
    return _load_all(data_dir / "image", _load_image)


def list_kernels(data_dir: Path) -> tuple[list[Kernel], list[KatapyError]]:
    """Return the intact kernels, newest first, and what is wrong with the others."""
    return _load_all(data_dir / "kernel", _load_kernel)


def list_roots(data_dir: Path) -> tuple[list[Root], list[KatapyError]]:
    """Return the intact default roots, newest first, and what is wrong with the others."""
    return _load_all(data_dir / "root", _load_root)


def remove_image(data_dir: Path, prefix: str) -> str:
    """Remove the image whose digest starts with ``prefix``, damaged or not, and return its digest.

    Raises NotFound when there is none, InvalidArgument when several start so.
    """
    with lock(data_dir):
        directory = _image_directory(data_dir, prefix)
        _discard(data_dir, directory)
        return directory.name


def remove_all(data_dir: Path) -> list[str]:
    """Remove all images, kernels and default roots, damaged or not, and what their builds downloaded.

    A root that is in use stays. Returns the names of what was removed.
    """
    with lock(data_dir):
        if (data_dir / "cache").is_dir():
            _remove(data_dir / "cache")
        found = [*_directories(data_dir / "image"), *_directories(data_dir / "kernel")]
        for directory in found:
            _discard(data_dir, directory)
        return [*(directory.name for directory in found), *remove_roots(data_dir)]


def remove_roots(data_dir: Path, *, keep: Root | None = None) -> list[str]:
    """Remove the default roots that nobody uses, but ``keep``, and return their names. Call with the lock."""
    removed = []
    for directory in _directories(data_dir / "root"):
        if keep is None or directory.name != keep.digest:
            with held.claim(directory) as free:
                if free:
                    _discard(data_dir, directory)
                    removed.append(directory.name)
    return removed


@contextmanager
def lock(data_dir: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the data directory, made if it is missing; ``waiting`` is called first if somebody else holds it.

    Raises Unavailable when the directory cannot be written.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o755)
        fd = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise Unavailable(f"cannot write to {data_dir}: {_reason(error)}") from error
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
    with _temporary(data_dir) as directory:
        yield directory


@contextmanager
def _temporary(data_dir: Path) -> Iterator[Path]:
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

    with (built / _ROOT).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    place = data_dir / "image" / digest
    _install(data_dir, built, place, _IMAGE_JSON, inputs=inputs)
    return _load_image(place)


def install_kernel(data_dir: Path, built: Path, *, kind: KernelKind, inputs: str) -> Kernel:
    """Give the finished kernel in the directory ``built`` its place. Call with the lock. Raises Unavailable."""
    version = _read(built / _FACTS).get("version")
    if not isinstance(version, str) or not _NAME.fullmatch(version):
        raise Unavailable(f"cannot install the guest kernel: its build gave no usable version: {version!r}")
    place = data_dir / "kernel" / version
    _install(data_dir, built, place, _KERNEL_JSON, inputs=inputs, kind=kind)
    return _load_kernel(place)


def install_root(data_dir: Path, built: Path, *, inputs: str) -> Root:
    """Give the finished default root in the directory ``built`` its place. Call with the lock. Raises Unavailable.

    Where the same tree is there already it stays, since it may be in use, and only its description is new.
    """
    from katapy import linux

    place = data_dir / "root" / _tree_digest(built / _ROOTFS)
    try:
        facts = {"schema": _SCHEMA, "created": time.time(), "inputs": inputs, "files": {}, **_read(built / _FACTS)}
        (built / _FACTS).unlink()
        if (place / _ROOTFS).is_dir() and _tree_digest(place / _ROOTFS) == place.name:
            _write_json(place / _ROOT_JSON, facts)
        else:
            _write_json(built / _ROOT_JSON, facts)
            built.chmod(0o755)
            _sync(built, linux.syncfs)  # some thousand files
            place.parent.mkdir(exist_ok=True, mode=0o755)
            if place.exists():
                _discard(data_dir, place)
            built.rename(place)
        _sync(place.parent)
    except OSError as error:
        raise Unavailable(f"cannot install {place}: {_reason(error)}") from error
    return _load_root(place)


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


def _install(data_dir: Path, built: Path, place: Path, name: str, **facts: object) -> None:
    try:
        facts |= _read(built / _FACTS)
        (built / _FACTS).unlink()
        sizes = {path.name: path.stat().st_size for path in built.iterdir()}
        (built / name).write_bytes(dump({"schema": _SCHEMA, "created": time.time(), "files": sizes, **facts}))
        for path in built.iterdir():
            path.chmod(0o644)
            _sync(path)
        built.chmod(0o755)
        place.parent.mkdir(exist_ok=True, mode=0o755)
        if place.exists():
            _discard(data_dir, place)
        built.rename(place)
        _sync(place.parent)
    except OSError as error:
        raise Unavailable(f"cannot install {place}: {_reason(error)}") from error


def _discard(data_dir: Path, directory: Path) -> None:
    """Remove an asset: at once, as everybody else sees it."""
    with _temporary(data_dir) as trash:
        directory.rename(trash / directory.name)


def _sync(path: Path, sync: Callable[[int], None] = os.fsync) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync(fd)
    finally:
        os.close(fd)


def _directories(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []


def _image_directory(data_dir: Path, prefix: str) -> Path:
    if not _PREFIX.fullmatch(prefix):
        raise InvalidArgument(f"no guest image {shown(prefix)}: give 4 to 64 digits of its digest")
    found = [directory for directory in _directories(data_dir / "image") if directory.name.startswith(prefix)]
    if not found:
        raise NotFound(f"no guest image {prefix} in {data_dir}; what there is shows: katapy image ls")
    if len(found) > 1:
        raise InvalidArgument(f"{len(found)} guest images start with {prefix}: give more digits")
    return found[0]


def _load_all(parent: Path, load: Callable[[Path], _Asset]) -> tuple[list[_Asset], list[KatapyError]]:
    assets: list[_Asset] = []
    errors: list[KatapyError] = []
    for directory in _directories(parent):
        try:
            assets.append(load(directory))
        except KatapyError as error:
            errors.append(error)
    return sorted(assets, key=lambda asset: asset.created, reverse=True), errors


def _load_image(directory: Path) -> Image:
    with _damage("image", directory):
        document, sizes = _load(directory, _IMAGE_JSON)
        return Image(
            digest=directory.name,
            path=directory / _ROOT,
            size_bytes=sizes[_ROOT],
            created=float(document["created"]),
            inputs=str(document["inputs"]),
        )


def _load_kernel(directory: Path) -> Kernel:
    with _damage("kernel", directory):
        document, sizes = _load(directory, _KERNEL_JSON)
        return Kernel(
            version=directory.name,
            kind=KernelKind(document["kind"]),
            kernel=directory / next(name for name in _KERNELS if name in sizes),
            initramfs=directory / _INITRAMFS if _INITRAMFS in sizes else None,
            created=float(document["created"]),
            inputs=str(document["inputs"]),
        )


def _load_root(directory: Path) -> Root:
    with _damage("root", directory):
        document, _ = _load(directory, _ROOT_JSON)
        if not (directory / _ROOTFS / _PYTHON).exists():
            raise Unavailable(f"{_ROOTFS}/{_PYTHON} is missing")
        return Root(
            digest=directory.name,
            path=directory / _ROOTFS,
            created=float(document["created"]),
            inputs=str(document["inputs"]),
        )


def _load(directory: Path, name: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Return an asset's JSON and its files' sizes, compared with what is there: hashing would cost every start."""
    document = _read(directory / name)
    if document["schema"] != _SCHEMA:
        raise Unavailable("made by another version of katapy")
    sizes = dict(document["files"])
    for file, size in sizes.items():
        if (found := _file_size(directory / file)) != size:
            raise Unavailable(f"{file} has {found} bytes, not {size}")
    return document, sizes


@contextmanager
def _damage(what: str, directory: Path) -> Iterator[None]:
    """Say of an asset what is wrong with it, and what to do."""
    try:
        yield
    except (KatapyError, KeyError, TypeError, ValueError, StopIteration) as error:
        detail = str(error) if isinstance(error, KatapyError) else "its json lacks what it needs"
        hint = f"remove it (rm -r {directory}) and {_BUILD}"
        raise Unavailable(f"guest {what} {directory.name[:32]} is damaged: {detail}; {hint}") from error


def _read(path: Path) -> dict[str, Any]:
    return parse(read(str(path)), what=path.name)


def _file_size(path: Path) -> int:
    """Return the size of a regular file that can be read. Raises Unavailable."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise Unavailable(f"cannot read {path.name}: {_reason(error)}") from error
    try:
        status = os.fstat(fd)
    finally:
        os.close(fd)
    if not stat.S_ISREG(status.st_mode):
        raise Unavailable(f"{path.name} is not a regular file")
    return status.st_size


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
