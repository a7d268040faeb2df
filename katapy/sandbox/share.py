"""What of the host a container's guest is given, and the configuration as that guest must see it."""

from __future__ import annotations

from typing import NamedTuple

from katapy.devices import SharedMemory
from katapy.sandbox.container import Container
from katapy.sandbox.host import inherited_limits
from katapy.storage.shared_dir import SharedBind, SharedTree
from katapy.storage.shared_memory import GUEST_MEMORY, find_shared_memory


class Shared(NamedTuple):
    """``spec`` is the container's configuration for its guest, ``memory`` what it shares of the guest's own."""

    spec: bytes
    memory: tuple[SharedMemory, ...]


def share(tree: SharedTree, container: Container) -> Shared:
    """Put a container's files into the staging tree of its pod. Raises InvalidArgument, Unavailable."""
    spec = container.bundle.spec

    def add(name: str, source: str, *, read_only: bool, recursive: bool) -> str:
        bind = SharedBind(name, source, read_only, recursive)
        container.binds.append(name)
        return tree.add(container.id, bind)

    root = add("rootfs", container.rootfs, read_only=spec.root.read_only, recursive=True)
    sources: dict[int, str] = {}
    memory: dict[str, SharedMemory] = {}
    for bind in spec.bind_mounts:
        if (found := find_shared_memory(bind)) is not None:
            memory[found.name] = found
            sources[bind.index] = f"{GUEST_MEMORY}/{found.name}"
        else:
            name = f"mount{bind.index}"
            sources[bind.index] = add(name, bind.source, read_only=bind.read_only, recursive=bind.recursive)
    return Shared(spec.to_guest(root=root, sources=sources, rlimits=inherited_limits()), tuple(memory.values()))
