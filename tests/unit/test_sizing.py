"""How large a VM is for what the container was promised."""

from __future__ import annotations

import json
from typing import Any

import pytest

from katapy.config import Config
from katapy.errors import InvalidArgument
from katapy.oci.default import default_spec
from katapy.oci.spec import parse_spec
from katapy.sandbox.sizing import Size, vm_size

MIB = 1 << 20


@pytest.mark.parametrize(
    ("resources", "size"),
    [
        ({}, Size(1, 256 * MIB)),
        ({"memory": {"limit": -1}, "cpu": {"quota": -1}}, Size(1, 256 * MIB)),
        ({"memory": {"limit": 100 * MIB}}, Size(1, 228 * MIB)),
        ({"memory": {"limit": 100 * MIB + 1}}, Size(1, 230 * MIB)),
        ({"cpu": {"quota": 250_000, "period": 100_000}}, Size(3, 256 * MIB)),
        ({"cpu": {"quota": 50_000}}, Size(1, 256 * MIB)),
        ({"cpu": {"quota": 10**12}}, Size(4, 256 * MIB)),
        ({"cpu": {"quota": 200_000, "period": 0}}, Size(2, 256 * MIB)),
        ({"cpu": {"cpus": "0"}}, Size(1, 256 * MIB)),
        ({"cpu": {"cpus": "0-1,2", "quota": 100_000}}, Size(3, 256 * MIB)),
        ({"cpu": {"cpus": "2,0-1", "quota": 400_000}}, Size(4, 256 * MIB)),
        ({"cpu": {"cpus": "7-63"}}, Size(4, 256 * MIB)),
    ],
)
def test_size(resources: dict[str, Any], size: Size) -> None:
    """The last ones did not start: their CPUs could not be set in a guest that had fewer."""
    assert size_of(resources, host_cpus=4) == size


@pytest.mark.parametrize("cpu", [{"quota": 100_000_000}, {"cpus": "0-319"}])
def test_a_vm_has_no_more_cpus_than_qemu_gives(cpu: dict[str, Any]) -> None:
    """On a host with more than 255 CPUs the VM was refused."""
    assert size_of({"cpu": cpu}, host_cpus=320).vcpus == 255


@pytest.mark.parametrize(
    ("pod", "size"),
    [
        ({}, Size(1, 256 * MIB)),
        ({"memory": str(200 * MIB), "cpu-quota": "150000", "cpu-period": "100000"}, Size(2, 328 * MIB)),
        # Of the containers that have none, nothing is said: there is never less than without a pod's limits.
        ({"memory": str(64 * MIB), "cpu-quota": "5000", "cpu-period": "0", "cpu-shares": "2"}, Size(1, 256 * MIB)),
        ({"memory": "0", "cpu-quota": "-1", "cpu-period": "100000"}, Size(1, 256 * MIB)),
        ({"cpu-quota": "90000000000", "cpu-period": "100000"}, Size(4, 256 * MIB)),
    ],
)
def test_size_of_a_pod(pod: dict[str, str], size: Size) -> None:
    annotations = {f"io.kubernetes.cri.sandbox-{name}": value for name, value in pod.items()}
    assert size_of({"cpu": {"shares": 2}}, host_cpus=4, annotations=annotations) == size


@pytest.mark.parametrize("key", ["io.kubernetes.cri-o.PodLinuxResources", "pod-linux-resources.crio.io"])
def test_size_of_a_pod_as_cri_o_says_it(key: str) -> None:
    said = {"memory_limit_in_bytes": 200 * MIB, "cpu_quota": 150_000, "cpu_period": 100_000, "unified": {}}
    assert size_of({}, host_cpus=4, annotations={key: json.dumps(said)}) == Size(2, 328 * MIB)
    for nothing in ("", "null", "{}"):
        assert size_of({}, host_cpus=4, annotations={key: nothing}) == Size(1, 256 * MIB)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("io.kubernetes.cri.sandbox-memory", "1G"),
        ("io.kubernetes.cri.sandbox-memory", "9" * 40),
        ("pod-linux-resources.crio.io", "[]"),
        ("pod-linux-resources.crio.io", '{"cpu_quota": "1"}'),
        ("pod-linux-resources.crio.io", "wrong"),
    ],
)
def test_a_size_that_is_none(key: str, value: str) -> None:
    with pytest.raises(InvalidArgument):
        size_of({}, host_cpus=4, annotations={key: value})


def size_of(resources: dict[str, Any], *, host_cpus: int, annotations: dict[str, str] | None = None) -> Size:
    document = default_spec() | {"linux": {"resources": resources}, "annotations": annotations or {}}
    spec = parse_spec(json.dumps(document).encode(), bundle="/bundle")
    return vm_size(Config(), spec, host_cpus=host_cpus)
