"""The configurations of what runs in a sandbox."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from katapy.oci.bundle import load_bundle
from katapy.oci.layer import LayerLimits
from katapy.sdk.document import Base, Command, Shared, User, check_network, holder, run
from katapy.sdk.limits import MIB, Limits

BASE = Base(
    rootfs="/root file:system",
    limits=Limits(memory=64 * MIB, cpus=0.25, processes=3, disk=8 * MIB, inodes=100, open_files=32, file_size=MIB),
    shared=(Shared("/source", "/ro", read_only=True), Shared("/other", "/rw", read_only=False)),
)
COMMAND = Command(["echo", "x"], {"A": "b=c"}, "/tmp", User(1000, 100), terminal=True)


def test_a_run_has_the_limits_and_no_more_rights_than_it_needs() -> None:
    document = run(BASE, COMMAND, "s1")
    process, linux = document["process"], document["linux"]
    assert (process["args"], process["env"], process["cwd"], process["terminal"]) == (
        ["echo", "x"],
        ["A=b=c"],
        "/tmp",
        True,
    )
    assert {name: process["user"][name] for name in ("uid", "gid")} == {"uid": 1000, "gid": 100}
    assert process["noNewPrivileges"] is True
    assert {each["type"]: (each["soft"], each["hard"]) for each in process["rlimits"]} == {
        "RLIMIT_NOFILE": (32, 32),
        "RLIMIT_FSIZE": (MIB, MIB),
        "RLIMIT_CORE": (0, 0),
    }
    for names in process["capabilities"].values():
        assert not {
            "CAP_SYS_ADMIN",
            "CAP_MKNOD",
            "CAP_SYS_PTRACE",
            "CAP_NET_RAW",
            "CAP_SYS_BOOT",
            "CAP_SYS_TIME",
        } & set(names)
    assert linux["resources"]["memory"] == {"limit": 64 * MIB, "swap": 64 * MIB}
    assert linux["resources"]["cpu"] == {"quota": 25000, "period": 100000}
    # The init of its PID namespace is another.
    assert linux["resources"]["pids"] == {"limit": 4}
    assert document["annotations"]["io.katapy.init"] == "true"
    (rule,) = linux["seccomp"]["syscalls"]
    assert {"reboot", "settimeofday", "init_module", "mount", "unshare"} <= set(rule["names"])


def test_what_is_shared() -> None:
    mounts = {each["destination"]: each for each in run(BASE, COMMAND, "s1")["mounts"]}
    assert (mounts["/ro"]["source"], mounts["/ro"]["options"]) == ("/source", ["rbind", "nosuid", "nodev", "ro"])
    assert (mounts["/rw"]["source"], mounts["/rw"]["options"][-1]) == ("/other", "rw")


def test_the_holder_has_no_init_and_nothing_of_the_callers() -> None:
    document = holder(BASE, "/bin/busybox")
    assert "/rw" not in {each["destination"] for each in document["mounts"]}
    assert "io.katapy.init" not in document["annotations"]
    assert {"type": "network"} in document["linux"]["namespaces"]


def test_both_are_valid(tmp_path: Path) -> None:
    """And ask for the layer."""
    (tmp_path / "root").mkdir()
    base = Base(rootfs=str(tmp_path / "root"), limits=BASE.limits)
    for number, document in enumerate((holder(base, "/bin/busybox"), run(base, COMMAND, "s1"))):
        assert _loaded(tmp_path / str(number), document).layer == LayerLimits(8 * MIB, 100)


def _loaded(directory: Path, document: dict[str, Any]) -> Any:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(document))
    return load_bundle(str(directory)).spec


def test_networks() -> None:
    assert [check_network(each) for each in (None, "none", "blue", "/proc/1/ns/net")] == [
        None,
        None,
        "/run/netns/blue",
        "/proc/1/ns/net",
    ]
