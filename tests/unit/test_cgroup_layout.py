"""Which hierarchies a host has, from what /proc says on different hosts."""

from __future__ import annotations

import pytest

from katapy.cgroups.layout import Hierarchy, Kind, Layout, find_layout, parse_layout

UNIFIED = (
    """\
24 30 0:22 / /proc rw,nosuid - proc proc rw
35 24 0:30 / /sys/fs/cgroup rw,nosuid,nodev shared:9 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot
""",
    "0::/user.slice/user-0.slice/session-1.scope\n",
)
V1 = (
    """\
25 30 0:23 / /sys rw,nosuid shared:7 - sysfs sysfs rw
32 25 0:28 / /sys/fs/cgroup ro,nosuid shared:9 - tmpfs tmpfs ro,mode=755
34 32 0:30 / /sys/fs/cgroup/systemd rw,nosuid shared:11 - cgroup cgroup rw,xattr,release_agent=/x,name=systemd
38 32 0:33 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:15 - cgroup cgroup rw,cpu,cpuacct
39 32 0:34 / /sys/fs/cgroup/memory rw,nosuid shared:16 - cgroup cgroup rw,memory
""",
    "5:memory:/user.slice\n4:cpu,cpuacct:/user.slice\n1:name=systemd:/user.slice/session-1.scope\n0::/x\n",
)
HYBRID = (
    V1[0] + "33 32 0:29 / /sys/fs/cgroup/unified rw,nosuid shared:10 - cgroup2 cgroup2 rw,nsdelegate\n",
    V1[1],
)
# Inside of a docker container on v1, without a cgroup namespace: what is mounted is its own subtree.
NESTED = (
    """\
712 703 0:28 /docker/abc /sys/fs/cgroup/memory ro,nosuid master:16 - cgroup cgroup rw,memory
713 703 0:31 /docker/abc /sys/fs/cgroup/pids rw,nosuid master:17 - cgroup cgroup rw,pids
""",
    "7:memory:/docker/abc\n6:pids:/docker/abc/inner\n0::/docker/abc\n",
)


def parse(host: tuple[str, str], controllers: tuple[str, ...] = ("cpu", "io", "memory")) -> Layout:
    return parse_layout(*host, lambda mount: controllers)


def test_unified() -> None:
    layout = parse(UNIFIED)
    assert layout.kind is Kind.UNIFIED
    own = "/user.slice/user-0.slice/session-1.scope"
    assert layout.hierarchies == (Hierarchy(2, "/sys/fs/cgroup", own, ("cpu", "io", "memory"), writable=True),)
    assert layout.hierarchies[0].name == ""


def test_v1_controllers_of_one_hierarchy_and_named_ones() -> None:
    layout = parse(V1)
    assert layout.kind is Kind.V1
    assert [(each.name, each.mount, each.own) for each in layout.hierarchies] == [
        ("name=systemd", "/sys/fs/cgroup/systemd", "/user.slice/session-1.scope"),
        ("cpu,cpuacct", "/sys/fs/cgroup/cpu,cpuacct", "/user.slice"),
        ("memory", "/sys/fs/cgroup/memory", "/user.slice"),
    ]
    assert layout.find("cpuacct") == layout.find("cpu") == layout.hierarchies[1]
    assert layout.find("pids") is None


def test_hybrid_takes_each_controller_from_where_it_is() -> None:
    layout = parse(HYBRID, ("hugetlb",))
    assert layout.kind is Kind.HYBRID
    versions = {name: hierarchy.version for name in ("memory", "hugetlb") if (hierarchy := layout.find(name))}
    assert versions == {"memory": 1, "hugetlb": 2}


def test_nested_container_sees_its_subtree() -> None:
    memory, pids = parse(NESTED).hierarchies
    assert (memory.own, memory.writable) == ("/", False)
    assert (pids.own, pids.writable) == ("/inner", True)


def test_outside_of_the_own_cgroup_namespace_is_the_mount_itself() -> None:
    host = ("35 24 0:30 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n", "0::/../other\n")
    assert parse(host).hierarchies[0].own == "/"


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_mounts_the_one_of_the_root(order: int) -> None:
    lines = ["1 0 0:30 /a /x rw - cgroup2 none rw", "2 0 0:30 / /y rw - cgroup2 none rw"]
    assert [each.mount for each in parse(("\n".join(lines[::order]), "0::/\n")).hierarchies] == ["/y"]


def test_escaped_mount_points_and_hosts_without_cgroups() -> None:
    assert parse(("1 0 0:30 / /a\\040b rw - cgroup2 none rw\n", "0::/\n")).hierarchies[0].mount == "/a b"
    assert parse(("24 30 0:22 / /proc rw,nosuid - proc proc rw\n", "")) == Layout(())
    assert Layout(()).kind is Kind.NONE


def test_holding_does_not_take_a_sibling_with_a_common_prefix() -> None:
    layout = parse(V1)
    assert layout.holding("/sys/fs/cgroup/memory/x") == layout.find("memory")
    assert layout.holding("/sys/fs/cgroup/memory-x/y") is None
    assert layout.holding("/sys/fs/cgroup/memory") is None


def test_this_host() -> None:
    assert all(hierarchy.mount.startswith("/") for hierarchy in find_layout().hierarchies)
