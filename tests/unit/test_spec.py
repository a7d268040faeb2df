"""config.json: what is read from it, what goes to the guest, and the error for each thing that is wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from katapy.errors import Internal, InvalidArgument, KatapyError, Unsupported
from katapy.oci.default import default_spec
from katapy.oci.spec import BindMount, Spec, parse_spec


def spec_of(document: dict[str, Any]) -> Spec:
    return parse_spec(json.dumps(document).encode(), bundle="/b")


def changed(path: str, value: Any) -> dict[str, Any]:
    """The default document with one member replaced, or removed where the value is Ellipsis."""
    document = default_spec()
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    target: Any = document
    for part in parents:
        target = target[part] if isinstance(part, int) else target.setdefault(part, {})
    if value is ...:
        del target[last]
    elif isinstance(target, list) and last == len(target):
        target.append(value)
    else:
        target[last] = value
    return document


def error_of(document: dict[str, Any]) -> KatapyError:
    with pytest.raises(KatapyError) as caught:
        spec_of(document)
    return caught.value


@pytest.mark.parametrize("rootless", [False, True])
def test_the_default_is_valid(rootless: bool) -> None:
    spec = spec_of(default_spec(rootless=rootless))
    assert spec.process.args == ("sh",)
    assert spec.process.terminal
    assert spec.rootfs == "/b/rootfs"
    assert (spec.linux.namespace("user") is not None) is rootless
    assert spec.bind_mounts == ()


def test_the_default_is_runcs() -> None:
    """Keys and values as `runc spec` 1.1 writes them, but for the names and the cgroup namespace of cgroup v2."""
    spec = default_spec()
    assert list(spec) == ["ociVersion", "process", "root", "hostname", "mounts", "linux"]
    assert spec["ociVersion"] == "1.2.0"
    assert spec["process"]["rlimits"] == [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}]
    assert [mount["destination"] for mount in spec["mounts"]] == [
        *("/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue", "/sys", "/sys/fs/cgroup"),
    ]
    assert {namespace["type"] for namespace in spec["linux"]["namespaces"]} == {
        *("pid", "network", "ipc", "uts", "mount", "cgroup"),
    }
    assert len(spec["linux"]["maskedPaths"]) == 10


def test_two_defaults_share_nothing() -> None:
    first = default_spec()
    reference = copy.deepcopy(first)
    first["process"]["capabilities"]["bounding"].append("CAP_SYS_ADMIN")
    assert default_spec() == reference


def test_every_linux_member_is_read() -> None:
    linux = {
        "namespaces": [{"type": "network", "path": ""}],
        "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}],
        "gidMappings": [{"containerID": 0, "hostID": 1000, "size": 10}],
        "timeOffsets": {"monotonic": {"secs": -5, "nanosecs": 3}},
        "devices": [{"type": "c", "path": "/dev/x", "major": 1, "minor": 3, "fileMode": 438, "uid": 0, "gid": 5}],
        "cgroupsPath": "/a/b",
        "resources": {
            "devices": [{"allow": True, "type": "c", "major": 1, "access": "rw"}],
            "memory": {"limit": 1048576, "swap": -1, "reservation": 0, "swappiness": 60},
            "cpu": {"shares": 0, "quota": 150000, "period": 100000, "cpus": "0-1,3", "mems": "0"},
            "pids": {"limit": 100},
            "blockIO": {
                "weight": 500,
                "weightDevice": [{"major": 8, "minor": 0, "weight": 10}],
                "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 600}],
            },
            "hugepageLimits": [{"pageSize": "2MB", "limit": 4194304}],
            "network": {"classID": 1048577, "priorities": [{"name": "eth0", "priority": 500}]},
            "rdma": {"mlx5_1": {"hcaHandles": 3}},
            "unified": {"memory.high": "1000"},
        },
        "intelRdt": {"closID": "x"},
        "sysctl": {"net.ipv4.ip_forward": "1", "net/ipv4/conf/eth0.1/forwarding": "1"},
        "seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 1,
            "architectures": ["SCMP_ARCH_X86_64"],
            "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "syscalls": [
                {
                    "names": ["clone"],
                    "action": "SCMP_ACT_ALLOW",
                    "args": [{"index": 0, "value": 18446744073709551615, "op": "SCMP_CMP_MASKED_EQ"}],
                }
            ],
        },
        "rootfsPropagation": "rslave",
        "maskedPaths": ["/proc/kcore"],
        "readonlyPaths": ["/proc/sys"],
        "mountLabel": "x",
        "personality": {"domain": "LINUX32"},
    }
    found = spec_of({**default_spec(), "linux": linux}).linux
    assert found.namespace("network")
    assert found.uid_mappings == found.gid_mappings
    assert found.uid_mappings[0].host_id == 1000
    assert found.time_offsets["monotonic"].seconds == -5
    assert found.devices[0].file_mode == 0o666
    resources = found.resources
    assert resources is not None
    assert resources.memory is not None
    assert resources.cpu is not None
    assert resources.block_io is not None
    assert (resources.memory.limit, resources.memory.swap, resources.memory.reservation) == (1048576, None, None)
    assert (resources.cpu.shares, resources.cpu.vcpus) == (None, 1.5)
    assert resources.block_io.weight_devices[0].weight == 10
    assert resources.block_io.read_bps[0].rate == 600
    assert resources.pids_limit == 100
    assert (resources.devices[0].major, resources.devices[0].minor) == (1, None)
    assert resources.hugepage_limits[0].page_size == "2MB"
    assert resources.network is not None
    assert resources.network.priorities == (("eth0", 500),)
    assert resources.rdma["mlx5_1"].hca_handles == 3
    assert resources.unified == {"memory.high": "1000"}
    assert found.seccomp is not None
    assert found.seccomp.rules[0].arguments[0].value == 2**64 - 1
    assert found.personality is not None
    assert (found.personality.domain, found.cgroups_path, found.mount_label) == ("LINUX32", "/a/b", "x")


def test_what_cri_o_writes_for_no_limits() -> None:
    """CRI-O sets quota, period and shares to 0 where there is no limit; runc takes that, so katapy must."""
    document = changed("linux/resources", {"cpu": {"quota": 0, "period": 0, "shares": 0}, "pids": {"limit": 0}})
    resources = spec_of(document).linux.resources
    assert resources is not None
    assert resources.cpu is not None
    assert (resources.cpu.quota, resources.cpu.period, resources.cpu.shares) == (None, None, None)
    assert resources.cpu.vcpus is None
    assert resources.pids_limit is None


def test_null_is_absent() -> None:
    spec = spec_of({**changed("process/rlimits", None), "hooks": None, "linux": None, "mounts": None})
    assert spec.process.rlimits == ()
    assert spec.linux.namespaces == ()


def test_other_systems_and_unknown_members_are_ignored_and_kept_for_the_guest() -> None:
    document = {**default_spec(), "windows": {"layerFolders": 3}, "solaris": {}, "x": 1, "hooks": {"prestart": []}}
    spec = spec_of(document)
    assert json.loads(spec.to_guest(root="/r", sources={}))["x"] == 1


def test_bind_mounts() -> None:
    document = {
        **default_spec(),
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/a", "type": "bind", "source": "data/../data", "options": ["ro", "rw"]},
            {"destination": "/b", "type": "none", "source": "/srv", "options": ["rbind", "ro"]},
            {"destination": "/c", "source": "/x", "options": ["bind", "rro"]},
        ],
    }
    assert spec_of(document).bind_mounts == (
        BindMount(1, "/b/data", "/a", read_only=False, recursive=False),
        BindMount(2, "/srv", "/b", read_only=True, recursive=True),
        BindMount(3, "/x", "/c", read_only=True, recursive=False),
    )


def test_mounts_inside_the_root_come_first() -> None:
    spec = spec_of(changed("mounts", [{"destination": "/a/b", "type": "tmpfs"}])).with_root_mounts("/r", ["/a", "/c d"])
    assert spec.bind_mounts == (
        BindMount(0, "/r/a", "/a", read_only=True, recursive=True),
        BindMount(1, "/r/c d", "/c d", read_only=True, recursive=True),
    )
    sent = json.loads(spec.to_guest(root="/g", sources={0: "/g0", 1: "/g1"}))["mounts"]
    assert [(mount["destination"], mount.get("source")) for mount in sent] == [
        *(("/a", "/g0"), ("/c d", "/g1"), ("/a/b", None)),
    ]


def test_to_guest_golden() -> None:
    document = {
        "ociVersion": "1.2.0",
        "hooks": {"poststop": []},
        "root": {"path": "rootfs", "readonly": True, "new": 1},
        "process": {"args": ["écho", "a\nb"], "cwd": "/", "env": ["A=1"]},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/a", "type": "bind", "source": "data", "options": ["ro"]},
        ],
        "annotations": {"k": "v"},
    }
    sent = spec_of(document).to_guest(root="/run/shared/c1/rootfs", sources={1: "/run/shared/c1/1"})
    assert sent.decode() == (
        '{"ociVersion":"1.2.0","root":{"path":"/run/shared/c1/rootfs","readonly":true,"new":1},'
        '"process":{"args":["écho","a\\nb"],"cwd":"/","env":["A=1"]},'
        '"mounts":[{"destination":"/proc","type":"proc","source":"proc"},'
        '{"destination":"/a","type":"bind","source":"/run/shared/c1/1","options":["ro"]}],'
        '"annotations":{"k":"v"}}'
    )


@pytest.mark.parametrize("sources", [{}, {0: "/x"}, {1: "/x", 0: "/y"}])
def test_to_guest_never_sends_a_path_of_the_host(sources: dict[int, str]) -> None:
    document = changed(
        "mounts", [{"destination": "/p", "type": "proc"}, {"destination": "/a", "type": "bind", "source": "/s"}]
    )
    with pytest.raises(Internal, match=r"cannot write config\.json"):
        spec_of(document).to_guest(root="/r", sources=sources)


@pytest.mark.parametrize("version", ["1.0.0", "1.0.2-dev", "1.2.0", "1.3.0-rc.1+dev", "1.99.0"])
def test_versions(version: str) -> None:
    assert spec_of({**default_spec(), "ociVersion": version}).oci_version == version


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("ociVersion", ..., "ociVersion: is missing"),
        ("ociVersion", "2.0.0", "ociVersion: '2.0.0' is not supported, only 1.x is"),
        ("ociVersion", "1.0.0\n", "ociVersion: '1.0.0\\n' is not a version such as 1.2.0"),
        ("ociVersion", "1" * 5000, f"ociVersion: '{'1' * 60}'... (5000 characters) is not a version such as 1.2.0"),
        ("ociVersion", 1, "ociVersion: expected a string"),
        ("root", ..., "root: is missing"),
        ("root/path", ..., "root.path: is missing"),
        ("root/path", "", "root.path: is empty"),
        ("root/path", "../other", "root.path: '../other' contains '..'"),
        ("root/path", "/x/../y", "root.path: '/x/../y' contains '..'"),
        ("root/path", "x" * 5000, "root.path: longer than 4095 bytes"),
        ("root/readonly", "yes", "root.readonly: expected true or false"),
        ("process", ..., "process: is missing"),
        ("process", [], "process: expected an object"),
        ("process/args", ..., "process.args: is missing"),
        ("process/args", [], "process.args: is empty"),
        ("process/args", "sh", "process.args: expected an array"),
        ("process/args", ["sh", 1], "process.args[1]: expected a string"),
        ("process/args", [""], "process.args[0]: is empty"),
        ("process/cwd", ..., "process.cwd: is missing"),
        ("process/cwd", "tmp", "process.cwd: 'tmp' is not an absolute path"),
        ("process/cwd", "/a/../b", "process.cwd: '/a/../b' contains '..'"),
        ("process/env", ["A"], "process.env[0]: 'A' is not KEY=VALUE"),
        ("process/env", ["=x"], "process.env[0]: '=x' is not KEY=VALUE"),
        ("process/user/uid", -1, "process.user.uid: -1 is not between 0 and 4294967294"),
        ("process/user/uid", 2**32 - 1, "process.user.uid: 4294967295 is not between 0 and 4294967294"),
        ("process/user/uid", True, "process.user.uid: expected an integer"),
        ("process/user/gid", 1.0, "process.user.gid: expected an integer"),
        ("process/user/umask", 0o1000, "process.user.umask: 512 is not between 0 and 511"),
        ("process/user/additionalGids", [0] * 65_537, "process.user.additionalGids: more than 65536 elements"),
        ("process/rlimits/0/soft", 2048, "process.rlimits[0]: soft 2048 is above hard 1024"),
        (
            "process/rlimits/0/hard",
            2**64,
            "process.rlimits[0].hard: 18446744073709551616 is not between 0 and 18446744073709551615",
        ),
        (
            "process/rlimits/1",
            {"type": "RLIMIT_NOFILE", "soft": 0, "hard": 0},
            "process.rlimits[1]: RLIMIT_NOFILE is given twice",
        ),
        ("process/rlimits/0/soft", ..., "process.rlimits[0].soft: is missing"),
        ("process/rlimits/0/hard", ..., "process.rlimits[0].hard: is missing"),
        (
            "process/ioPriority",
            {"class": "IOPRIO_CLASS_BE", "priority": 8},
            "process.ioPriority.priority: 8 is not between 0 and 7",
        ),
        (
            "process/capabilities/bounding",
            ["cap_kill"],
            "process.capabilities.bounding[0]: 'cap_kill' is not a capability (CAP_...)",
        ),
        ("process/oomScoreAdj", 1001, "process.oomScoreAdj: 1001 is not between -1000 and 1000"),
        ("process/consoleSize", {"height": 65536}, "process.consoleSize.height: 65536 is not between 0 and 65535"),
        (
            "process/scheduler",
            {"policy": "FIFO"},
            "process.scheduler.policy: 'FIFO' is none of SCHED_BATCH, SCHED_DEADLINE, SCHED_FIFO, SCHED_IDLE, "
            "SCHED_ISO, SCHED_OTHER, SCHED_RR",
        ),
        ("hostname", "a\nb", "hostname: 'a\\nb' is not a host name of at most 64 letters, digits, '.', '_', '-'"),
        (
            "hostname",
            "a" * 65,
            f"hostname: '{'a' * 60}'... (65 characters) is not a host name of at most 64 "
            "letters, digits, '.', '_', '-'",
        ),
        ("mounts", {}, "mounts: expected an array"),
        ("mounts", [{"destination": "/a"}] * 4097, "mounts: more than 4096 elements"),
        ("mounts/0/destination", "", "mounts[0].destination: is empty"),
        ("mounts/0/destination", "/a/../../b", "mounts[0].destination: '/a/../../b' contains '..'"),
        ("mounts/0/destination", "//.", "mounts[0].destination: cannot mount over the root file system"),
        ("mounts/0/options", ["ro", ""], "mounts[0].options[1]: is empty"),
        ("mounts/0", {"destination": "/a", "type": "bind"}, "mounts[0].source: a bind mount needs a source"),
        ("annotations", {"a b": 1}, "annotations['a b']: expected a string"),
        ("annotations", {"": "x"}, "annotations: a key is empty"),
        ("linux", [], "linux: expected an object"),
        (
            "linux/namespaces/0/type",
            "net",
            "linux.namespaces[0].type: 'net' is none of cgroup, ipc, mount, network, pid, time, user, uts",
        ),
        ("linux/namespaces/1/type", "pid", "linux.namespaces[1]: pid is given twice"),
        (
            "linux/uidMappings",
            [{"containerID": 0, "hostID": 4294967290, "size": 10}],
            "linux.uidMappings[0]: reaches beyond id 4294967294",
        ),
        (
            "linux/uidMappings",
            [{"containerID": 0, "hostID": 0, "size": 0}],
            "linux.uidMappings[0].size: 0 is not between 1 and 4294967295",
        ),
        (
            "linux/uidMappings",
            [{"containerID": 5, "hostID": 0, "size": 2}, {"containerID": 0, "hostID": 9, "size": 6}],
            "linux.uidMappings: container id 5 is mapped twice",
        ),
        ("linux/timeOffsets", {"realtime": {}}, "linux.timeOffsets: unknown clock 'realtime'"),
        ("linux/devices", [{"type": "c", "path": "/dev/x", "minor": 1}], "linux.devices[0].major: is missing"),
        (
            "linux/devices",
            [{"type": "c", "path": "dev", "major": 1, "minor": 1}],
            "linux.devices[0].path: 'dev' is not an absolute path",
        ),
        (
            "linux/devices",
            [{"type": "c", "path": "/dev/x", "major": 2**31, "minor": 1}],
            "linux.devices[0].major: 2147483648 is not between 0 and 2147483647",
        ),
        (
            "linux/resources/devices/0/major",
            2**31,
            "linux.resources.devices[0].major: 2147483648 is not between -1 and 2147483647",
        ),
        ("linux/resources/devices/0/type", "p", "linux.resources.devices[0].type: 'p' is none of a, b, c, u"),
        (
            "linux/resources/devices/0/access",
            "rx",
            "linux.resources.devices[0].access: 'rx' is not of the letters r, w and m",
        ),
        (
            "linux/resources/memory",
            {"limit": -2},
            "linux.resources.memory.limit: -2 is not between -1 and 9223372036854775807",
        ),
        (
            "linux/resources/memory",
            {"limit": 2**63},
            "linux.resources.memory.limit: 9223372036854775808 is not between -1 and 9223372036854775807",
        ),
        ("linux/resources/cpu", {"shares": 1}, "linux.resources.cpu.shares: 1 is not between 2 and 262144"),
        ("linux/resources/cpu", {"quota": 999}, "linux.resources.cpu.quota: 999 is less than 1000 microseconds"),
        ("linux/resources/cpu", {"quota": -2}, "linux.resources.cpu.quota: -2 is not between -1 and 17592186044415"),
        (
            "linux/resources/cpu",
            {"period": 2_000_000},
            "linux.resources.cpu.period: 2000000 is not between 1000 and 1000000",
        ),
        ("linux/resources/cpu", {"cpus": "0-999999999"}, "linux.resources.cpu.cpus: '0-999999999' is beyond 8191"),
        ("linux/resources/cpu", {"cpus": "3-1"}, "linux.resources.cpu.cpus: '3-1' runs backwards"),
        ("linux/resources/cpu", {"cpus": "0,\n1"}, "linux.resources.cpu.cpus: '0,\\n1' is not a list such as 0-3,8"),
        (
            "linux/resources/pids",
            {"limit": -5},
            "linux.resources.pids.limit: -5 is not between -1 and 9223372036854775807",
        ),
        ("linux/resources/blockIO", {"weight": 5}, "linux.resources.blockIO.weight: 5 is not between 10 and 1000"),
        (
            "linux/resources/blockIO",
            {"weightDevice": [{"major": 8, "minor": 0}]},
            "linux.resources.blockIO.weightDevice[0].weight: is missing",
        ),
        (
            "linux/resources/hugepageLimits",
            [{"pageSize": "../x", "limit": 1}],
            "linux.resources.hugepageLimits[0].pageSize: '../x' is not a huge page size such as 2MB",
        ),
        ("linux/resources/unified", {"../x": "1"}, "linux.resources.unified: '../x' is not the name of a cgroup file"),
        ("linux/sysctl", {"net..x": "1"}, "linux.sysctl: 'net..x' is not a sysctl"),
        ("linux/sysctl", {"../../etc/x": "1"}, "linux.sysctl: '../../etc/x' is not a sysctl"),
        ("linux/sysctl", {"kernel.x": 1}, "linux.sysctl['kernel.x']: expected a string"),
        (
            "linux/seccomp",
            {"defaultAction": "ALLOW"},
            "linux.seccomp.defaultAction: 'ALLOW' is not a seccomp action (SCMP_ACT_...)",
        ),
        (
            "linux/seccomp",
            {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"action": "SCMP_ACT_KILL"}]},
            "linux.seccomp.syscalls[0].names: is empty",
        ),
        (
            "linux/rootfsPropagation",
            "weird",
            "linux.rootfsPropagation: 'weird' is none of private, rprivate, rshared, rslave, runbindable, "
            "shared, slave, unbindable",
        ),
        ("linux/maskedPaths", ["/proc/../etc"], "linux.maskedPaths[0]: '/proc/../etc' contains '..'"),
        ("linux/personality", {"domain": "BSD"}, "linux.personality.domain: 'BSD' is none of LINUX, LINUX32"),
    ],
)
def test_refused(path: str, value: Any, message: str) -> None:
    error = error_of(changed(path, value))
    assert isinstance(error, InvalidArgument)
    assert str(error) == f"config.json: {message}"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("linux/resources/blockIO", {"leafWeight": 10}, "linux.resources.blockIO.leafWeight: not supported"),
        ("vm", {"kernel": {"path": "/k"}}, "vm: choosing hypervisor, kernel or image here is not supported"),
        ("mounts/0/uidMappings", [{}], "mounts[0].uidMappings: id-mapped mounts are not supported"),
        (
            "linux/namespaces/1/path",
            "/proc/1/ns/ipc",
            "linux.namespaces[1].path: joining another namespace is not supported yet",
        ),
    ],
)
def test_unsupported(path: str, value: Any, message: str) -> None:
    """The path of a namespace of the host was opened in the guest, and that of a network was passed over."""
    error = error_of(changed(path, value))
    assert isinstance(error, Unsupported)
    assert str(error) == f"config.json: {message}"


SANDBOX = {"io.kubernetes.cri-o.ContainerType": "sandbox", "io.kubernetes.cri-o.SandboxID": "s1"}
MEMBER = {**SANDBOX, "io.kubernetes.cri-o.ContainerType": "container"}
PODMAN = {"io.container.manager": "libpod", "io.kubernetes.cri-o.SandboxID": "s1"}


def test_the_sandbox_of_a_pod_of_crio_s() -> None:
    """Its namespaces are kept by files on the host, and were refused. They become new ones, and nobody's to join."""
    document = changed("annotations", SANDBOX)
    for namespace in document["linux"]["namespaces"]:
        if namespace["type"] in ("ipc", "uts", "network"):
            namespace["path"] = f"/run/{namespace['type']}ns/1"
    spec = spec_of(document)
    assert (spec.sandbox, spec.joined_namespaces) == ("", ())
    assert b"/run/" not in spec.to_guest(root="/r", sources={})
    for kind in ("pid", "mount"):
        other = copy.deepcopy(document)
        other["linux"]["namespaces"] = [{"type": kind, "path": "/run/other"}]
        assert isinstance(error_of(other), Unsupported)


@pytest.mark.parametrize(
    ("annotations", "shares", "sandbox"),
    [
        (MEMBER, False, "s1"),
        (MEMBER, True, "s1"),
        ({**MEMBER, **PODMAN}, True, "s1"),
        # Where podman names a sandbox that is none: without an infra container, or without anything to share.
        ({**MEMBER, **PODMAN}, False, ""),
        # From its version 5 on.
        (PODMAN, True, "s1"),
        (PODMAN, False, ""),
        ({"io.container.manager": "libpod"}, False, ""),
    ],
)
def test_whose_vm_a_container_joins(annotations: dict[str, str], shares: bool, sandbox: str) -> None:
    document = changed("annotations", annotations)
    if shares:
        document["linux"]["namespaces"][1]["path"] = "/proc/1/ns/ipc"
    assert spec_of(document).sandbox == sandbox


def test_a_path_with_commas_quotes_and_spaces_is_kept(tmp_path: Path) -> None:
    document = changed("root/path", '/a b,c="d"/rootfs')
    assert spec_of(document).rootfs == '/a b,c="d"/rootfs'
