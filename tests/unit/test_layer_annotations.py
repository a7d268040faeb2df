"""The annotations that bound what may be written, and the memory that the host allows for it."""

from __future__ import annotations

import json

import pytest

from katapy.cgroups.layout import Hierarchy, Layout
from katapy.cgroups.limits import pod_memory
from katapy.errors import InvalidArgument
from katapy.oci.default import default_spec
from katapy.oci.layer import INODES, SIZE, LayerLimits
from katapy.oci.spec import Spec, parse_spec
from katapy.sandbox.host_cgroup import boot_limits

MIB = 1 << 20
LAYOUT = Layout((Hierarchy(2, "/c", "/", ("memory", "cpu", "cpuset", "pids", "io"), writable=True),))


def _spec(annotations: dict[str, str]) -> Spec:
    document = {**default_spec(), "annotations": annotations}
    return parse_spec(json.dumps(document).encode(), bundle="/b")


def test_both_bounds_make_a_layer() -> None:
    assert _spec({SIZE: "4096", INODES: "16"}).layer == LayerLimits(4096, 16)
    assert _spec({SIZE: str(1 << 40), INODES: "1000000", "other": "x"}).layer == LayerLimits(1 << 40, 1_000_000)


def test_by_default_there_is_none() -> None:
    assert _spec({}).layer is None
    assert _spec({"io.katapy.layer": "4096"}).layer is None


@pytest.mark.parametrize(
    ("annotations", "problem"),
    [
        ({SIZE: "4096"}, f"{INODES}.*is missing"),
        ({INODES: "16"}, f"{SIZE}.*is missing"),
        ({SIZE: "4095", INODES: "16"}, f"{SIZE}.*4095 is less than 4096"),
        ({SIZE: "4096", INODES: "15"}, f"{INODES}.*15 is less than 16"),
        *(
            ({SIZE: bad, INODES: "16"}, f"{SIZE}.*a number above 0")
            for bad in ("", "0", "-1", "1M", "0x1000", " 4096", "4096\n", "04096", "1e6", "\u0664096", "9" * 19)
        ),
    ],
)
def test_bad_bounds_are_refused_by_name(annotations: dict[str, str], problem: str) -> None:
    with pytest.raises(InvalidArgument, match=problem):
        _spec(annotations)


@pytest.mark.parametrize("emulated", [True, False])
def test_the_memory_of_a_layer_is_added_to_the_limit_of_the_pod(emulated: bool) -> None:
    """Else the host would kill a VM whose container has written what it may write."""
    without, bounded = (
        boot_limits(spec, vcpus=1, memory_bytes=256 * MIB, emulated=emulated, layout=LAYOUT).memory_bytes
        for spec in (_spec({}), _spec({SIZE: str(64 * MIB), INODES: "100"}))
    )
    assert without == pod_memory(256 * MIB, emulated=emulated)
    assert bounded == without + 64 * MIB
