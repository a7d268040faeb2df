"""A bounded writable layer over a container's root file system, as two annotations ask for it.

    io.katapy.layer.size     bytes that may be written in all
    io.katapy.layer.inodes   files and directories that may be made in all

The root itself is then never changed. A pod's containers that have the same root have the same layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from katapy.oci.node import Node, matching

SIZE: Final = "io.katapy.layer.size"
INODES: Final = "io.katapy.layer.inodes"
_PAGE: Final = 4096
# Some of them are the layer's own.
_INODES_MIN: Final = 16
_NUMBER: Final = matching(r"[1-9]\d{0,17}", "a number above 0")


class LayerLimits(NamedTuple):
    """What may be written: ``size_bytes``, and ``inodes`` in number."""

    size_bytes: int
    inodes: int


def parse_layer(node: Node, annotations: Mapping[str, str]) -> LayerLimits | None:
    """Read the ``annotations``, which are at ``node``; None where none is asked for. Raises InvalidArgument."""
    if SIZE not in annotations and INODES not in annotations:
        return None
    size, inodes = (int(node.need(name, _NUMBER)) for name in (SIZE, INODES))
    if size < _PAGE:
        node.child(SIZE).fail(f"{size} is less than {_PAGE}")
    if inodes < _INODES_MIN:
        node.child(INODES).fail(f"{inodes} is less than {_INODES_MIN}")
    return LayerLimits(size, inodes)
