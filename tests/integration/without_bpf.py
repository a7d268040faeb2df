"""Runs a program for which bpf(2) fails with EPERM, as in a container of docker's: ``without_bpf.py ARGV...``."""

from __future__ import annotations

import ctypes
import os
import struct
import sys

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
SECCOMP_RET_ERRNO, SECCOMP_RET_ALLOW, EPERM, SYS_BPF = 0x50000, 0x7FFF0000, 1, 321
# struct sock_filter: load the number of the system call; where it is bpf's, the next instruction, else the one after.
FILTER = [
    (0x20, 0, 0, 0),
    (0x15, 0, 1, SYS_BPF),
    (0x06, 0, 0, SECCOMP_RET_ERRNO | EPERM),
    (0x06, 0, 0, SECCOMP_RET_ALLOW),
]


def main() -> None:
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in FILTER))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(FILTER), ctypes.addressof(instructions)))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0)):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "prctl")
    os.execv(sys.argv[1], sys.argv[1:])


main()
