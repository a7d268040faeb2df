"""linux.cgroupsPath: what runc makes of it, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katapy.cgroups.layout import Hierarchy
from katapy.cgroups.path import CgroupPath, Driver, parse_cgroups_path
from katapy.errors import InvalidArgument

V1 = Hierarchy(1, "/sys/fs/cgroup/memory", "/user.slice/s", ("memory",), writable=True)
V2 = Hierarchy(2, "/sys/fs/cgroup", "/user.slice/s", ("memory",), writable=True)


@pytest.mark.parametrize(
    ("text", "v1", "v2"),
    [
        ("", "/katapy/c1", "/katapy/c1"),
        ("/docker/abc", "/docker/abc", "/docker/abc"),
        ("//docker/./abc/", "/docker/abc", "/docker/abc"),
        ("abc", "/user.slice/s/abc", "/user.slice/abc"),
        ("a/b", "/user.slice/s/a/b", "/user.slice/a/b"),
        ("/a:b:c", "/a:b:c", "/a:b:c"),
    ],
)
def test_cgroupfs(text: str, v1: str, v2: str) -> None:
    path = parse_cgroups_path(text, Driver.CGROUPFS, "c1")
    assert (path.within(V1), path.within(V2)) == (v1, v2)
    assert path.asked is bool(text)


@pytest.mark.parametrize(
    ("text", "path", "unit", "slice_name"),
    [
        ("", "/system.slice/katapy-c1.scope", "katapy-c1.scope", "system.slice"),
        ("system.slice:docker:1234", "/system.slice/docker-1234.scope", "docker-1234.scope", "system.slice"),
        (":libpod:x", "/system.slice/libpod-x.scope", "libpod-x.scope", "system.slice"),
        ("-.slice:p:x", "/p-x.scope", "p-x.scope", "-.slice"),
        ("machine.slice::x", "/machine.slice/x.scope", "x.scope", "machine.slice"),
        ("a-b-c.slice:p:x", "/a.slice/a-b.slice/a-b-c.slice/p-x.scope", "p-x.scope", "a-b-c.slice"),
    ],
)
def test_systemd(text: str, path: str, unit: str, slice_name: str) -> None:
    assert parse_cgroups_path(text, Driver.SYSTEMD, "c1") == CgroupPath(path, False, unit, slice_name, bool(text))


@pytest.mark.parametrize(
    "text",
    ["/../x", "../x", "/a/../b", "a/..", "/", ".", "/a\nb", "/a\0b", "/" + "a" * 256, "/a" * 2000, "/\udc80", "/a\x7f"],
)
def test_cgroupfs_refuses(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^linux\.cgroupsPath: ") as refused:
        parse_cgroups_path(text, Driver.CGROUPFS, "c1")
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    "text",
    [
        "/docker/abc",
        "a.slice:b",
        "a.slice:b:c:d",
        "a.slice:b:",
        "a:b:c",
        ".slice:b:c",
        "-a.slice:b:c",
        "a--b.slice:b:c",
        "../a.slice:b:c",
        "a/b.slice:b:c",
        "a.slice:../b:c",
        "a.slice:b:c/d",
        "a.slice:b:c d",
        "a.slice:b:c\n",
        "a.slice:b:c.slice",
        "a.slice:b:" + "c" * 250,
        "a" * 250 + ".slice:b:c",
    ],
)
def test_systemd_refuses(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^linux\.cgroupsPath: "):
        parse_cgroups_path(text, Driver.SYSTEMD, "c1")


@given(text=st.text(), driver=st.sampled_from(Driver))
def test_whatever_comes_stays_below_the_hierarchy(text: str, driver: Driver) -> None:
    try:
        path = parse_cgroups_path(text, driver, "c1")
    except InvalidArgument:
        return
    for hierarchy in (V1, V2):
        parts = path.within(hierarchy).split("/")
        assert parts[0] == ""
        assert len(parts) > 1
        assert not {"", ".", ".."} & set(parts[1:])
