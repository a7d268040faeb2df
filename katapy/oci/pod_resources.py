"""What all containers of a pod may use together, as who makes the pod says in the annotations of its sandbox.

Kubernetes tells it when the pod is made, since a virtual machine must be as large as it will be needed.
Source: containerd 1.6, pkg/cri/annotations; CRI-O, pkg/annotations (the JSON is LinuxContainerResources of the CRI);
cri-api, runtime/v1, LinuxPodSandboxConfig.resources.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from katapy.jsonfile import parse
from katapy.oci.node import Node, int64, matching

_PREFIX: Final = "io.kubernetes.cri.sandbox-"
_CRIO: Final = ("pod-linux-resources.crio.io", "io.kubernetes.cri-o.PodLinuxResources")
_NUMBER: Final = matching(r"-?\d{1,18}", "a number")


class PodResources(NamedTuple):
    """``memory`` in bytes, ``quota`` and ``period`` of CPU time in microseconds, ``shares``: not above 0 is not known.

    Limits are the sums over those containers that have one.
    """

    memory: int = 0
    quota: int = 0
    period: int = 0
    shares: int = 0


def parse_pod_resources(node: Node, annotations: Mapping[str, str]) -> PodResources:
    """Read the ``annotations``, which are at ``node``. Raises InvalidArgument."""
    for key in _CRIO:
        # Go says null where it has none.
        if (said := annotations.get(key, "")) not in ("", "null"):
            what = f"{node.what}: {node.path}.{key}"
            found = Node(parse(said.encode(), what=what), what)
            return PodResources(
                found.get("memory_limit_in_bytes", int64, 0),
                found.get("cpu_quota", int64, 0),
                found.get("cpu_period", int64, 0),
                found.get("cpu_shares", int64, 0),
            )
    names = ("memory", "cpu-quota", "cpu-period", "cpu-shares")
    return PodResources(*(int(node.get(f"{_PREFIX}{name}", _NUMBER, 0)) for name in names))
