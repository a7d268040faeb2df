"""The program that leads connections to the loopback, instruction by instruction, as bpftool would print it."""

from __future__ import annotations

import struct
import sys

import pytest

from katapy.network.loopback import assemble

# Of linux/bpf.h and linux/bpf_common.h, for what the program uses.
LISTING = """
 0: r6 = r1
 1: *(u32 *)(r10 - 4) = 0
 2: r2 = *(u32 *)(r6 + 12)
 3: if r2 != 6 goto 28
 4: r2 = *(u32 *)(r6 + 40)
 5: if r2 == 16777343 goto 15
 6: r2 = *(u32 *)(r6 + 44)
 7: if r2 != 0 goto 28
 8: r2 = *(u32 *)(r6 + 48)
 9: if r2 != 0 goto 28
10: r2 = *(u32 *)(r6 + 52)
11: if r2 != 0 goto 28
12: r2 = *(u32 *)(r6 + 56)
13: if r2 != 16777216 goto 28
14: *(u32 *)(r10 - 4) = 1
15: r2 = r10
16: r2 += -4
17: r1 = map 7
18: second half
19: call 1
20: if r0 == 0 goto 28
21: r7 = r0
22: r1 = r6
23: r2 = r7
24: r3 = 0
25: call 124
26: r1 = r7
27: call 86
28: r0 = 1
29: exit
"""


def listing(program: bytes) -> list[str]:
    """Return what a program does, one instruction a line."""
    lines = []
    for number, (code, registers, offset, value) in enumerate(struct.iter_unpack("=BBhi", program)):
        to, source, place = registers & 15, registers >> 4, number + 1 + offset
        forms = {
            0x00: "second half",
            0x07: f"r{to} += {value}",
            0x15: f"if r{to} == {value} goto {place}",
            0x18: f"r{to} = {'map' if source == 1 else 'constant'} {value}",
            0x55: f"if r{to} != {value} goto {place}",
            0x61: f"r{to} = *(u32 *)(r{source} {offset:+d})".replace("+", "+ ").replace("-", "- "),
            0x62: f"*(u32 *)(r{to} {offset:+d}) = {value}".replace("+", "+ ").replace("-", "- "),
            0x85: f"call {value}",
            0x95: "exit",
            0xB7: f"r{to} = {value}",
            0xBF: f"r{to} = r{source}",
        }
        lines.append(f"{number:2}: {forms[code]}")
    return lines


@pytest.mark.skipif(sys.byteorder != "little", reason="addresses are in the order of the network")
def test_the_instructions() -> None:
    assert listing(assemble(7)) == LISTING.strip("\n").splitlines()
