"""Parsing, planning and translating: what needs neither root nor a process."""

from __future__ import annotations

import copy
import json
import os
import select
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from katapy_agent import (
    cgroups,
    child,
    config,
    devices,
    errors,
    hooks,
    linux,
    mounts,
    privileges,
    resources,
    schema,
    seccomp,
)

BASE: dict[str, Any] = {
    "ociVersion": "1.2.0",
    "root": {"path": "/rootfs"},
    "process": {"cwd": "/", "args": ["/bin/true"]},
    "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}]},
}


def parse(path: str = "", value: object = None) -> config.Spec:
    """Parse the base configuration with one dotted path set."""
    document = copy.deepcopy(BASE)
    if path:
        *parents, last = path.split(".")
        place = document
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return config.parse_spec(json.dumps(document).encode())


# -- the document ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"ociVersion": "1.2.0"', "not valid JSON"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        ('{"a": "ü"}'.encode("latin-1"), "not valid JSON"),
        (json.dumps(BASE).encode("utf-16"), "not valid JSON"),
        (b"[" * 200_000, "nested too deep"),
        (b" " * (config.MAX_SPEC_BYTES + 1), "bytes"),
        (b"[]", "not an object"),
        (b"{}", "is missing"),
    ],
)
def test_malformed_documents_are_refused(data: bytes, words: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=words):
        config.parse_spec(data)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("process.terminal", 1, "process.terminal is not true or false"),
        ("process.user", {"uid": True}, "process.user.uid is not an integer"),
        ("process.user", {"uid": 1.0}, "process.user.uid is not an integer"),
        ("process.user", {"uid": 2**32 - 1}, "process.user.uid is not between"),
        ("process.user", {"uid": "0"}, "process.user.uid is not an integer"),
        ("process.args", [], "process.args is empty"),
        ("process.args", "sh", "process.args is not an array"),
        ("process.args", ["a\0b"], r"process.args\[0\] is not free of NUL"),
        ("process.args", ["\ud800"], r"process.args\[0\] is not valid Unicode"),
        ("process.cwd", "tmp", "process.cwd 'tmp' is not an absolute path"),
        ("process.env", ["=x"], "process.env entry"),
        ("process.capabilities", {"bounding": ["CAP_NONSENSE"]}, "process.capabilities.capability 'CAP_NONSENSE'"),
        ("process.rlimits", [{"type": "RLIMIT_FOO", "soft": 1, "hard": 1}], r"process.rlimits\[0\].type"),
        ("process.rlimits", [{"type": "RLIMIT_CORE", "soft": 2, "hard": 1}], "soft limit of RLIMIT_CORE"),
        ("process.rlimits", [{"type": "RLIMIT_CORE", "soft": 0, "hard": 0}] * 2, "a limit twice"),
        ("process.oomScoreAdj", 1001, "process.oomScoreAdj is not between"),
        ("hostname", "x", "hostname and domainname need a uts namespace"),
        ("linux.namespaces", [{"type": "mount"}, {"type": "mount"}], "a type twice"),
        ("linux.namespaces", [{"type": "mount"}, {"type": "other"}], "'other' is unknown"),
        ("linux.namespaces", [{"type": "mount"}, {"type": "user"}], "does not map id 0"),
        ("linux.uidMappings", [{"containerID": 0, "hostID": 0, "size": 1}], "need a new user namespace"),
        ("linux.timeOffsets", {"monotonic": {"secs": 1}}, "needs a new time namespace"),
        ("linux.devices", [{"path": "/dev/x", "type": "c", "major": -1, "minor": 0}], "major is not between"),
        ("linux.resources", {"unified": {"../../x": "1"}}, "no file of a cgroup controller"),
        ("linux.resources", {"unified": {"cgroup.procs": "1"}}, "no file of a cgroup controller"),
        ("linux.resources", {"cpu": {"cpus": "0-3;rm"}}, "not a list of numbers"),
        ("linux.resources", {"hugepageLimits": [{"pageSize": "2MB/..", "limit": 1}]}, "no page size"),
        ("linux.sysctl", {"net/../kernel/core_pattern": "x"}, "no name of a sysctl"),
        ("linux.sysctl", {"kernel.msgmax": "1"}, "needs a namespace of type ipc"),
        ("linux.maskedPaths", ["proc/kcore"], "not an absolute path"),
    ],
)
def test_wrong_values_are_refused_by_name(path: str, value: object, words: str) -> None:
    with pytest.raises(errors.InvalidArgument, match=words):
        parse(path, value)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("ociVersion", "2.0.0", "ociVersion"),
        ("vm", {"hypervisor": {"path": "/x"}}, "vm is not supported"),
        ("process.apparmorProfile", "docker-default", "process.apparmorProfile 'docker-default'"),
        ("process.selinuxLabel", "system_u:x", "process.selinuxLabel"),
        ("process.execCPUAffinity", {"initial": "0"}, "process.execCPUAffinity is not supported"),
        ("linux.intelRdt", {"closID": "x"}, "linux.intelRdt is not supported"),
        ("linux.netDevices", {"eth0": {"name": "x"}}, "linux.netDevices is not supported"),
        ("linux.memoryPolicy", {"mode": "MPOL_BIND"}, "linux.memoryPolicy is not supported"),
        ("linux.mountLabel", "x", "linux.mountLabel is not supported"),
        ("linux.personality", {"domain": "LINUX", "flags": ["x"]}, "linux.personality.flags is not supported"),
        ("linux.seccomp", {"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/x"}, "linux.seccomp.listenerPath"),
        ("linux.resources", {"network": {"classID": 1}}, "linux.resources.network is not supported"),
        ("linux.resources", {"rdma": {"mlx": {}}}, "linux.resources.rdma is not supported"),
        ("linux.resources", {"blockIO": {"leafWeight": 10}}, "linux.resources.blockIO.leafWeight"),
        (
            "linux.resources",
            {"blockIO": {"weightDevice": [{"major": 8, "minor": 0, "weight": 10, "leafWeight": 10}]}},
            r"linux.resources.blockIO.weightDevice\[0\].leafWeight",
        ),
        ("linux.resources", {"memory": {"swappiness": 1}}, "linux.resources.memory.swappiness"),
        ("linux.resources", {"memory": {"kernel": 1}}, "linux.resources.memory.kernel"),
        ("linux.resources", {"memory": {"disableOOMKiller": True}}, "disableOOMKiller"),
        ("linux.resources", {"cpu": {"realtimeRuntime": 1}}, "realtimeRuntime"),
        ("linux.sysctl", {"kernel.core_pattern": "|/x"}, "sysctl 'kernel.core_pattern' is not supported"),
        ("linux.sysctl", {"vm.swappiness": "1"}, "sysctl 'vm.swappiness' is not supported"),
        ("linux.namespaces", [{"type": "pid"}], "without a mount namespace"),
        ("linux.namespaces", [{"type": "ipc", "path": "/proc/1/ns/ipc"}], r"linux.namespaces\[0\].path is not"),
        ("linux.namespaces", [{"type": "network", "path": "/run/netns/x"}], r"linux.namespaces\[0\].path is not"),
        ("mounts", [{"destination": "/x", "type": "tmpfs", "uidMappings": [{}]}], r"mounts\[0\].uidMappings"),
    ],
)
def test_what_is_not_honoured_is_refused_by_name(path: str, value: object, words: str) -> None:
    with pytest.raises(errors.Unsupported, match=words):
        parse(path, value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("process.apparmorProfile", "unconfined"),
        ("process.selinuxLabel", ""),
        ("linux.intelRdt", None),
        ("linux.resources", {"network": {}, "rdma": None, "memory": {"disableOOMKiller": False, "kernel": -1}}),
        ("hooks", {"prestart": [{"path": "/x", "args": ["x"], "timeout": 3}]}),
        ("annotations", {"anything": "goes"}),
        ("linux.cgroupsPath", "/kubepods/x"),
        ("linux.devices", [{"path": "/dev/x", "type": "p", "fileMode": 2**32 - 1}]),
    ],
)
def test_what_asks_for_nothing_is_accepted(path: str, value: object) -> None:
    parse(path, value)


@pytest.mark.parametrize(
    "path", ["new", "windows", "root.new", "process.new", "process.user.username", "linux.new", "linux.resources.new"]
)
def test_what_the_specification_does_not_know_is_ignored(path: str) -> None:
    """It MUST NOT be an error, and was: a document written for a later version was refused after the boot."""
    parse(path, {"x": [1]})


def test_plan_survives_json_unchanged() -> None:
    document = {
        **BASE,
        "process": {**BASE["process"], "terminal": True, "user": {"uid": 7, "umask": 0o27, "additionalGids": [1, 2]}},
        "mounts": [{"destination": "/proc", "type": "proc"}],
    }
    spec = config.parse_spec(json.dumps(document).encode())
    plan = json.loads(json.dumps(child.plan_init(spec, container_id="c", cgroup="/x", rows=1, columns=2)))
    made = schema.decode(child.InitPlan, plan["init"])
    assert plan["terminal"] is True
    assert (made.spec, made.cgroup, made.rows, made.columns) == (spec, "/x", 1, 2)


def test_exec_inherits_what_it_does_not_say() -> None:
    spec = parse("process.capabilities", {"bounding": ["CAP_KILL"]})
    process = config.parse_process(b'{"cwd": "/", "args": ["x"]}')
    plan = child.plan_exec(process, spec=spec, init_pid=9, cgroup="/x", rows=0, columns=0)
    made = schema.decode(child.ExecPlan, json.loads(json.dumps(plan))["exec"])
    assert made.process.capabilities == config.Capabilities(bounding=("CAP_KILL",))
    assert set(made.namespaces) == {"mount", "pid", "cgroup"}


def test_users_of_the_container_are_others_of_the_vm() -> None:
    mappings = [{"containerID": 0, "hostID": 100000, "size": 10}, {"containerID": 10, "hostID": 5, "size": 1}]
    namespaces = [{"type": "mount"}, {"type": "user"}]
    linux = parse("linux", {"namespaces": namespaces, "uidMappings": mappings, "gidMappings": mappings}).linux
    assert [linux.host_uid(uid) for uid in (0, 9, 10, 11)] == [100000, 100009, 5, None]
    assert parse().linux.host_uid(11) == 11


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("net.ipv4.ip_forward", "net/ipv4/ip_forward"),
        ("net/ipv4/conf/eth0.100/rp_filter", "net/ipv4/conf/eth0.100/rp_filter"),
        ("net.ipv4.conf.eth0/100.rp_filter", "net/ipv4/conf/eth0.100/rp_filter"),
    ],
)
def test_sysctl_names(name: str, path: str) -> None:
    assert config.sysctl_path(name) == path


# -- mounts ---------------------------------------------------------------------------------------------------------


def options(*names: str, kind: str = "tmpfs", source: str = "x") -> mounts.Options:
    return mounts.parse_options(config.Mount("/x", kind, source, names))


def test_later_options_win() -> None:
    assert options("rw", "ro").own.set == linux.MOUNT_ATTR_RDONLY
    made = options("ro", "rw").own
    assert (made.set, made.clear) == (0, linux.MOUNT_ATTR_RDONLY)
    made = options("noatime", "strictatime").own
    assert (made.set, made.clear) == (linux.MOUNT_ATTR_STRICTATIME, linux.MOUNT_ATTR__ATIME)


def test_options_are_sorted_out() -> None:
    made = options("rbind", "rro", "nosuid", "rslave", kind="none", source="/src")
    assert made.is_bind
    assert made.recursive
    assert (made.own.set, made.tree.set) == (linux.MOUNT_ATTR_NOSUID, linux.MOUNT_ATTR_RDONLY)
    assert made.propagation == ((linux.MS_SLAVE, True),)
    assert options("size=1m", "tmpcopyup", "huge").data == (("size", "1m"), ("huge", None))
    assert options(kind="cgroup").filesystem == "cgroup2"


@pytest.mark.parametrize(
    ("mount", "words"),
    [
        (config.Mount("/x", "nfs", "h:/"), "mount type 'nfs' at /x"),
        (config.Mount("/x", "", "/src"), "mount type '' at /x"),
        (config.Mount("/x", "bind", "/src", ("idmap",)), "'idmap' at /x"),
        (config.Mount("/x", "bind", "/src", ("remount",)), "'remount' at /x"),
        (config.Mount("/x", "bind", "/src", ("size=1m",)), "'size' at /x"),
    ],
)
def test_mounts_that_are_refused(mount: config.Mount, words: str) -> None:
    with pytest.raises(errors.Unsupported, match=words):
        mounts.parse_options(mount)


def test_relative_bind_source_is_refused() -> None:
    with pytest.raises(errors.InvalidArgument, match="not an absolute path"):
        options(kind="bind", source="etc")


# -- cgroup files ---------------------------------------------------------------------------------------------------


def limits(**values: object) -> dict[str, str]:
    return dict(cgroups.plan_limits(schema.decode(resources.Resources, values)))


@pytest.mark.parametrize(
    ("shares", "weight"), [(1, "1"), (2, "1"), (1024, "39"), (2048, "79"), (262144, "10000"), (2**40, "10000")]
)
def test_cpu_shares_become_weight(shares: int, weight: str) -> None:
    assert limits(cpu={"shares": shares}) == {"cpu.weight": weight}


@pytest.mark.parametrize(
    ("memory", "files"),
    [
        ({"limit": 100, "reservation": 50}, {"memory.max": "100", "memory.low": "50"}),
        ({"limit": 100, "swap": 150}, {"memory.max": "100", "memory.swap.max": "50"}),
        ({"limit": 100, "swap": 100}, {"memory.max": "100", "memory.swap.max": "0"}),
        ({"limit": 100, "swap": -1}, {"memory.max": "100", "memory.swap.max": "max"}),
        ({"limit": -1}, {"memory.max": "max", "memory.swap.max": "max"}),
        ({}, {}),
    ],
)
def test_memory_and_swap(memory: dict[str, int], files: dict[str, str]) -> None:
    assert limits(memory=memory) == files


@pytest.mark.parametrize("memory", [{"swap": 100}, {"limit": 100, "swap": 50}, {"limit": -1, "swap": 100}])
def test_swap_without_sense_is_refused(memory: dict[str, int]) -> None:
    """Beside a limit of -1 it was written as it stood, though it counts the memory, too; runc refuses it."""
    with pytest.raises(errors.InvalidArgument, match="swap"):
        limits(memory=memory)


def test_other_limits() -> None:
    assert limits(cpu={"quota": 5000}) == {"cpu.max": "5000 100000"}
    assert limits(cpu={"quota": -1, "period": 2000}) == {"cpu.max": "max 2000"}
    assert limits(cpu={"cpus": "0-1", "mems": "0", "idle": 1, "burst": 9}) == {
        "cpu.idle": "1",
        "cpu.max.burst": "9",
        "cpuset.cpus": "0-1",
        "cpuset.mems": "0",
    }
    assert limits(pids={"limit": -1}) == {"pids.max": "max"}
    assert limits(pids={"limit": 64}) == {"pids.max": "64"}
    device = {"major": 8, "minor": 1, "rate": 1000}
    assert limits(blockIO={"throttleReadBpsDevice": [device]}) == {"io.max": "8:1 rbps=1000"}
    assert limits(blockIO={"throttleWriteIOPSDevice": [{**device, "rate": 0}]}) == {"io.max": "8:1 wiops=max"}
    assert limits(hugepageLimits=[{"pageSize": "2MB", "limit": 7}]) == {"hugetlb.2MB.max": "7"}
    assert limits(unified={"memory.high": "5"}) == {"memory.high": "5"}


class FakeCgroup(cgroups.Cgroup):
    """A leaf in an ordinary directory, with the files that a kernel would put there."""

    def __init__(self, path: Path, **files: str) -> None:
        super().__init__(path)
        for name, text in files.items():
            (path / name.replace("__", ".")).write_text(text)


def test_limits_are_written_where_the_kernel_has_them(tmp_path: Path) -> None:
    cgroup = FakeCgroup(tmp_path, memory__max="max", io__weight="", hugetlb__2MB__max="", hugetlb__2MB__rsvd__max="")
    cgroup._set("memory.max", "100")
    cgroup._set("io.bfq.weight", "8:0 1000")
    cgroup._set("hugetlb.2MB.max", "7")
    cgroup._set("memory.swap.max", "0")
    assert {path.name: path.read_text().strip() for path in tmp_path.iterdir()} == {
        "memory.max": "100",
        "io.weight": "8:0 10000",
        "hugetlb.2MB.max": "7",
        "hugetlb.2MB.rsvd.max": "7",
    }


def test_limit_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.Unsupported, match=r"pids\.max"):
        FakeCgroup(tmp_path)._set("pids.max", "5")
    assert not (tmp_path / "pids.max").exists()


def files_of(cgroup: cgroups.Cgroup) -> dict[str, str]:
    return {path.name: path.read_text().strip() for path in cgroup.path.iterdir()}


def test_update_completes_what_is_given_by_half(tmp_path: Path) -> None:
    cgroup = FakeCgroup(tmp_path, cpu__max="50000 100000", memory__max="8192", memory__swap__max="max_")
    cgroup.update(resources.Resources(cpu=resources.CPU(quota=20000)))
    assert files_of(cgroup)["cpu.max"] == "20000 100000"
    cgroup.update(resources.Resources(cpu=resources.CPU(period=200000), memory=resources.Memory(swap=9216)))
    assert files_of(cgroup) == {"cpu.max": "20000 200000", "memory.max": "8192", "memory.swap.max": "1024"}


def test_update_that_fails_changes_nothing(tmp_path: Path) -> None:
    before = {
        "cpu.max": "max 100000",
        "memory.max": "8192",
        "memory.low": "4096",
        "io.max": "8:0 rbps=1 wbps=max riops=max wiops=max",
    }
    cgroup = FakeCgroup(tmp_path, **{name.replace(".", "__"): text for name, text in before.items()})
    throttle = resources.ThrottleDevice(8, 0, 7)
    wanted = resources.Resources(
        cpu=resources.CPU(quota=20000, period=50000),
        memory=resources.Memory(limit=9216, reservation=1024),
        block_io=resources.BlockIO(throttle_read_bps_device=(throttle,)),
        unified={"memory.nonsense": "1"},
    )
    with pytest.raises(errors.Unsupported, match=r"memory\.nonsense"):
        cgroup.update(wanted)
    # An ordinary file keeps the rest of what was longer.
    found = files_of(cgroup)
    assert {name: found[name][: len(text)] for name, text in before.items()} == before


@pytest.mark.parametrize(
    ("file", "value", "text", "undo"),
    [
        ("pids.max", "5", "max\n", ("pids.max", "max")),
        ("cpuset.cpus", "0", "\n", ("cpuset.cpus", "\n")),
        ("io.max", "8:0 rbps=5", "8:16 rbps=1 wbps=max\n", ("io.max", "8:0 rbps=max wbps=max riops=max wiops=max")),
        ("io.max", "8:16 rbps=5", "8:16 rbps=1 wbps=max\n", ("io.max", "8:16 rbps=1 wbps=max")),
        ("io.weight", "8:0 5", "default 100\n", ("io.weight", "8:0 default")),
        ("io.weight", "5", "default 100\n8:0 7\n", ("io.weight", "default 100")),
    ],
)
def test_what_undoes_a_write(tmp_path: Path, file: str, value: str, text: str, undo: tuple[str, str]) -> None:
    assert FakeCgroup(tmp_path, **{file.replace(".", "__"): text})._before(file, value) == undo


def test_update_checks_what_is_in_use(tmp_path: Path) -> None:
    cgroup = FakeCgroup(tmp_path, memory__current="4096", memory__max="8192")
    with pytest.raises(errors.InvalidState, match="memory limit 4096 is not above what is in use: 4096"):
        cgroup.update(resources.Resources(memory=resources.Memory(limit=4096, check_before_update=True)))
    cgroup.update(resources.Resources(memory=resources.Memory(limit=4097, check_before_update=True)))
    assert files_of(cgroup)["memory.max"] == "4097"


def test_stats(tmp_path: Path) -> None:
    cgroup = FakeCgroup(
        tmp_path,
        cpu__stat="usage_usec 10\nuser_usec 6\nsystem_usec 4\nnr_periods 3\nnr_throttled 2\nthrottled_usec 9\n",
        memory__current="4096\n",
        memory__max="max\n",
        memory__stat="anon 1\nfile 2\n",
        memory__events="low 0\noom 3\noom_kill 2\n",
        pids__current="5\n",
        pids__max="64\n",
        io__stat="254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n254:1 \n",
        hugetlb__2MB__current="0\n",
        hugetlb__2MB__max="max\n",
        hugetlb__2MB__events="max 8\n",
        hugetlb__2MB__rsvd__current="0\n",
    )
    stats = cgroup.stats()
    assert stats.cpu == cgroups.CpuStats(10, 6, 4, 3, 2, 9)
    assert stats.memory == cgroups.MemoryStats(
        4096, cgroups.NO_LIMIT, 0, 0, {"anon": 1, "file": 2}, 3, 2, cgroups.NO_LIMIT
    )
    assert stats.pids == cgroups.PidsStats(5, 64, 0)
    assert stats.io == (cgroups.IoStats(254, 0, 1, 2, 3, 4), cgroups.IoStats(254, 1, 0, 0, 0, 0))
    assert stats.hugetlb == (cgroups.HugetlbStats("2MB", 0, cgroups.NO_LIMIT, 8),)
    assert cgroup.oom_kills() == 2


@pytest.mark.parametrize("name", ["", "a/b", "a\n", "x" * 201])
def test_cgroup_names(name: str, tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidArgument, match="cgroup name"):
        cgroups.Cgroup.create(name, resources.Resources(), root=tmp_path)


@pytest.mark.parametrize(
    ("membership", "place"),
    [
        ("1:cpu:/x\n0::/katapy/c1\n", "."),
        ("0::/katapy/c1/init\n", "init"),
        ("0::/katapy/c1/a b/0::/katapy/c2/\x0b\u2028\udcff\n", "a b/0::/katapy/c2/\x0b\u2028\udcff"),
        ("0::/katapy/c11/x\n", None),
        ("0::/../..\n", None),
        ("0::/\n", None),
        ("", None),
    ],
)
def test_where_init_is_below_its_leaf(membership: str, place: str | None) -> None:
    if place is not None:
        assert cgroups.find_below("/sys/fs/cgroup/katapy/c1", membership) == place
        return
    with pytest.raises(errors.InvalidState, match="not below cgroup"):
        cgroups.find_below("/sys/fs/cgroup/katapy/c1", membership)


# -- device program -------------------------------------------------------------------------------------------------


def decide(program: bytes, kind: str, major: int, minor: int, access: str) -> bool:
    """Interpret a device program as the kernel would."""
    wanted = sum({"m": 1, "r": 2, "w": 4}[letter] for letter in access)
    context = {0: wanted << 16 | {"b": 1, "c": 2}[kind], 4: major, 8: minor}
    code = [struct.unpack_from("<BBhi", program, at) for at in range(0, len(program), 8)]
    register = [0] * 11
    at = 0
    while True:
        opcode, registers, offset, immediate = code[at]
        destination, source = registers & 15, registers >> 4
        at += 1
        match opcode:
            case 0x61:
                register[destination] = context[offset]
            case 0xB7:
                register[destination] = immediate
            case 0xBF:
                register[destination] = register[source]
            case 0x57:
                register[destination] &= immediate
            case 0x77:
                register[destination] >>= immediate
            case 0x15 | 0x55:
                at += offset if (register[destination] == immediate) == (opcode == 0x15) else 0
            case 0x95:
                return bool(register[0])
            case _:
                raise AssertionError(hex(opcode))


def rules(*texts: str) -> bytes:
    made = []
    for text in texts:
        verb, kind, numbers, access = text.split()
        major, minor = (-1 if number == "*" else int(number) for number in numbers.split(":"))
        made.append(resources.DeviceRule(verb == "allow", kind, major, minor, access))
    return devices.assemble(made)


def test_devices_are_denied_by_default() -> None:
    program = rules()
    assert decide(program, "c", 1, 3, "rw")
    assert decide(program, "c", 136, 5, "rwm")
    assert decide(program, "b", 8, 0, "m")  # a node may be made, not opened
    assert not decide(program, "b", 8, 0, "r")
    assert not decide(program, "c", 10, 229, "rw")
    assert not decide(program, "b", 1, 3, "r")


def test_empty_type_and_access_are_all() -> None:
    """The host takes them so, and the guest refused them after the boot."""
    rule = schema.decode(resources.DeviceRule, {"allow": True, "type": "", "major": 8, "access": ""})
    program = devices.assemble([rule])
    assert decide(program, "b", 8, 0, "rwm")
    assert decide(program, "c", 8, 5, "rw")
    assert not decide(program, "c", 9, 0, "r")


def test_last_device_rule_wins() -> None:
    program = rules("deny a *:* rwm", "allow c 10:* rwm", "deny c 10:5 w")
    assert decide(program, "c", 10, 6, "rw")
    assert decide(program, "c", 10, 5, "r")
    assert not decide(program, "c", 10, 5, "w")
    assert not decide(program, "c", 10, 5, "rw")
    assert decide(rules("deny a *:* rwm", "allow a *:* rwm"), "b", 8, 0, "rwm")


def test_accesses_allowed_by_several_rules_add_up() -> None:
    """A rule for reading and one for writing together allow opening for both."""
    assert decide(rules("allow b 8:0 r", "allow b 8:0 w"), "b", 8, 0, "rw")


# -- seccomp --------------------------------------------------------------------------------------------------------


def profile(**values: Any) -> config.Seccomp:
    return schema.decode(config.Seccomp, {"defaultAction": "SCMP_ACT_ALLOW", **values})


def test_seccomp_compiles_and_skips_what_the_kernel_does_not_have() -> None:
    rule = {"names": ["no_such_call", "mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1}
    program = seccomp.compile_filter(profile(architectures=["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"], syscalls=[rule]))
    assert len(program) % 8 == 0
    assert len(program) > len(seccomp.compile_filter(profile()))


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"defaultAction": "SCMP_ACT_WHAT"}, errors.Unsupported),
        ({"defaultAction": "SCMP_ACT_NOTIFY"}, errors.Unsupported),
        ({"architectures": ["SCMP_ARCH_PDP11"]}, errors.InvalidArgument),
        ({"syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW", "errnoRet": 3}]}, errors.InvalidArgument),
        (
            {
                "syscalls": [
                    {"names": ["read"], "action": "SCMP_ACT_KILL", "args": [{"index": 0, "value": 1, "op": "X"}]}
                ]
            },
            errors.InvalidArgument,
        ),
    ],
)
def test_seccomp_refuses_what_it_does_not_know(values: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="seccomp"):
        seccomp.compile_filter(profile(**values))


def test_seccomp_flags() -> None:
    assert seccomp.filter_flags(profile(flags=["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"])) == 6
    with pytest.raises(errors.Unsupported, match="WAIT_KILLABLE"):
        seccomp.filter_flags(profile(flags=["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]))


# -- programs and users ---------------------------------------------------------------------------------------------


def test_home_is_looked_up_by_number_only() -> None:
    passwd = b"root:x:0:0::/root:/bin/sh\n1000:x:5:5::/five:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\nbad:x:7\n"
    assert privileges.parse_home(passwd, 0) == "/root"
    assert privileges.parse_home(passwd, 1000) == "/home/user"
    assert privileges.parse_home(passwd, 7) == "/"
    assert privileges.parse_home(b"a:x:1:1::relative:\n", 1) == "/"


def test_programs_are_found_as_runc_finds_them(tmp_path: Path) -> None:
    search = f"/nowhere:{tmp_path}".encode()
    (tmp_path / "tool").write_text("")
    with pytest.raises(errors.CommandNotFound, match=r'^exec: "tool": executable file not found in \$PATH$'):
        child.find_program("tool", search)
    with pytest.raises(errors.CommandNotExecutable, match=r": permission denied$"):
        child.find_program(f"{tmp_path}/tool", search)
    (tmp_path / "tool").chmod(0o755)
    assert child.find_program("tool", search) == f"{tmp_path}/tool".encode()
    with pytest.raises(errors.CommandNotFound, match=r'^exec: "/no/x": stat /no/x: no such file or directory$'):
        child.find_program("/no/x", search)
    with pytest.raises(errors.CommandNotExecutable, match="is a directory"):
        child.find_program(str(tmp_path), search)


@pytest.mark.parametrize("search", [b"", b":", b".", b"/nowhere:", b"bin"])
def test_no_program_is_found_in_the_working_directory(
    search: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a PATH, whatever lay in the container's working directory was run."""
    (tmp_path / "bin").mkdir()
    for tool in (tmp_path / "tool", tmp_path / "bin/tool"):
        tool.touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(errors.CommandNotFound, match=r"not found in \$PATH$"):
        child.find_program("tool", search)
    assert child.find_program("./tool", search) == b"./tool"


def test_errors_have_the_codes_of_their_ancestors() -> None:
    assert errors.rpc_code(errors.CommandNotFound("x")) == 5
    assert errors.rpc_code(ValueError("x")) == 13
    assert errors.by_name("CommandNotExecutable") is errors.CommandNotExecutable
    assert errors.by_name("SystemExit") is errors.Internal
    with (
        pytest.raises(errors.PermissionDenied, match=r"^cannot mount /x: operation not permitted$"),
        errors.doing("mount /x"),
    ):
        raise OSError(1, "Operation not permitted")


def test_copying_up_what_others_remove_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a volume that is in use; the container could not be created."""
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "directory").mkdir(parents=True)
    (source / "directory/kept").write_text("x")
    target.mkdir()
    listed = os.listdir

    def list_late(fd: int) -> list[str]:
        return [*listed(fd), "gone"]

    monkeypatch.setattr(os, "listdir", list_late)
    descriptors = [os.open(path, os.O_PATH | os.O_DIRECTORY) for path in (source, target)]
    mounts.copy_up(*descriptors)
    for fd in descriptors:
        os.close(fd)
    assert [str(path.relative_to(target)) for path in sorted(target.rglob("*"))] == ["directory", "directory/kept"]


def test_a_hook_that_ended_in_time(tmp_path: Path) -> None:
    """And was looked at late, with its output at an end: it was said not to have ended."""
    with (tmp_path / "said").open("w+") as said, subprocess.Popen(["/bin/true"]) as process:
        pidfd = os.pidfd_open(process.pid)
        select.select([pidfd], [], [])
        assert hooks._read_until_end(said.fileno(), pidfd, 0.0) == (b"", True)
        os.close(pidfd)
