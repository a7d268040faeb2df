"""Two static x86-64 programs of a few dozen instructions each, so that the bench needs no compiler.

busybox can neither write to a serial port before anything is mounted, nor read a file here and there in one process:
what it would take to start one for each read is many times what the read takes.
"""

from __future__ import annotations

import struct
from typing import Final

_LOAD: Final = 0x400000
_HEADERS: Final = 64 + 56
_READY_PORT: Final = 0x2F8  # of the second serial port
_PAGE_BITS: Final = 12
_SYSCALL: Final = b"\x0f\x05"
_PREAD64, _PAUSE, _EXIT, _IOPERM = 17, 34, 60, 173


def say_ready() -> bytes:
    """Return an init that writes ``ready`` to the VM's second serial port, and then does nothing."""
    code = _mov_edi(_READY_PORT) + b"\xbe\x01\0\0\0" + b"\xba\x01\0\0\0"  # mov esi, 1; mov edx, 1
    code += _mov_eax(_IOPERM) + _SYSCALL
    code += b"\x66\xba" + struct.pack("<H", _READY_PORT)  # mov dx, port
    code += b"".join(b"\xb0" + bytes([byte]) + b"\xee" for byte in b"ready\n")  # mov al, byte; out dx, al
    again = _mov_eax(_PAUSE) + _SYSCALL
    return _elf(code + again + b"\xeb" + struct.pack("<b", -len(again) - 2))  # jmp again


def read_randomly(count: int, size_bits: int) -> bytes:
    """Return a program that reads ``count`` pages of 4 KiB of its standard input, a file of 2^``size_bits`` bytes.

    The offsets are those of a linear congruential generator, the same in each run.
    """
    code = b"\x48\x81\xec" + struct.pack("<I", 1 << _PAGE_BITS)  # sub rsp, 4096: the buffer
    code += b"\xbb" + struct.pack("<I", count)  # mov ebx, count
    code += b"\x41\xbc\x01\0\0\0"  # mov r12d, 1: the seed
    again = b"\x45\x69\xe4" + struct.pack("<I", 1664525)  # imul r12d, r12d, 1664525
    again += b"\x41\x81\xc4" + struct.pack("<I", 1013904223)  # add r12d, 1013904223
    again += b"\x45\x89\xe2"  # mov r10d, r12d
    again += b"\x41\xc1\xea" + bytes([32 - size_bits + _PAGE_BITS])  # shr r10d: its highest bits are a page
    again += b"\x49\xc1\xe2" + bytes([_PAGE_BITS])  # shl r10: the offset
    again += b"\x31\xff" + b"\x48\x89\xe6"  # xor edi, edi; mov rsi, rsp
    again += b"\xba" + struct.pack("<I", 1 << _PAGE_BITS)  # mov edx, 4096
    again += _mov_eax(_PREAD64) + _SYSCALL
    again += b"\xff\xcb"  # dec ebx
    code += again + b"\x75" + struct.pack("<b", -len(again) - 2)  # jnz again
    return _elf(code + b"\x31\xff" + _mov_eax(_EXIT) + _SYSCALL)  # xor edi, edi


def _mov_eax(value: int) -> bytes:
    return b"\xb8" + struct.pack("<I", value)


def _mov_edi(value: int) -> bytes:
    return b"\xbf" + struct.pack("<I", value)


def _elf(code: bytes) -> bytes:
    """Return a static executable of ``code``: elf(5)."""
    size = _HEADERS + len(code)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")  # 64-bit, little endian, version 1
    header = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, _LOAD + _HEADERS, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, _LOAD, _LOAD, size, size, 0x1000)
    return ident + header + load + code
