"""What of the host a container's guest is given, and the configuration as that guest must see it."""

from __future__ import annotations

from typing import Final, NamedTuple

from katapy.devices import SharedMemory
from katapy.errors import Unsupported
from katapy.jsonfile import printable
from katapy.oci.disk import ROOT_DISK
from katapy.oci.spec import Spec
from katapy.sandbox.container import Container
from katapy.sandbox.host import inherited_limits
from katapy.storage.root_disk import SERIAL
from katapy.storage.shared_dir import SharedBind, SharedTree
from katapy.storage.shared_memory import GUEST_MEMORY, find_shared_memory

# Where the agent mounts disks.
_GUEST_ROOTS: Final = "/run/katapy/roots"


class Shared(NamedTuple):
    """``spec`` is the container's configuration for its guest, ``memory`` what it shares of the guest's own.

    ``root_disk`` is the serial number of the disk that is its root file system, if one is.
    """

    spec: bytes
    memory: tuple[SharedMemory, ...]
    root_disk: str = ""


def check_shareable(spec: Spec, container_id: str, *, pod_root_disk: str) -> None:
    """Raise Unsupported for files of the host that a pod whose root is the disk ``pod_root_disk`` cannot be given.

    Nothing of the host is shared with its VM: it has that one disk.
    """
    if not pod_root_disk:
        return
    if not spec.root_disk:
        problem = f"the root of its pod is a disk ({ROOT_DISK}), and such a pod has one container"
        raise Unsupported(f"cannot create {container_id}: {problem}; give it a pod of its own")
    for bind in spec.bind_mounts:
        if find_shared_memory(bind) is None:
            problem = f"mounts[{bind.index}] binds {printable(bind.source)} of the host"
            hint = f"put it into the disk, or give the container root.path and no {ROOT_DISK}"
            raise Unsupported(f"cannot create {container_id}: its root is a disk, and {problem}; {hint}")


def share(tree: SharedTree | None, container: Container) -> Shared:
    """Put a container's files into the staging tree of its pod. Raises InvalidArgument, Unavailable.

    Where there is none, its root is a disk, and no file of the host is among its mounts.
    """
    spec = container.bundle.spec

    def add(name: str, source: str, *, read_only: bool, recursive: bool) -> str:
        bind = SharedBind(name, source, read_only, recursive)
        assert tree is not None
        container.binds.append(name)
        return tree.add(container.id, bind)

    if spec.root_disk:
        root = f"{_GUEST_ROOTS}/{container.id}/root"
    else:
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
    document = spec.to_guest(root=root, sources=sources, rlimits=inherited_limits())
    return Shared(document, tuple(memory.values()), SERIAL if spec.root_disk else "")
