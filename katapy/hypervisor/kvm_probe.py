"""A program, not a module: says that it begins, runs a short loop in a KVM guest, and prints how many seconds it took.

``accel`` starts it as a process of its own, because a paravirtual KVM may spin in the kernel for ever and then only
the end of the process ends the attempt. It needs nothing but the standard library, so that it starts in milliseconds.

Source: the kernel's Documentation/virt/kvm/api.rst and arch/x86/include/uapi/asm/kvm.h.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
import time
from typing import Final

LOOPS: Final = 100_000
# The first run pays for faulting in the guest's pages, and on a busy host others run meanwhile: the fastest run is the
# one that tells, and for so many seconds there are more while none was fast.
_ATTEMPTS: Final = 3
_FAST: Final = 0.005
_PATIENCE: Final = 1.0
_BEGUN: Final = b"begun\n"

_API_VERSION: Final = 12
_GET_API_VERSION: Final = 0xAE00
_CREATE_VM: Final = 0xAE01
_GET_VCPU_MMAP_SIZE: Final = 0xAE04
_GET_SUPPORTED_CPUID: Final = 0xC008AE05
_CREATE_VCPU: Final = 0xAE41
_SET_USER_MEMORY_REGION: Final = 0x4020AE46
_SET_TSS_ADDR: Final = 0xAE47
_SET_CPUID2: Final = 0x4008AE90
_RUN: Final = 0xAE80
_SET_REGS: Final = 0x4090AE82
_GET_SREGS: Final = 0x8138AE83
_SET_SREGS: Final = 0x4138AE84
_EXIT_REASON_OFFSET: Final = 8
_EXIT_HLT: Final = 5
# More than KVM has ever reported; it refuses less room than it needs.
_CPUID_ENTRIES: Final = 256
_CPUID_ENTRY_SIZE: Final = 40

_MEMORY: Final = 0x5000
_PML4, _PDPT, _PD, _CODE = 0x1000, 0x2000, 0x3000, 0x4000
# mov ecx, LOOPS; again: dec ecx; jnz again; hlt
_PROGRAM: Final = b"\xb9" + struct.pack("<I", LOOPS) + b"\xff\xc9\x75\xfc\xf4"


def _segment(selector: int, kind: int, *, long: bool) -> bytes:
    """Return a flat, present, ring 0 ``struct kvm_segment``."""
    return struct.pack("<QIH10B", 0, 0xFFFFFFFF, selector, kind, 1, 0, not long, 1, long, 1, 0, 0, 0)


def _system_registers(current: bytes) -> bytes:
    """Return ``struct kvm_sregs`` for 64-bit mode: long mode with paging, as a kernel runs."""
    code, data = _segment(8, 11, long=True), _segment(16, 3, long=False)
    control = struct.pack("<QQQQQQ", 0x80050033, 0, _PML4, 0x20, 0, 0x500)  # cr0 cr2 cr3 cr4 cr8 efer
    segments = code + data * 5  # cs ds es fs gs ss
    rest = len(segments)
    return segments + current[rest:224] + control + current[224 + len(control) :]


def _all_features(kvm: int) -> bytearray:
    """Return ``struct kvm_cpuid2`` of what the host has: newer kernels allow no mode that it does not tell of."""
    cpuid = bytearray(struct.pack("<II", _CPUID_ENTRIES, 0)) + bytearray(_CPUID_ENTRIES * _CPUID_ENTRY_SIZE)
    fcntl.ioctl(kvm, _GET_SUPPORTED_CPUID, cpuid)
    return cpuid


def _write_guest(memory: mmap.mmap) -> None:
    for table, entry in ((_PML4, _PDPT | 3), (_PDPT, _PD | 3), (_PD, 0x83)):  # one 2 MiB page at 0
        memory[table : table + 8] = struct.pack("<Q", entry)
    memory[_CODE : _CODE + len(_PROGRAM)] = _PROGRAM


def measure() -> float:
    """Return the seconds of the fastest run; raises OSError where KVM refuses, RuntimeError where it misbehaves."""
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    version = fcntl.ioctl(kvm, _GET_API_VERSION, 0)
    if version != _API_VERSION:
        raise RuntimeError(f"KVM has API version {version}")
    vm = fcntl.ioctl(kvm, _CREATE_VM, 0)
    fcntl.ioctl(vm, _SET_TSS_ADDR, 0x10000000)  # Intel needs it, anywhere outside the guest's memory
    memory = mmap.mmap(-1, _MEMORY, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    _write_guest(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(vm, _SET_USER_MEMORY_REGION, struct.pack("<IIQQQ", 0, 0, 0, _MEMORY, address))
    vcpu = fcntl.ioctl(vm, _CREATE_VCPU, 0)
    shared = mmap.mmap(vcpu, fcntl.ioctl(kvm, _GET_VCPU_MMAP_SIZE, 0))
    fcntl.ioctl(vcpu, _SET_CPUID2, _all_features(kvm))
    current = fcntl.ioctl(vcpu, _GET_SREGS, bytes(312))
    fcntl.ioctl(vcpu, _SET_SREGS, _system_registers(current))
    fastest = min(_run(vcpu, shared) for _ in range(_ATTEMPTS))
    give_up = time.perf_counter() + _PATIENCE
    while fastest > _FAST and time.perf_counter() < give_up:
        fastest = min(fastest, _run(vcpu, shared))
    return fastest


def _run(vcpu: int, shared: mmap.mmap) -> float:
    registers = struct.pack("<18Q", *([0] * 16), _CODE, 2)  # rip, and the bit of rflags that is always set
    fcntl.ioctl(vcpu, _SET_REGS, registers)
    before = time.perf_counter()
    fcntl.ioctl(vcpu, _RUN, 0)
    elapsed = time.perf_counter() - before
    (reason,) = struct.unpack_from("<I", shared, _EXIT_REASON_OFFSET)
    if reason != _EXIT_HLT:
        raise RuntimeError(f"the test guest stopped with exit reason {reason}")
    return elapsed


def main() -> None:
    """Print that it begins, then the seconds, or ``error:`` and why there are none."""
    os.write(1, _BEGUN)
    try:
        answer = f"{measure():.6f}"
    except OSError as error:
        answer = f"error: {(error.strerror or str(error)).lower()}"
    except RuntimeError as error:
        answer = f"error: {error}"
    os.write(1, answer.encode())


if __name__ == "__main__":
    main()
