"""Which pod a container belongs to. Whoever starts a shim asks first of all, so nothing is imported here."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

# Who makes a pod's containers says so in annotations: type and sandbox, under the keys of containerd and of CRI-O.
_KEYS = (
    ("io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"),
    ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"),
)
# Who manages a container, as only podman ("libpod") and CRI-O say.
MANAGER = "io.container.manager"


def is_sandbox(annotations: Mapping[str, str]) -> bool:
    """Tell whether a container is the first of a pod, whose VM the others join."""
    return any(annotations.get(kind) == "sandbox" for kind, _ in _KEYS)


def sandbox_of(annotations: Mapping[str, str], *, shares: bool = True) -> str:
    """Return the id of the pod's sandbox that a container joins; empty for one with a VM of its own.

    ``shares`` tells whether it shares namespaces with another. podman names a sandbox in each pod, but one without an
    infra container has none, and in one that shares nothing each container is on its own. From its version 5 on it says
    no type.
    """
    if annotations.get(MANAGER) == "libpod":
        return annotations.get(_KEYS[1][1], "") if shares else ""
    for kind, sandbox in _KEYS:
        if annotations.get(kind) == "container" and annotations.get(sandbox):
            return annotations[sandbox]
    return ""
