"""The root file system of sandboxes that are given none: which there are, which one is used, and holding it.

Who uses a root holds it (``hold_root``), and it is not removed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from katapy import held
from katapy.assets.asset import Asset, damage, load, load_all, newest
from katapy.errors import KatapyError, NotFound, Unavailable

ROOT_JSON: Final = "root.json"
ROOTFS: Final = "rootfs"

_PYTHON: Final = "usr/bin/python3"


@dataclass(frozen=True, kw_only=True)
class Root(Asset):
    """The root file system of a sandbox that is given none: the directory ``path``."""

    digest: str
    path: Path

    @property
    def short_digest(self) -> str:
        """The digest as people are shown it."""
        return self.digest[:12]


def find_root(data_dir: Path) -> Root:
    """Return the newest default root. Raises NotFound when there is none, Unavailable when one is damaged."""
    return newest(list_roots(data_dir), "default root", data_dir)


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


def list_roots(data_dir: Path) -> tuple[list[Root], list[KatapyError]]:
    """Return the intact default roots, newest first, and what is wrong with the others."""
    return load_all(data_dir / "root", load_root)


def load_root(directory: Path) -> Root:
    """Return the default root in ``directory``. Raises Unavailable when it is damaged."""
    with damage("root", directory):
        document, _ = load(directory, ROOT_JSON)
        if not (directory / ROOTFS / _PYTHON).exists():
            raise Unavailable(f"{ROOTFS}/{_PYTHON} is missing")
        return Root(
            digest=directory.name,
            path=directory / ROOTFS,
            created=float(document["created"]),
            inputs=str(document["inputs"]),
        )
