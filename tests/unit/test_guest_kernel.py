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
