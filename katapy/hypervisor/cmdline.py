"""Turns a ``VmConfig`` and descriptor numbers into QEMU's arguments: a pure function, no file is touched.

QEMU is given descriptors, not paths, and JSON where it takes JSON. What comes from outside is checked or quoted here,
so that no text can add an option, a property or a second kernel parameter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from katapy.devices import Device, Disk, KernelVsock, Nic, RootDisk, SharedDir, UserVsock
from katapy.errors import InvalidArgument
from katapy.hypervisor import VmConfig
from katapy.hypervisor.accel import Acceleration, Kind

# What a container's VM never needs is off. Without HPET Debian's kernel boots 0.15 s faster under TCG. PIT and PIC
# stay: without them the same kernel panics ("8254 timer not connected").
_MACHINE: Final = (
    "q35,memory-backend=ram,dump-guest-core=off,mem-merge=off,usb=off,sata=off,smbus=off,vmport=off,i8042=off,hpet=off"
)
# Boots a bzImage as well as a PVH vmlinux, each 0.1 s sooner than SeaBIOS, and prints nothing on the console.
_FIRMWARE: Final = "qboot.rom"
# MiB of translated code. QEMU's own bound is 1 GiB, which a guest could make each VM hold on top of its memory.
_TCG_BUFFER: Final = 128
_SANDBOX: Final = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_FIXED: Final = (
    *("-nodefaults", "-no-user-config", "-no-reboot"),
    *("-display", "none", "-monitor", "none", "-parallel", "none", "-net", "none"),
    *("-sandbox", _SANDBOX),
)
_PARAMS: Final = (
    "console=ttyS0",
    "quiet",
    "panic=-1",  # reboot at once, which ends QEMU (-no-reboot)
    "cryptomgr.notests",  # the self-tests of the ciphers are 60 % of a boot's instructions
    "no_timer_check",  # QEMU's timer works; finding that out takes 20 ms
)
# What only costs where the CPU is emulated; together a quarter more bytes a second through a container's streams.
_TCG_PARAMS: Final = (
    "clearcpuid=112",  # rep_good: copies by unrolled moves, not by string instructions, which TCG takes step by step
    "mitigations=off",  # an emulated CPU does not speculate
)
_PARAMS_MAX: Final = 2047  # COMMAND_LINE_SIZE of x86, without its NUL
_TAG_MAX: Final = 36  # virtio 1.2, 5.11.4: the tag field of virtio-fs
_SERIAL_MAX: Final = 20  # VIRTIO_BLK_ID_BYTES
_CID_MIN: Final = 3  # 0 to 2 are reserved (vsock(7))
_CID_MAX: Final = 0xFFFFFFFE  # above is VMADDR_CID_ANY
VCPUS_MAX: Final = 255  # more would need an IOMMU with interrupt remapping
_MIB: Final = 1 << 20
_VIRTIO_FS_QUEUE: Final = 1024
_PORTS: Final = ("port0", "port1")
_NODE: Final = "container-root"  # QEMU's name of what is on the disk; there is one at most
NIC_PORTS: Final = tuple(f"nic{number}" for number in range(8))
"""What NICs are plugged into, one each."""
# A guest then needs neither the legacy driver nor I/O ports.
_MODERN: Final = {"disable-legacy": "on"}


@dataclass(frozen=True)
class Descriptors:
    """The numbers under which QEMU inherits what it is given.

    ``qmp``, ``console`` and ``ready`` are connected sockets; ``ram`` is the guest's memory, and it, ``kernel`` and
    ``initramfs`` are files that QEMU may open again by number; ``disks`` has one descriptor per Disk, in order. The
    other devices carry their own.
    """

    qmp: int
    console: int
    ready: int
    ram: int
    kernel: int
    initramfs: int | None = None
    disks: tuple[int, ...] = ()


def build_argv(
    config: VmConfig, fds: Descriptors, *, name: str, restored: bool = False, private: bool = False
) -> list[str]:
    """Return QEMU's arguments, its program first. ``name`` is the sandbox's id, shown by ps(1).

    With ``restored`` QEMU waits for the state of a VM that was saved, and the devices in ``pluggable`` are left out.
    With ``private`` what the guest writes to its memory stays in QEMU, and never gets into ``fds.ram``.
    Raises InvalidArgument where a value cannot be carried to the guest as it is.
    """
    _check_size(config)
    return [
        str(config.qemu),
        *("-name", "guest=" + _comma_safe(f"katapy-{name}", "VM name")),
        *_FIXED,
        *("-machine", _MACHINE),
        *_acceleration(config.acceleration),
        *("-smp", str(config.vcpus)),
        *("-m", f"{config.memory_bytes}B"),
        *_object(
            "memory-backend-file",
            "ram",
            size=config.memory_bytes,
            share=not private,
            **{"mem-path": _by_number(fds.ram)},
        ),
        *_boot(config, fds),
        *_socket("console", fds.console),
        *("-serial", "chardev:console"),
        *_socket("ready", fds.ready),
        *("-serial", "chardev:ready"),
        *_socket("qmp", fds.qmp),
        *("-mon", "chardev=qmp,mode=control"),
        *_ports(),
        *_disks(config.devices, fds.disks),
        *_backends(config.devices),
        *(("-incoming", "defer") if restored else _plugged(config.devices)),
    ]


def pluggable(devices: tuple[Device, ...]) -> list[dict[str, object]]:
    """Return those of a VM's devices that can be plugged in while it runs, each as QMP's device_add takes it."""
    own = [device for device in devices if not isinstance(device, Disk)]
    if len(own) > len(_PORTS):
        raise InvalidArgument(f"cannot give a VM {len(own)} devices: {len(_PORTS)} are possible")
    return [{**_plug(device, port), "bus": port} for device, port in zip(own, _PORTS, strict=False)]


def nic_options(
    nic: Nic, port: str, taps: Sequence[str], vhosts: Sequence[str]
) -> tuple[dict[str, object], dict[str, object]]:
    """Return how a NIC is plugged into one of NIC_PORTS: what QMP's netdev_add takes, and device_add after it.

    ``taps`` and ``vhosts`` are the names under which QEMU knows its descriptors.
    """
    backend: dict[str, object] = {"type": "tap", "id": port_backend(port), "fds": ":".join(taps)}
    if vhosts:
        backend |= {"vhost": True, "vhostfds": ":".join(vhosts)}
    # Without its ROM, which would be for booting from a network.
    device: dict[str, object] = {"driver": "virtio-net-pci", "id": port_device(port), "bus": port, **_MODERN}
    device |= {"netdev": port_backend(port), "mac": nic.device, "romfile": ""}
    if len(taps) > 1:
        # An interrupt for each direction of each queue, for the control queue and for changes of the configuration.
        device |= {"mq": True, "vectors": 2 * len(taps) + 2}
    return backend, device


def port_device(port: str) -> str:
    """Return the id of what is plugged into a port."""
    return f"{port}-dev"


def port_backend(port: str) -> str:
    """Return the id of the host's side of the NIC in a port."""
    return f"{port}-net"


def _check_size(config: VmConfig) -> None:
    if not 1 <= config.vcpus <= VCPUS_MAX:
        raise InvalidArgument(f"cannot give a VM {config.vcpus} vCPUs: 1 to {VCPUS_MAX} are possible")
    if config.memory_bytes < 32 * _MIB or config.memory_bytes % _MIB:
        raise InvalidArgument(f"cannot give a VM {config.memory_bytes} bytes of memory: whole MiB from 32 on")


def _acceleration(acceleration: Acceleration) -> list[str]:
    if acceleration.kind is Kind.KVM:
        return ["-accel", "kvm", "-cpu", "host"]
    # Fast string instructions make a guest copy with them, and TCG emulates those byte by byte: three times slower.
    # Each copy from or to a process pays for SMAP again, which TCG cannot enforce cheaply: a quarter slower.
    return ["-accel", f"tcg,thread=multi,tb-size={_TCG_BUFFER}", "-cpu", "max,-erms,-fsrm,-smap"]


def _boot(config: VmConfig, fds: Descriptors) -> Iterator[str]:
    yield from ("-bios", _FIRMWARE)
    yield from ("-kernel", _by_number(fds.kernel))
    if fds.initramfs is not None:
        yield from ("-initrd", _by_number(fds.initramfs))
    own = _TCG_PARAMS if config.acceleration.kind is Kind.TCG else ()
    yield from ("-append", kernel_command_line((*own, *config.kernel_params)))


def kernel_command_line(params: tuple[str, ...]) -> str:
    """Return the kernel's command line with ``params`` after katapy's own.

    Each parameter is one word of printable ASCII. Raises InvalidArgument for one that is not, that is ``--`` (what
    follows would be arguments of init), or where all together are too long for the kernel.
    """
    for param in params:
        if not param.isascii() or not param.isprintable() or not param or '"' in param or " " in param or param == "--":
            raise InvalidArgument(f"cannot pass kernel parameter {param[:80]!r}: not one word of printable ascii")
    line = " ".join((*_PARAMS, *params))
    if len(line) > _PARAMS_MAX:
        raise InvalidArgument(f"cannot pass {len(line)} bytes of kernel parameters: {_PARAMS_MAX} are possible")
    return line


def _ports() -> Iterator[str]:
    """What a device is plugged into: the bus of the machine itself takes none while it runs."""
    for number, port in enumerate((*_PORTS, *NIC_PORTS), start=1):
        yield from ("-device", _json({"driver": "pcie-root-port", "id": port, "chassis": number}))


def _disks(devices: tuple[Device, ...], fds: tuple[int, ...]) -> Iterator[str]:
    disks = [device for device in devices if isinstance(device, Disk)]
    for index, (disk, fd) in enumerate(zip(disks, fds, strict=False)):
        yield from _disk(f"disk{index}", disk, fd)


def _disk(node: str, disk: Disk, fd: int) -> Iterator[str]:
    if not disk.read_only:
        raise InvalidArgument(f"cannot attach {str(disk.path)!r}: disks are read-only")
    serial = _bounded(disk.serial, _SERIAL_MAX, "disk serial")
    yield from _image(node, fd, "file")
    yield from (
        "-device",
        _json({"driver": "virtio-blk-pci", "id": f"{node}-dev", **_MODERN, "drive": node, "serial": serial}),
    )


def _image(node: str, fd: int, driver: str) -> Iterator[str]:
    yield from ("-add-fd", f"fd={fd},set={fd}")
    file = {"driver": driver, "filename": f"/dev/fdset/{fd}"}
    yield from ("-blockdev", _json({"driver": "raw", "node-name": node, "read-only": True, "file": file}))


def _backends(devices: tuple[Device, ...]) -> Iterator[str]:
    """What devices that are plugged in need to be there before: sockets of processes, and open files."""
    for device in devices:
        match device:
            case SharedDir() | UserVsock():
                yield from _socket(_chardev(device.socket_fd), device.socket_fd)
            case RootDisk():
                driver = "host_device" if device.is_block_device else "file"
                yield from _image(_NODE, device.fd, driver)


def _plugged(devices: tuple[Device, ...]) -> Iterator[str]:
    for device in pluggable(devices):
        yield from ("-device", _json(device))


def _plug(device: Device, port: str) -> dict[str, object]:
    """Return the driver of a device and its options."""
    node = port_device(port)
    match device:
        case SharedDir():
            tag = _bounded(device.tag, _TAG_MAX, "virtio-fs tag")
            chardev = _chardev(device.socket_fd)
            # Never was anything but modern, and has no such property.
            return {
                "driver": "vhost-user-fs-pci",
                "id": node,
                "chardev": chardev,
                "tag": tag,
                "queue-size": _VIRTIO_FS_QUEUE,
            }
        case UserVsock():
            chardev = _chardev(device.socket_fd)
            return {"driver": "vhost-user-vsock-pci", "id": node, **_MODERN, "chardev": chardev}
        case KernelVsock():
            if not _CID_MIN <= device.cid <= _CID_MAX:
                raise InvalidArgument(f"cannot give a guest the vsock address {device.cid}: {_CID_MIN} to {_CID_MAX}")
            own = {"guest-cid": device.cid, "vhostfd": str(device.vhost_fd)}
            return {"driver": "vhost-vsock-pci", "id": node, **_MODERN, **own}
        case RootDisk():
            serial = _bounded(device.serial, _SERIAL_MAX, "disk serial")
            return {"driver": "virtio-blk-pci", "id": node, **_MODERN, "drive": _NODE, "serial": serial}
        case Nic():
            raise InvalidArgument(f"cannot plug in NIC {device.device} before the VM runs")
        case Disk():
            raise InvalidArgument(f"cannot plug in {str(device.path)!r}: a disk is there from the start")


def _chardev(fd: int) -> str:
    return f"backend{fd}"


def _by_number(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def _object(kind: str, node: str, **options: object) -> list[str]:
    return ["-object", _json({"qom-type": kind, "id": node, **options})]


def _socket(node: str, fd: int) -> list[str]:
    return ["-chardev", f"socket,id={node},fd={fd}"]


def _json(value: dict[str, object]) -> str:
    return json.dumps(value, separators=(",", ":"))


def _bounded(text: str, limit: int, what: str) -> str:
    """Return ``text`` if the device can carry it: 1 to ``limit`` bytes of printable ASCII."""
    if not text or len(text) > limit or not text.isascii() or not text.isprintable():
        raise InvalidArgument(f"cannot use the {what} {text[:80]!r}: 1 to {limit} characters of printable ascii")
    return text


def _comma_safe(text: str, what: str) -> str:
    """Return ``text`` as the value of one property of an option list, where a doubled comma is a comma."""
    return _bounded(text, 255, what).replace(",", ",,")
