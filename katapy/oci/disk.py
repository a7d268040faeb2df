"""The annotation that gives a container a disk as its root file system, instead of the directory ``root.path``.

``io.katapy.root.disk`` is a raw image of erofs, or a block device that holds one; a relative path starts at the bundle.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

from katapy.oci.node import Node, absolute_path, no_escape, text

ROOT_DISK: Final = "io.katapy.root.disk"


def parse_root_disk(node: Node, annotations: Mapping[str, str], bundle: str) -> str:
    """Read the ``annotations``, which are at ``node``: the disk's absolute path; empty where none is asked for.

    Raises InvalidArgument.
    """
    if ROOT_DISK not in annotations:
        return ""
    path = node.need(ROOT_DISK, lambda each: absolute_path(each) if text(each).startswith("/") else no_escape(each))
    return os.path.normpath(path if path.startswith("/") else f"{bundle}/{path}")
