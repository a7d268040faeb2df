"""How large a VM is for what the container was promised."""

from __future__ import annotations

import json
from typing import Any

import pytest

from katapy.config import Config
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
    ],
)
def test_size(resources: dict[str, Any], size: Size) -> None:
    document = default_spec() | {"linux": {"resources": resources}}
    assert vm_size(Config(), parse_spec(json.dumps(document).encode(), bundle="/bundle"), host_cpus=4) == size
