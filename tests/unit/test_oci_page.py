"""docs/oci.md is complete and true: it has every field of config.json, and says of each what the two parsers do.

The fields are written down here from the runtime-spec 1.2 (config.md, config-linux.md), each with a value that asks
for something. A document with one such field is given to the host's parser and, as the host sends it, to the guest's.
"""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any, Final, NamedTuple

import katapy_agent.errors
import pytest
from katapy_agent import cgroups, child, config

from katapy.errors import Unsupported
from katapy.oci.spec import Spec, parse_spec

TOP: Final = Path(__file__).parents[2]
ROW: Final = re.compile(r"^\| `([^`]+)` \| (honoured|refused|no effect)(?:: (.+?))? \| `([^`]+)::(\w+)` \|$")

FIELDS: Final[dict[str, Any]] = {
    "ociVersion": "1.0.2-dev",
    "root.path": "/other",
    "root.readonly": True,
    "hostname": "box",
    "domainname": "example.org",
    "annotations": {"a": "b"},
    "vm": {"kernel": {"path": "/k"}},
    "mounts[].destination": "/y",
    "mounts[].type": "mqueue",
    "mounts[].source": "none",
    "mounts[].options": ["nosuid"],
    "mounts[].uidMappings": [{"containerID": 0, "hostID": 1, "size": 1}],
    "mounts[].gidMappings": [{"containerID": 0, "hostID": 1, "size": 1}],
    "process.terminal": True,
    "process.consoleSize.height": 10,
    "process.consoleSize.width": 20,
    "process.cwd": "/tmp",
    "process.env": ["A=b"],
    "process.args": ["other"],
    "process.rlimits[].type": "RLIMIT_CORE",
    "process.rlimits[].soft": 1,
    "process.rlimits[].hard": 30,
    "process.apparmorProfile": "docker-default",
    **{
        f"process.capabilities.{name}": ["CAP_KILL"]
        for name in ("effective", "bounding", "inheritable", "permitted", "ambient")
    },
    "process.noNewPrivileges": True,
    "process.oomScoreAdj": 100,
    "process.scheduler.policy": "SCHED_FIFO",
    "process.scheduler.nice": 5,
    "process.scheduler.priority": 5,
    "process.scheduler.flags": ["SCHED_FLAG_RESET_ON_FORK"],
    "process.scheduler.runtime": 10,
    "process.scheduler.deadline": 20,
    "process.scheduler.period": 30,
    "process.selinuxLabel": "system_u:system_r:svirt_lxc_net_t:s0:c124,c675",
    "process.ioPriority.class": "IOPRIO_CLASS_RT",
    "process.ioPriority.priority": 4,
    "process.execCPUAffinity.initial": "0-3",
    "process.execCPUAffinity.final": "0",
    "process.user.uid": 5,
    "process.user.gid": 6,
    "process.user.umask": 18,
    "process.user.additionalGids": [7],
    **{
        f"hooks.{kind}[].{name}": value
        for kind in ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")
        for name, value in {"path": "/bin/other", "args": ["hook", "x"], "env": ["A=b"], "timeout": 30}.items()
    },
    "linux.namespaces[].type": "cgroup",
    "linux.namespaces[].path": "/proc/1/ns/cgroup",
    **{
        f"linux.{name}[].{key}": value
        for name in ("uidMappings", "gidMappings")
        for key, value in {"containerID": 100, "hostID": 2000, "size": 20}.items()
    },
    "linux.timeOffsets.<clock>.secs": 100,
    "linux.timeOffsets.<clock>.nanosecs": 100,
    "linux.devices[].type": "b",
    "linux.devices[].path": "/dev/other",
    "linux.devices[].major": 10,
    "linux.devices[].minor": 229,
    "linux.devices[].fileMode": 420,
    "linux.devices[].uid": 5,
    "linux.devices[].gid": 6,
    "linux.cgroupsPath": "/a/b",
    "linux.resources.devices[].allow": True,
    "linux.resources.devices[].type": "c",
    "linux.resources.devices[].major": 10,
    "linux.resources.devices[].minor": 229,
    "linux.resources.devices[].access": "r",
    "linux.resources.memory.limit": 1 << 28,
    "linux.resources.memory.reservation": 1 << 20,
    "linux.resources.memory.swap": 1 << 28,
    "linux.resources.memory.kernel": 1 << 20,
    "linux.resources.memory.kernelTCP": 1 << 20,
    "linux.resources.memory.swappiness": 10,
    "linux.resources.memory.disableOOMKiller": True,
    "linux.resources.memory.useHierarchy": True,
    "linux.resources.memory.checkBeforeUpdate": True,
    "linux.resources.cpu.shares": 512,
    "linux.resources.cpu.quota": 50_000,
    "linux.resources.cpu.period": 50_000,
    "linux.resources.cpu.burst": 1000,
    "linux.resources.cpu.realtimeRuntime": 1000,
    "linux.resources.cpu.realtimePeriod": 1000,
    "linux.resources.cpu.cpus": "0",
    "linux.resources.cpu.mems": "0",
    "linux.resources.cpu.idle": 1,
    "linux.resources.blockIO.weight": 100,
    "linux.resources.blockIO.leafWeight": 100,
    "linux.resources.blockIO.weightDevice[].major": 9,
    "linux.resources.blockIO.weightDevice[].minor": 9,
    "linux.resources.blockIO.weightDevice[].weight": 200,
    "linux.resources.blockIO.weightDevice[].leafWeight": 200,
    **{
        f"linux.resources.blockIO.throttle{what}Device[].{name}": 9
        for what in ("ReadBps", "WriteBps", "ReadIOPS", "WriteIOPS")
        for name in ("major", "minor", "rate")
    },
    "linux.resources.hugepageLimits[].pageSize": "1GB",
    "linux.resources.hugepageLimits[].limit": 1 << 30,
    "linux.resources.network.classID": 1,
    "linux.resources.network.priorities[].name": "eth0",
    "linux.resources.network.priorities[].priority": 1,
    "linux.resources.pids.limit": 100,
    "linux.resources.rdma.<device>.hcaHandles": 1,
    "linux.resources.rdma.<device>.hcaObjects": 1,
    "linux.resources.unified": {"memory.high": "1000000"},
    "linux.intelRdt.closID": "x",
    "linux.intelRdt.l3CacheSchema": "L3:0=f",
    "linux.intelRdt.memBwSchema": "MB:0=20",
    "linux.intelRdt.enableCMT": True,
    "linux.intelRdt.enableMBM": True,
    "linux.sysctl": {"kernel.msgmax": "5000"},
    "linux.rootfsPropagation": "slave",
    "linux.maskedPaths": ["/proc/kcore"],
    "linux.readonlyPaths": ["/proc/sys"],
    "linux.mountLabel": "system_u:object_r:svirt_sandbox_file_t:s0:c715,c811",
    "linux.personality.domain": "LINUX32",
    "linux.personality.flags": ["ADDR_NO_RANDOMIZE"],
    "linux.seccomp.defaultAction": "SCMP_ACT_LOG",
    "linux.seccomp.defaultErrnoRet": 38,
    "linux.seccomp.architectures": ["SCMP_ARCH_X86"],
    "linux.seccomp.flags": ["SECCOMP_FILTER_FLAG_LOG"],
    "linux.seccomp.listenerPath": "/run/listener",
    "linux.seccomp.listenerMetadata": "x",
    "linux.seccomp.syscalls[].names": ["mkdirat"],
    "linux.seccomp.syscalls[].action": "SCMP_ACT_KILL",
    "linux.seccomp.syscalls[].errnoRet": 38,
    "linux.seccomp.syscalls[].args[].index": 1,
    "linux.seccomp.syscalls[].args[].value": 2,
    "linux.seccomp.syscalls[].args[].valueTwo": 3,
    "linux.seccomp.syscalls[].args[].op": "SCMP_CMP_NE",
}
# What a field needs beside and around it, so that the document is right but for the field itself.
_MAPPING: Final = {"containerID": 50, "hostID": 1050, "size": 10}
_ROOT_MAPPING: Final = {"containerID": 0, "hostID": 1000, "size": 10}
_THROTTLE: Final = {"major": 8, "minor": 0, "rate": 1}
AROUND: Final[dict[str, Any]] = {
    "mounts[]": {"destination": "/x", "type": "tmpfs", "source": "tmpfs"},
    "process.rlimits[]": {"type": "RLIMIT_NOFILE", "soft": 10, "hard": 20},
    "process.scheduler": {"policy": "SCHED_OTHER"},
    "process.ioPriority": {"class": "IOPRIO_CLASS_BE"},
    **{f"hooks.{kind}[]": {"path": "/bin/hook"} for kind in ("prestart", "createRuntime", "createContainer")},
    **{f"hooks.{kind}[]": {"path": "/bin/hook"} for kind in ("startContainer", "poststart", "poststop")},
    "linux.uidMappings[]": _MAPPING,
    "linux.gidMappings[]": _MAPPING,
    "linux.devices[]": {"type": "c", "path": "/dev/x", "major": 1, "minor": 3},
    "linux.resources.devices[]": {"allow": False},
    "linux.resources.blockIO.weightDevice[]": {"major": 8, "minor": 0, "weight": 100},
    **{
        f"linux.resources.blockIO.throttle{what}Device[]": _THROTTLE
        for what in ("ReadBps", "WriteBps", "ReadIOPS", "WriteIOPS")
    },
    "linux.resources.hugepageLimits[]": {"pageSize": "2MB", "limit": 1},
    "linux.resources.network.priorities[]": {"name": "lo", "priority": 0},
    "linux.personality": {"domain": "LINUX"},
    "linux.seccomp": {"defaultAction": "SCMP_ACT_ERRNO"},
    "linux.seccomp.syscalls[]": {"names": ["mkdir"], "action": "SCMP_ACT_TRACE"},
    "linux.seccomp.syscalls[].args[]": {"index": 0, "value": 1, "op": "SCMP_CMP_MASKED_EQ"},
    # A limit of swap includes that of memory.
    "linux.resources.memory": {"limit": 1 << 27},
}
KEYS: Final = {"<clock>": "boottime", "<device>": "mlx5_1"}


class Row(NamedTuple):
    """A line of the page."""

    field: str
    becomes: str
    reason: str
    file: str
    test: str


def rows() -> list[Row]:
    lines = (TOP / "docs/oci.md").read_text().splitlines()
    found = [ROW.match(line) for line in lines if line.startswith("| `")]
    assert all(found), "a line of the table has another form"
    return [Row(*(text or "" for text in match.groups())) for match in found if match]


def rows_that(becomes: str) -> list[Any]:
    return [pytest.param(row, id=row.field) for row in rows() if row.becomes == becomes]


def base() -> dict[str, Any]:
    """A document that needs none of the fields, with most namespaces, so that any field can be added."""
    kinds = ("mount", "pid", "ipc", "uts", "network", "time")
    return {
        "ociVersion": "1.2.0",
        "root": {"path": "/rootfs"},
        "process": {"cwd": "/", "args": ["/bin/true"]},
        "linux": {"namespaces": [{"type": kind} for kind in kinds]},
    }


def document_with(field: str, *, value: bool = True) -> dict[str, Any]:
    """The base document and what surrounds ``field``; with ``value`` also the field itself."""
    document = base()
    if field.startswith("linux.namespaces[]"):
        # The list is there already: one more.
        entry = {"type": "cgroup"} | ({"path": FIELDS[field]} if field.endswith("path") else {})
        document["linux"]["namespaces"] += [entry] if value else []
        return document
    if re.match(r"linux\.[ug]idMappings", field):
        document["linux"]["namespaces"].append({"type": "user"})
        for name in ("uidMappings", "gidMappings"):
            document["linux"][name] = [dict(_MAPPING), dict(_ROOT_MAPPING)]
    place: dict[str, Any] = document
    path = ""
    *parents, last = field.split(".")
    for parent in parents:
        path = f"{path}.{parent}" if path else parent
        name = KEYS.get(parent, parent.removesuffix("[]"))
        around = copy.deepcopy(AROUND.get(path, {}))
        if parent.endswith("[]"):
            items = place.setdefault(name, [around])
            place = items[0]
        else:
            place = place.setdefault(name, {})
            place.update({key: item for key, item in around.items() if key not in place})
    if value:
        place[last] = copy.deepcopy(FIELDS[field])
    return document


def on_host(document: dict[str, Any]) -> Spec:
    return parse_spec(json.dumps(document).encode(), bundle="/b")


def in_guest(spec: Spec, root: str) -> config.Spec:
    """What the agent does with the document before it makes anything."""
    found = config.parse_spec(spec.to_guest(root=root, sources={}))
    child.plan_init(found, container_id="c1", cgroup="/c", rows=0, columns=0)
    cgroups.plan_limits(found.linux.resources)
    return found


def pass_both(document: dict[str, Any]) -> tuple[Spec, config.Spec]:
    spec = on_host(document)
    return spec, in_guest(spec, document["root"]["path"])


def test_no_field_is_missing() -> None:
    named = [row.field for row in rows()]
    assert len(set(named)) == len(named)
    assert set(named) == set(FIELDS)


@pytest.mark.parametrize("field", FIELDS)
def test_what_surrounds_a_field_is_accepted(field: str) -> None:
    """So that what is refused is refused for the field."""
    document = document_with(field, value=False)
    if field.startswith("hooks."):
        document.pop("hooks", None)
    if (field.split(".")[:3]) == ["linux", "resources", "network"] or field.startswith("linux.resources.rdma"):
        document["linux"].pop("resources")
    pass_both(document)


@pytest.mark.parametrize("row", [pytest.param(row, id=row.field) for row in rows()])
def test_the_named_test_exists(row: Row) -> None:
    assert re.search(rf"^(async )?def {row.test}\(", (TOP / row.file).read_text(), re.MULTILINE)
    assert row.reason or row.becomes == "honoured"


@pytest.mark.parametrize("row", rows_that("honoured"))
def test_honoured(row: Row) -> None:
    """It passes both parsers, and what comes out is not what comes out without it: it was not dropped."""
    if re.match(r"hooks\.(?!startContainer)", row.field) or row.reason.startswith("on the host"):
        # The host's business: the guest gets only the hooks that run in it.
        assert repr(on_host(document_with(row.field))) != repr(on_host(document_with(row.field, value=False)))
        return
    host, guest = pass_both(document_with(row.field))
    host_without, guest_without = pass_both(document_with(row.field, value=False))
    # The text of a Spec has everything but the document that it was parsed from.
    assert repr(host) != repr(host_without)
    assert guest != guest_without


@pytest.mark.parametrize("row", rows_that("no effect"))
def test_no_effect(row: Row) -> None:
    pass_both(document_with(row.field))


@pytest.mark.parametrize("row", rows_that("refused"))
def test_refused(row: Row) -> None:
    """By the host or, before it makes anything, by the guest; the field or what it is in is named."""
    parent, _, name = row.field.replace("[]", "[0]").rpartition(".")
    with pytest.raises((Unsupported, katapy_agent.errors.Unsupported)) as caught:
        pass_both(document_with(row.field))
    text = str(caught.value)
    wholes = (parent, parent.partition("[")[0], parent.rpartition(".")[0])
    assert name in text or any(f"{whole} is not supported" in text for whole in wholes), text


def test_annotations_are_kept() -> None:
    assert on_host(document_with("annotations")).annotations == {"a": "b"}
