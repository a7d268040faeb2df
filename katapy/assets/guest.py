"""What a VM boots: guest images and kernels, which there are, and which one it is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from katapy.assets.asset import BUILD, Asset, damage, directories, load, load_all, newest
from katapy.errors import InvalidArgument, KatapyError, NotFound
from katapy.jsonfile import shown

IMAGE_ROOT: Final = "root.erofs"
IMAGE_JSON: Final = "image.json"
KERNEL_JSON: Final = "kernel.json"

_INITRAMFS: Final = "initramfs.cpio"
_KERNELS: Final = ("vmlinux", "vmlinuz")
_PREFIX: Final = re.compile(r"[0-9a-f]{4,64}")


class KernelKind(StrEnum):
    """Where a kernel comes from."""

    DEBIAN = "debian"
    TUNED = "tuned"


@dataclass(frozen=True, kw_only=True)
class Image(Asset):
    """A guest's root file system."""

    digest: str
    path: Path
    size_bytes: int

    @property
    def short_digest(self) -> str:
        """The digest as people are shown it."""
        return self.digest[:12]


@dataclass(frozen=True, kw_only=True)
class Kernel(Asset):
    """A guest's kernel; ``initramfs`` is None for one that can mount an image by itself."""

    version: str
    kind: KernelKind
    kernel: Path
    initramfs: Path | None


def find_image(data_dir: Path, choice: str = "auto") -> Image:
    """Return the newest image, or the one whose digest starts with ``choice``.

    Raises NotFound when there is none, Unavailable when one is damaged, InvalidArgument when ``choice`` is unclear.
    """
    if choice != "auto":
        return load_image(image_directory(data_dir, choice))
    return newest(list_images(data_dir), "guest image", data_dir)


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
        raise NotFound(f"no {what} in {data_dir}; {'run: make guest-kernel' if choice == KernelKind.TUNED else BUILD}")
    return found[0]


def list_images(data_dir: Path) -> tuple[list[Image], list[KatapyError]]:
    """Return the intact images, newest first, and what is wrong with the others."""
    return load_all(data_dir / "image", load_image)


def list_kernels(data_dir: Path) -> tuple[list[Kernel], list[KatapyError]]:
    """Return the intact kernels, newest first, and what is wrong with the others."""
    return load_all(data_dir / "kernel", load_kernel)


def image_directory(data_dir: Path, prefix: str) -> Path:
    """Return the directory of the image whose digest starts with ``prefix``, damaged or not.

    Raises NotFound when there is none, InvalidArgument when several start so.
    """
    if not _PREFIX.fullmatch(prefix):
        raise InvalidArgument(f"no guest image {shown(prefix)}: give 4 to 64 digits of its digest")
    found = [directory for directory in directories(data_dir / "image") if directory.name.startswith(prefix)]
    if not found:
        raise NotFound(f"no guest image {prefix} in {data_dir}; what there is shows: katapy image ls")
    if len(found) > 1:
        raise InvalidArgument(f"{len(found)} guest images start with {prefix}: give more digits")
    return found[0]


def load_image(directory: Path) -> Image:
    """Return the image in ``directory``. Raises Unavailable when it is damaged."""
    with damage("image", directory):
        document, sizes = load(directory, IMAGE_JSON)
        return Image(
            digest=directory.name,
            path=directory / IMAGE_ROOT,
            size_bytes=sizes[IMAGE_ROOT],
            created=float(document["created"]),
            inputs=str(document["inputs"]),
        )


def load_kernel(directory: Path) -> Kernel:
    """Return the kernel in ``directory``. Raises Unavailable when it is damaged."""
    with damage("kernel", directory):
        document, sizes = load(directory, KERNEL_JSON)
        return Kernel(
            version=directory.name,
            kind=KernelKind(document["kind"]),
            kernel=directory / next(name for name in _KERNELS if name in sizes),
            initramfs=directory / _INITRAMFS if _INITRAMFS in sizes else None,
            created=float(document["created"]),
            inputs=str(document["inputs"]),
        )
