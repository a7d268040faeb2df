"""The tuned kernel's configuration: an option that the kernel drops, for want of another, must not go unnoticed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tuned

FRAGMENT = Path(tuned.__file__).with_name("config.fragment").read_text()
CONFIG = """# Automatically generated file; DO NOT EDIT.
CONFIG_SMP=y
CONFIG_NR_CPUS=256
CONFIG_LOCALVERSION="-katapy"
# CONFIG_VT is not set
CONFIG_MODULES=y
"""
# Built in, each makes a device when the kernel starts: dummy0, ifb0, bond0, sit0, tunl0, gre0, ip_vti0, ip6tnl0, loop0.
UNASKED = """
BONDING DUMMY IFB IPV6_GRE IPV6_SIT IPV6_TUNNEL IPV6_VTI NET_IPGRE NET_IPIP NET_IPVTI
BLK_DEV_LOOP BLK_DEV_NBD BLK_DEV_RAM ZRAM
"""


@pytest.mark.parametrize(
    "line",
    ["CONFIG_SMP=y", "CONFIG_NR_CPUS=256", 'CONFIG_LOCALVERSION="-katapy"', "CONFIG_VT=n", "CONFIG_NEW=n", "# no"],
)
def test_taken(line: str) -> None:
    assert tuned.lost_options(f"\n{line}\n", CONFIG) == []


@pytest.mark.parametrize("line", ["CONFIG_VT=y", "CONFIG_NR_CPUS=25", "CONFIG_MODULES=n", "CONFIG_ERASED=y"])
def test_lost(line: str) -> None:
    assert tuned.lost_options(f"CONFIG_SMP=y\n{line}\n", CONFIG) == [line]


def test_the_fragment_names_each_option_once() -> None:
    names = re.findall(r"^(CONFIG_\w+)=", FRAGMENT, re.MULTILINE)
    assert len(names) > 100
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_the_kernel_makes_no_device_that_nobody_asked_for() -> None:
    """Every container saw an interface dummy0 beside lo."""
    names = {name.removeprefix("CONFIG_") for name in re.findall(r"^(CONFIG_\w+)=", FRAGMENT, re.MULTILINE)}
    assert not names & set(UNASKED.split())
