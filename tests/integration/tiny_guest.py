"""Guests of a few dozen instructions that QEMU boots in milliseconds: what the host sees of them is all they do.

A guest is a PVH kernel as vmlinux is one (Xen's docs/misc/pvh.pandoc): an ELF file whose note names the entry point,
to which the firmware jumps in 32-bit protected mode.
"""

from __future__ import annotations

import struct
from typing import Final

CONSOLE: Final = 0x3F8
READY: Final = 0x2F8
_RESET: Final = 0xCF9
_LOAD: Final = 0x100000
_PHYS32_ENTRY: Final = 18

HALT: Final = b"\xfa\xf4\xeb\xfd"  # cli; again: hlt; jmp again


def write(port: int, text: bytes) -> bytes:
    """Return code that writes ``text`` to a serial port."""
    select = b"\x66\xba" + struct.pack("<H", port)  # mov dx, port
    return select + b"".join(b"\xb0" + bytes([byte]) + b"\xee" for byte in text)  # mov al, byte; out dx, al


def reset() -> bytes:
    """Return code that resets the machine."""
    return write(_RESET, b"\x06")


def forever(code: bytes) -> bytes:
    """Return code that repeats ``code`` without end."""
    return code + b"\xe9" + struct.pack("<i", -len(code) - 5)  # jmp code


def kernel(code: bytes) -> bytes:
    """Return the file."""
    # A note of type 18 (XEN_ELFNOTE_PHYS32_ENTRY) names the entry point.
    note = struct.pack("<III4sI", 4, 4, _PHYS32_ENTRY, b"Xen\0", _LOAD)
    headers = 64 + 2 * 56
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")  # 64-bit, little endian, version 1
    elf = ident + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, _LOAD, 64, 0, 0, 64, 56, 2, 64, 0, 0)
    load = _program_header(1, headers + len(note), _LOAD, len(code))
    notes = _program_header(4, headers, 0, len(note))
    # QEMU reads the first 8 KiB, whatever the headers say.
    return (elf + load + notes + note + code).ljust(8192, b"\0")


def _program_header(kind: int, offset: int, address: int, size: int) -> bytes:
    return struct.pack("<IIQQQQQQ", kind, 7, offset, address, address, size, size, 4)
