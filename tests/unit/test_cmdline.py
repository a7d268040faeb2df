"""QEMU's arguments: what they are, word for word, and that no text can add to them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katapy.devices import Device, Disk, KernelVsock, RootDisk, SharedDir, UserVsock
from katapy.errors import InvalidArgument
from katapy.hypervisor import VmConfig
from katapy.hypervisor.accel import Acceleration, Kind
from katapy.hypervisor.cmdline import Descriptors, build_argv, kernel_command_line, pluggable

FDS = Descriptors(qmp=10, console=11, ready=12, ram=9, kernel=13, initramfs=14, disks=(15,))
DISK = Disk(Path("/var/lib/katapy/image/root.erofs"), "root")
BASE = VmConfig(
    qemu=Path("/usr/bin/qemu-system-x86_64"),
    acceleration=Acceleration(Kind.TCG, "no KVM"),
    vcpus=2,
    memory_bytes=256 << 20,
    kernel=Path("/boot/vmlinuz"),
    initramfs=Path("/var/lib/katapy/initramfs"),
    kernel_params=("katapy.debug",),
    devices=(DISK, UserVsock(20), SharedDir("katapy", 21)),
)
GOLDEN = r"""/usr/bin/qemu-system-x86_64
-name guest=katapy-web
-nodefaults
-no-user-config
-no-reboot
-display none
-monitor none
-parallel none
-net none
-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny
-machine q35,memory-backend=ram,dump-guest-core=off,mem-merge=off,usb=off,sata=off,smbus=off,vmport=off,i8042=off,hpet=off
-accel tcg,thread=multi,tb-size=128
-cpu max,-erms,-fsrm,-smap
-smp 2
-m 268435456B
-object {"qom-type":"memory-backend-file","id":"ram","size":268435456,"share":true,"mem-path":"/proc/self/fd/9"}
-bios qboot.rom
-kernel /proc/self/fd/13
-initrd /proc/self/fd/14
-append console=ttyS0 quiet panic=-1 cryptomgr.notests no_timer_check clearcpuid=112 mitigations=off katapy.debug
-chardev socket,id=console,fd=11
-serial chardev:console
-chardev socket,id=ready,fd=12
-serial chardev:ready
-chardev socket,id=qmp,fd=10
-mon chardev=qmp,mode=control
-device {"driver":"pcie-root-port","id":"port0","chassis":1}
-device {"driver":"pcie-root-port","id":"port1","chassis":2}
-device {"driver":"pcie-root-port","id":"nic0","chassis":3}
-device {"driver":"pcie-root-port","id":"nic1","chassis":4}
-device {"driver":"pcie-root-port","id":"nic2","chassis":5}
-device {"driver":"pcie-root-port","id":"nic3","chassis":6}
-device {"driver":"pcie-root-port","id":"nic4","chassis":7}
-device {"driver":"pcie-root-port","id":"nic5","chassis":8}
-device {"driver":"pcie-root-port","id":"nic6","chassis":9}
-device {"driver":"pcie-root-port","id":"nic7","chassis":10}
-add-fd fd=15,set=15
-blockdev {"driver":"raw","node-name":"disk0","read-only":true,"file":{"driver":"file","filename":"/dev/fdset/15"}}
-device {"driver":"virtio-blk-pci","id":"disk0-dev","disable-legacy":"on","drive":"disk0","serial":"root"}
-chardev socket,id=backend20,fd=20
-chardev socket,id=backend21,fd=21
-device {"driver":"vhost-user-vsock-pci","id":"port0-dev","disable-legacy":"on","chardev":"backend20","bus":"port0"}
-device {"driver":"vhost-user-fs-pci","id":"port1-dev","chardev":"backend21","tag":"katapy","queue-size":1024,"bus":"port1"}
"""  # noqa: E501


def options(argv: list[str]) -> list[str]:
    """Return an option and its value on one line each, as GOLDEN has them."""
    lines: list[str] = []
    for word in argv:
        if word.startswith("-") or not lines or " " in lines[-1]:
            lines.append(word)
        else:
            lines[-1] += " " + word
    return lines


def test_golden() -> None:
    assert options(build_argv(BASE, FDS, name="web")) == GOLDEN.splitlines()


def test_a_restored_vm_is_the_same_but_for_what_is_plugged_in() -> None:
    """Else QEMU refuses the state of the devices, or takes it for another device's."""
    restored = options(build_argv(BASE, FDS, name="web", restored=True))
    assert restored == [*GOLDEN.splitlines()[:-2], "-incoming defer"]
    plugged = [f"-device {json.dumps(device, separators=(',', ':'))}" for device in pluggable(BASE.devices)]
    assert plugged == GOLDEN.splitlines()[-2:]


def test_what_is_plugged_in_has_places_for_so_many() -> None:
    with pytest.raises(InvalidArgument, match="3 devices: 2 are possible"):
        pluggable((UserVsock(20), UserVsock(21), UserVsock(22)))


def test_kvm_uses_the_hosts_cpu() -> None:
    argv = build_argv(replace(BASE, acceleration=Acceleration(Kind.KVM, "works")), FDS, name="web")
    assert argv[argv.index("-accel") : argv.index("-smp")] == ["-accel", "kvm", "-cpu", "host"]


def test_kernel_vsock_gets_its_descriptor_as_text() -> None:
    argv = build_argv(replace(BASE, devices=(KernelVsock(7, 30),)), FDS, name="web")
    device = json.loads(argv[-1])
    assert (device["driver"], device["guest-cid"], device["vhostfd"]) == ("vhost-vsock-pci", 7, "30")


def test_no_initramfs_no_option() -> None:
    assert "-initrd" not in build_argv(BASE, replace(FDS, initramfs=None), name="web")


def test_disks_keep_their_order() -> None:
    config = replace(BASE, devices=(Disk(Path("/a"), "first"), UserVsock(20), Disk(Path("/b"), "second")))
    argv = build_argv(config, replace(FDS, disks=(15, 16)), name="web")
    disks = [json.loads(word) for word in argv if "virtio-blk-pci" in word or '"raw"' in word]
    assert [disk.get("serial") or disk["file"]["filename"] for disk in disks] == [
        "/dev/fdset/15",
        "first",
        "/dev/fdset/16",
        "second",
    ]


@pytest.mark.parametrize(
    "device",
    [
        Disk(Path("/a"), "root", read_only=False),
        Disk(Path("/a"), ""),
        Disk(Path("/a"), "s" * 21),
        SharedDir("", 21),
        SharedDir("t" * 37, 21),
        SharedDir("käse", 21),
        KernelVsock(2, 30),
        KernelVsock(0xFFFFFFFF, 30),
    ],
)
def test_what_a_device_cannot_carry_is_refused(device: Device) -> None:
    with pytest.raises(InvalidArgument):
        build_argv(replace(BASE, devices=(device,)), FDS, name="web")


@pytest.mark.parametrize(("vcpus", "memory"), [(0, 256 << 20), (256, 256 << 20), (1, 0), (1, (256 << 20) + 1)])
def test_impossible_sizes_are_refused(vcpus: int, memory: int) -> None:
    with pytest.raises(InvalidArgument, match="cannot give a VM"):
        build_argv(replace(BASE, vcpus=vcpus, memory_bytes=memory), FDS, name="web")


@pytest.mark.parametrize("param", ["", "a b", "--", "a\nb", "a\tb", 'a="b', "ä", "\0"])
def test_a_kernel_parameter_is_one_word(param: str) -> None:
    with pytest.raises(InvalidArgument, match="kernel parameter"):
        kernel_command_line((param,))


def test_the_kernels_limit_on_its_command_line() -> None:
    room = 2047 - len(kernel_command_line(())) - 1
    assert len(kernel_command_line(("p" * room,))) == 2047
    with pytest.raises(InvalidArgument, match="2047"):
        kernel_command_line(("p" * (room + 1),))


hostile = st.one_of(st.text(max_size=60), st.text(alphabet=',="\\{}:- \nax', max_size=30))


@given(text=hostile)
def test_no_name_adds_a_property(text: str) -> None:
    expected = options(build_argv(BASE, FDS, name="web"))
    try:
        argv = build_argv(BASE, FDS, name=text)
    except InvalidArgument:
        return
    value = argv.pop(2)
    argv.insert(2, "guest=katapy-web")
    assert options(argv) == expected
    # What QEMU reads: single commas separate, doubled ones are part of the value.
    assert "," not in value.replace(",,", "")
    assert value.replace(",,", ",") == f"guest=katapy-{text}"


@given(text=hostile)
def test_no_tag_or_serial_adds_a_property(text: str) -> None:
    for device, key in ((SharedDir(text, 21), "tag"), (Disk(Path("/a"), text), "serial")):
        try:
            argv = build_argv(replace(BASE, devices=(device,)), FDS, name="web")
        except InvalidArgument:
            continue
        plain: Device = SharedDir("x", 21) if key == "tag" else Disk(Path("/a"), "x")
        usual = build_argv(replace(BASE, devices=(plain,)), FDS, name="web")
        changed = [(one, other) for one, other in zip(argv, usual, strict=True) if one != other]
        assert [json.loads(one) for one, _ in changed] == [json.loads(other) | {key: text} for _, other in changed]
        assert len(changed) == (text != "x")


@given(text=hostile)
def test_no_path_reaches_qemu(text: str) -> None:
    disk = replace(DISK, path=Path(text))
    config = replace(BASE, kernel=Path("k" + text), initramfs=Path("i" + text), devices=(disk,))
    assert build_argv(config, FDS, name="web") == build_argv(replace(BASE, devices=(DISK,)), FDS, name="web")


@given(text=hostile)
def test_no_kernel_parameter_adds_another(text: str) -> None:
    try:
        line = kernel_command_line((text,))
    except InvalidArgument:
        return
    assert line.split() == [*kernel_command_line(()).split(), text]


@pytest.mark.parametrize(("is_block_device", "driver"), [(False, "file"), (True, "host_device")])
def test_a_root_disk_is_open_from_the_start_and_plugged_in(is_block_device: bool, driver: str) -> None:
    config = replace(BASE, devices=(DISK, UserVsock(20), RootDisk(30, "container-root", is_block_device)))
    own = {"driver": "virtio-blk-pci", "id": "port1-dev", "disable-legacy": "on"}
    assert pluggable(config.devices)[1] == {
        **own,
        "drive": "container-root",
        "serial": "container-root",
        "bus": "port1",
    }
    argv = build_argv(config, FDS, name="web", restored=True)
    assert "fd=30,set=30" in argv
    node = json.loads(argv[argv.index("fd=30,set=30") + 2])
    assert node["file"] == {"driver": driver, "filename": "/dev/fdset/30"}
    assert node["read-only"] is True
    assert not any("port1-dev" in each for each in argv)
    assert any("port1-dev" in each for each in build_argv(config, FDS, name="web"))


def test_private_memory_differs_in_nothing_else() -> None:
    """What is restored with it was saved with memory that is shared."""
    shared, private = (build_argv(BASE, FDS, name="web", restored=True, private=each) for each in (False, True))
    assert [each.replace('"share":true', '"share":false') for each in shared] == private != shared
