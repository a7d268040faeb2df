"""The runtime specification's rules for config.json (config.md, config-linux.md), each seen from inside a container.

A few containers carry all of it: each runs one script that prints facts by name, and each test compares some of them
with what the specification says about the configuration. So a machine boots once for many rules.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness import Edit, Katapy, MakeBundle, make_busybox

from katapy.oci.default import default_spec
from katapy.oci.features import CAPABILITIES

Document = dict[str, Any]


class Fact(NamedTuple):
    """What a command printed, both streams in one, and its exit status."""

    text: str
    status: int


class Mounted(NamedTuple):
    """A line of mountinfo (proc(5))."""

    place: str
    options: set[str]
    kind: str
    source: str


class Facts:
    """What a container has told, by name; ``errors`` is what katapy has."""

    def __init__(self, output: str, errors: str) -> None:
        self.errors = errors
        found = re.findall(r"^<<< (\S+)\n(.*?)^>>> (\d+)\n", output, re.MULTILINE | re.DOTALL)
        self._facts = {name: Fact(text.rstrip("\n"), int(status)) for name, text, status in found}

    def __getitem__(self, name: str) -> Fact:
        return self._facts[name]

    def mounts(self) -> list[Mounted]:
        """Return all mounts, as "mountinfo" has them."""
        found = []
        for line in self["mountinfo"].text.splitlines():
            own, _, below = line.partition(" - ")
            place, options = own.split(" ")[4:6]
            kind, source, own_options = below.split(" ")
            found.append(Mounted(place, {*options.split(","), *own_options.split(",")}, kind, source))
        return found

    def mount(self, place: str) -> Mounted:
        """Return what is mounted on top at ``place``."""
        return [mount for mount in self.mounts() if mount.place == place][-1]


def _script(commands: Mapping[str, str]) -> list[str]:
    # The first line break ends a text without one.
    lines = (
        f"echo '<<< {name}'; ( {command} ) 2>&1; s=$?; echo; echo \">>> $s\"" for name, command in commands.items()
    )
    return ["/bin/sh", "-c", "\n".join(lines)]


def _run(directory: Path, rootfs: Path, commands: Mapping[str, str], edit: Edit) -> Facts:
    """Run ``commands`` as one container, whose root file system is ``rootfs``, and return the facts."""
    bundle = directory / "bundle"
    bundle.mkdir(parents=True, exist_ok=True)
    spec = deepcopy(default_spec())
    spec["process"].update(terminal=False, args=_script(commands))
    spec["root"] = {"path": str(rootfs), "readonly": False}
    edit(spec)
    (bundle / "config.json").write_text(json.dumps(spec))
    katapy = Katapy(directory / "run")
    done = katapy("run", "--bundle", bundle, "c1")
    assert done.returncode == 0, done.stderr.decode()
    assert list(katapy.root.iterdir()) == []
    return Facts(done.stdout.decode(), done.stderr.decode())


def _mount(destination: str, kind: str, source: str, *options: str) -> Document:
    return {"destination": destination, "type": kind, "source": source, "options": list(options)}


# --- a privileged container with a root file system that it may write to -----------------------------------------

DEVICES: list[Document] = [
    {"path": "/dev/mine", "type": "c", "major": 1, "minor": 3, "fileMode": 0o640, "uid": 1, "gid": 2},
    {"path": "/dev/plain", "type": "u", "major": 1, "minor": 5},
    {"path": "/dev/block", "type": "b", "major": 8, "minor": 666, "fileMode": 0o600, "uid": 0, "gid": 6},
    {"path": "/dev/fifo", "type": "p", "fileMode": 0o622, "uid": 3, "gid": 4},
    {"path": "/opt/new/full", "type": "c", "major": 1, "minor": 7, "fileMode": 0o444, "uid": 0, "gid": 0},
    {"path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11},
    {"path": "/dev/allowed", "type": "c", "major": 10, "minor": 251},
    {"path": "/dev/denied", "type": "c", "major": 10, "minor": 250},
]
DEFAULT_DEVICES = {
    "/dev/null": "1 3", "/dev/zero": "1 5", "/dev/full": "1 7", "/dev/random": "1 8", "/dev/urandom": "1 9",
    "/dev/tty": "5 0",
}  # fmt: skip
LINKS = {
    "/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1",
    "/dev/stderr": "/proc/self/fd/2", "/dev/ptmx": "pts/ptmx",
}  # fmt: skip
ENV = ["PATH=/bin", "EMPTY=", "EQUALS=a=b=c", "SPACES= x  y ", "WIDE=\u00fc\u4e2d"]
SYSCTLS = {
    "net.ipv4.ip_forward": "1", "net/ipv4/ip_local_port_range": "2000 3000", "kernel.sem": "251 32001 101 129",
    "kernel.shm_rmid_forced": "1", "fs.mqueue.msg_max": "20",
}  # fmt: skip
PRIVILEGED = {
    "arguments": 'tr "\\0" "\\n" < /proc/1/cmdline | tail -n 3',
    "environment": 'tr "\\0" "\\n" < /proc/1/environ',
    "cwd": "pwd",
    "status": "cat /proc/1/status",
    "identity": "id -u; id -g; umask",
    "mountinfo": "cat /proc/self/mountinfo",
    "devices": f"stat -c '%n %F %a %u %g %t %T' {' '.join([*(d['path'] for d in DEVICES), *DEFAULT_DEVICES])}",
    "links": f"for l in {' '.join(LINKS)}; do echo $l $(readlink $l); done",
    "use": "echo x > /dev/null && head -c3 /dev/zero | wc -c && head -c1 /dev/urandom | wc -c; echo x > /dev/full",
    "kmsg-read": "dd if=/dev/kmsg bs=8192 count=1 > /dev/null",
    "kmsg-write": "echo x > /dev/kmsg",
    "denied": "cat /dev/denied",
    "allowed": "cat /dev/allowed",
    "pty": "ls /dev/pts; test -c /dev/ptmx",
    "write": "echo written > /by-container; cat /by-container",
    "noexec": "cp /bin/busybox /made/deep/tmp/busybox && /made/deep/tmp/busybox true",
    "exec": "cp /bin/busybox /made/deep/tmp/nested/busybox && /made/deep/tmp/nested/busybox true",
    "nodev": "mknod /made/deep/tmp/null c 1 3 && echo x > /made/deep/tmp/null",
    "dev": "mknod /made/deep/tmp/nested/null c 1 3 && echo x > /made/deep/tmp/nested/null",
    "order": "cat /order/name",
    "hidden": "ls /under",
    "file": "cat /etc/file /new/place/file; echo more >> /new/place/file; echo x >> /etc/file",
    "relative": "cat /relative/name; touch /relative/x",
    "loose": "ls /loose/destination; stat -f -c %T /loose/destination",
    "through-link": "cat /target/volume/name",
    "flat": "ls /flat/sub",
    "tree": "ls /tree/sub; touch /tree/x /tree/sub/x",
    "ro": "touch /ro/x; touch /ro/sub/y",
    "rro": "touch /rro/x; touch /rro/sub/z",
    "masked": "cat /mask/file /mask/link /proc/cpuinfo | wc -c; ls -A /mask/directory | wc -l; touch /mask/directory/x",
    "masked-missing": "ls -d /mask/missing",
    "masked-beside": "cat /mask/beside",
    "readonly-file": "echo x >> /fixed/file",
    "readonly-directory": "touch /fixed/directory/x",
    "readonly-missing": "ls -d /fixed/missing",
    "readonly-beside": "touch /fixed/x",
    "readonly-proc": "echo 1 > /proc/sys/kernel/shm_rmid_forced",
    "sysctls": " && ".join(f"cat /proc/sys/{name.replace('.', '/')}" for name in SYSCTLS),
    "bind-root": "mkdir /elsewhere && mount --bind / /elsewhere && ls -d /elsewhere/mask",
    "pids": "cat /sys/fs/cgroup/pids.max; cat /sys/fs/cgroup/memory.max; cat /sys/fs/cgroup/cpu.max",
    "unified": "cat /sys/fs/cgroup/memory.high; cat /sys/fs/cgroup/cpu.max.burst",
    "network": "ls /sys/class/net",
    "cgroup": "cat /proc/self/cgroup; grep cgroup /proc/self/mountinfo | cut -d' ' -f4",
}


def _edit_privileged(spec: Document, host: Path) -> None:
    """Ask for what is compared with PRIVILEGED; ``host`` is where the sources of the bind mounts are."""
    spec["ociVersion"] = "1.2.1"
    process, linux = spec["process"], spec["linux"]
    process["args"] += ["zero", "", "two words"]
    process.update(cwd="/not/there/yet", env=[*ENV], noNewPrivileges=False)
    process["capabilities"] = {name: [*CAPABILITIES] for name in ("bounding", "effective", "permitted")}
    process["capabilities"]["inheritable"] = ["CAP_KILL"]
    spec["mounts"] += [
        _mount("/made/deep/tmp", "tmpfs", "name", "nosuid", "nodev", "noexec", "noatime", "size=2m", "mode=1770"),
        _mount("/made/deep/tmp/nested", "tmpfs", "tmpfs", "nodiratime", "strictatime", "nosuid", "suid", "ro", "rw"),
        _mount("/order", "bind", f"{host}/first", "rbind"),
        _mount("/order", "bind", f"{host}/second", "rbind"),
        _mount("/under/sub", "tmpfs", "tmpfs"),
        _mount("/under", "tmpfs", "tmpfs"),
        _mount("/etc/file", "none", f"{host}/file", "bind", "ro"),
        _mount("/new/place/file", "", f"{host}/written", "bind"),
        _mount("/relative", "bind", "data", "bind", "ro"),
        _mount("loose/destination", "tmpfs", "tmpfs"),
        _mount("/link/volume", "bind", f"{host}/first", "rbind"),
        _mount("/flat", "none", f"{host}/tree", "bind"),
        _mount("/tree", "none", f"{host}/tree", "rbind"),
        _mount("/ro", "none", f"{host}/tree", "rbind", "ro"),
        _mount("/rro", "none", f"{host}/tree", "rbind", "rro"),
    ]
    linux["devices"] = DEVICES
    linux["resources"] = {
        "devices": [
            {"allow": False, "access": "rwm"},
            {"allow": True, "type": "c", "major": 1, "minor": 11, "access": "r"},
            {"allow": True, "type": "c", "major": 10, "access": "rw"},
            {"allow": False, "type": "c", "major": 10, "minor": 250, "access": "rwm"},
        ],
        "pids": {"limit": -1},
        "memory": {"limit": -1},
        "cpu": {"quota": 20_000, "period": 50_000, "burst": 1000},
        "unified": {"memory.high": "900000000"},
    }
    linux["sysctl"] = dict(SYSCTLS)
    linux["maskedPaths"] = ["/proc/cpuinfo", *(f"/mask/{name}" for name in ("file", "link", "directory", "missing"))]
    linux["readonlyPaths"] = ["/proc/sys", *(f"/fixed/{name}" for name in ("file", "directory", "missing"))]


@contextmanager
def _sources(directory: Path) -> Iterator[Path]:
    """Make what is bound into the privileged container; ``tree`` has a mount in it."""
    for name in ("first", "second", "tree/sub"):
        (directory / name).mkdir(parents=True)
        (directory / name / "name").write_text(f"{name}\n")
    for name in ("file", "written"):
        (directory / name).write_text(f"{name}\n")
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", directory / "tree/sub"], check=True)
    try:
        (directory / "tree/sub/inner").touch()
        yield directory
    finally:
        subprocess.run(["umount", directory / "tree/sub"], check=True)


@pytest.fixture(scope="module")
def rootfs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root file system that containers write to."""
    made = make_busybox(tmp_path_factory.mktemp("rules") / "rootfs")
    for name in ("mask/directory", "fixed/directory", "target"):
        (made / name).mkdir(parents=True)
    for name in ("mask/file", "mask/seen", "mask/beside", "mask/directory/inner", "fixed/file", "etc/file"):
        (made / name).write_text("text\n")
    (made / "mask/link").symlink_to("/mask/seen")
    (made / "link").symlink_to("/target")
    return made


@pytest.fixture(scope="module")
def privileged(tmp_path_factory: pytest.TempPathFactory, rootfs: Path) -> Facts:
    directory = tmp_path_factory.mktemp("privileged")
    with _sources(directory / "host") as host:
        (directory / "bundle/data").mkdir(parents=True)
        (directory / "bundle/data/name").write_text("of the bundle\n")
        facts = _run(directory, rootfs, PRIVILEGED, lambda spec: _edit_privileged(spec, host))
        assert (host / "written").read_text() == "written\nmore\n"
        assert (host / "file").read_text() == "file\n"
        assert sorted(path.name for path in (host / "tree").iterdir()) == ["sub", "x"]
        assert sorted(path.name for path in (host / "tree/sub").iterdir()) == ["inner", "x"]
    return facts


def test_arguments(privileged: Facts) -> None:
    """Process, args: as they are, an empty one too."""
    assert privileged["arguments"].text == "zero\n\ntwo words"


def test_environment(privileged: Facts) -> None:
    """Process, env: as it is, in order, and no variable of the runtime's; HOME, where it is missing, as runc has it."""
    assert privileged["environment"].text.split("\n") == [*ENV, "HOME=/root"]


def test_working_directory(privileged: Facts) -> None:
    """Process, cwd: the program starts there. One that is missing is made, as by runc."""
    assert privileged["cwd"].text == "/not/there/yet"


def test_user_defaults(privileged: Facts) -> None:
    """User: uid and gid; without umask the usual one."""
    assert privileged["identity"].text == "0\n0\n0022"


def _sets(facts: Facts) -> dict[str, int]:
    found = re.findall(r"^Cap(\w+):\t(\w+)$", facts["status"].text, re.MULTILINE)
    return {name: int(value, 16) for name, value in found}


def _mask(*names: str) -> int:
    return sum(1 << CAPABILITIES.index(f"CAP_{name}") for name in names)


def test_all_capabilities(privileged: Facts) -> None:
    """Linux process, capabilities: all that there are; noNewPrivileges is off unless asked for."""
    full = (1 << len(CAPABILITIES)) - 1
    assert _sets(privileged) == {"Inh": _mask("KILL"), "Prm": full, "Eff": full, "Bnd": full, "Amb": 0}
    assert "NoNewPrivs:\t0" in privileged["status"].text


def test_mounts_are_made_in_order(privileged: Facts) -> None:
    """Mounts: in the order of the list, so that a later one can be in or over an earlier one."""
    made = [mount.place for mount in privileged.mounts()]
    wanted = [mount["destination"] for mount in default_spec()["mounts"]]
    wanted += ["/made/deep/tmp", "/made/deep/tmp/nested", "/order", "/order", "/under/sub", "/under", "/etc/file"]
    assert [place for place in made if place in wanted] == wanted
    assert privileged["order"].text == "second"
    assert privileged["hidden"].text == ""


def test_file_systems(privileged: Facts) -> None:
    """Default file systems and mounts' type and source: each at its place, with its name."""
    for mount in default_spec()["mounts"]:
        found = privileged.mount(mount["destination"])
        assert found.kind == {"cgroup": "cgroup2"}.get(mount["type"], mount["type"])
        assert found.source == mount["source"]
    assert privileged.mount("/made/deep/tmp").source == "name"
    assert "ptmx" in privileged["pty"].text
    assert privileged["pty"].status == 0


def test_mount_options(privileged: Facts) -> None:
    """Mounts, options: attributes and what the file system itself is told; of two that exclude each other the later."""
    first, nested = privileged.mount("/made/deep/tmp").options, privileged.mount("/made/deep/tmp/nested").options
    assert {"rw", "nosuid", "nodev", "noexec", "noatime", "size=2048k", "mode=1770"} <= first
    assert {"rw", "nodiratime"} <= nested
    assert nested.isdisjoint({"ro", "nosuid", "relatime", "noatime"})
    assert {"ro", "nosuid", "nodev", "noexec", "relatime"} <= privileged.mount("/sys/fs/cgroup").options
    assert (privileged["noexec"].status, privileged["exec"].status) == (126, 0)
    assert "ermission denied" in privileged["nodev"].text
    assert privileged["dev"].status == 0


def test_bind_mounts(privileged: Facts) -> None:
    """Mounts, source and destination: files onto files, places that are made, relative paths, links inside the root."""
    file = privileged["file"]
    assert file.text.startswith("file\nwritten\n")
    assert "Read-only file system" in file.text
    assert privileged["relative"].text.startswith("of the bundle\n")
    assert "Read-only file system" in privileged["relative"].text
    assert privileged["loose"].text == "tmpfs"
    assert privileged["through-link"].text == "first"


def test_recursive_mounts(privileged: Facts) -> None:
    """Mounts, options: bind takes one mount, rbind all below; rro makes all of it read-only.

    So does ro, where runc would leave what is mounted below as it was: in the guest a mount of the host's that is found
    on the way takes after the one that it is found in.
    """
    assert privileged["flat"].text == "name"
    assert privileged["tree"] == Fact("inner", 0)
    assert privileged["ro"].text.count("Read-only") == 2
    assert privileged["rro"].text.count("Read-only") == 2


def test_device_nodes(privileged: Facts) -> None:
    """Devices: of each type, with mode and owner, where the path says; 0666 and root where nothing is said."""
    kinds = {"c": "character special file", "u": "character special file", "b": "block special file", "p": "fifo"}
    wanted = [
        f"{device['path']} {kinds[device['type']]} {device.get('fileMode', 0o666):o} {device.get('uid', 0)}"
        f" {device.get('gid', 0)} {device.get('major', 0):x} {device.get('minor', 0):x}"
        for device in DEVICES
    ]
    assert privileged["devices"].text.splitlines()[: len(wanted)] == wanted


def test_default_devices(privileged: Facts) -> None:
    """Default devices and symbolic links of /dev: there, for everyone, and usable whatever the rules deny."""
    lines = privileged["devices"].text.splitlines()[len(DEVICES) :]
    wanted = [f"{path} character special file 666 0 0 {number}" for path, number in DEFAULT_DEVICES.items()]
    assert lines == wanted
    assert privileged["links"].text.splitlines() == [f"{link} {target}" for link, target in LINKS.items()]
    assert privileged["use"].text.startswith("3\n1\n")
    assert "No space left" in privileged["use"].text


def test_device_rules(privileged: Facts) -> None:
    """Allowed devices: the later rule decides, for each kind of access."""
    assert privileged["kmsg-read"].status == 0
    assert "not permitted" in privileged["kmsg-write"].text
    assert "not permitted" in privileged["denied"].text
    assert "No such device" in privileged["allowed"].text


def test_root_can_be_written(privileged: Facts, rootfs: Path) -> None:
    """Root, readonly: false, and what is written is in the bundle's root file system."""
    assert privileged["write"].text == "written"
    assert (rootfs / "by-container").read_text() == "written\n"


def test_masked_paths(privileged: Facts) -> None:
    """Masked paths: files, what a link leads to and directories cannot be read; what is not there is passed over."""
    masked = privileged["masked"].text.splitlines()
    assert masked[:2] == ["0", "0"]
    assert "Read-only" in masked[2]
    assert "No such file" in privileged["masked-missing"].text
    assert privileged["masked-beside"].text == "text"


def test_readonly_paths(privileged: Facts) -> None:
    """Readonly paths: files and directories; what is not there is passed over."""
    for name in ("readonly-file", "readonly-directory", "readonly-proc"):
        assert "Read-only file system" in privileged[name].text
    assert "No such file" in privileged["readonly-missing"].text
    assert privileged["readonly-beside"].status == 0


def test_sysctls(privileged: Facts) -> None:
    """Sysctl: of network, System V IPC and message queues; a name may have slashes."""
    assert privileged["sysctls"].text.replace("\t", " ").split("\n") == list(SYSCTLS.values())


def test_resources(privileged: Facts) -> None:
    """Control groups: -1 is no limit; unified goes to the file of that name; burst beside quota and period."""
    assert privileged["pids"].text.split("\n") == ["max", "max", "20000 50000"]
    assert privileged["unified"].text.split("\n") == ["899997696", "1000"]


def test_network_and_cgroup_namespace(privileged: Facts) -> None:
    """Namespaces, network and cgroup: only a loopback device, and no cgroup but its own."""
    assert privileged["network"].text == "lo"
    assert privileged["cgroup"].text == "0::/\n/"


def test_root_propagation_default(privileged: Facts) -> None:
    """Rootfs mount propagation: without the setting the root can be bound elsewhere."""
    assert privileged["bind-root"].text == "/elsewhere/mask"


# --- an unprivileged container with a read-only root --------------------------------------------------------------

GIB = 1 << 30
RLIMITS: dict[str, tuple[int, int, str]] = {
    # soft, hard, and the kernel's name in /proc/self/limits
    "AS": (4 * GIB, 5 * GIB, "Max address space"),
    "CORE": (3 * GIB, 4 * GIB, "Max core file size"),
    "CPU": (60, 120, "Max cpu time"),
    "DATA": (2 * GIB, 3 * GIB, "Max data size"),
    "FSIZE": (5 * GIB, 6 * GIB, "Max file size"),
    "LOCKS": (2048, 4096, "Max file locks"),
    "MEMLOCK": (65536, 131072, "Max locked memory"),
    "MSGQUEUE": (204_800, 819_200, "Max msgqueue size"),
    "NICE": (7, 20, "Max nice priority"),
    "NOFILE": (3000, 4000, "Max open files"),
    "NPROC": (3100, 3200, "Max processes"),
    "RSS": (GIB, (1 << 64) - 1, "Max resident set"),
    "RTPRIO": (5, 10, "Max realtime priority"),
    "RTTIME": (1_000_000, 2_000_000, "Max realtime timeout"),
    "SIGPENDING": (700, 800, "Max pending signals"),
    "STACK": (16 << 20, 9 * GIB, "Max stack size"),
}
USER = {
    "identity": "id -u; id -g; id -G; umask",
    "status": "cat /proc/1/status",
    "limits": "cat /proc/1/limits",
    "oom": "cat /proc/1/oom_score_adj",
    "stat": "cut -d')' -f2 /proc/1/stat",
    "io": "ionice -p 1",
    "names": "hostname; cat /proc/sys/kernel/domainname",
    "root": "touch /x",
    "scratch": "touch /tmp/x && stat -c %a /tmp",
    "environment": 'tr "\\0" "\\n" < /proc/1/environ',
    "pid": "echo $$; ls -d /proc/[0-9]* | wc -l",
    "setuid": "su user -c true",
    "propagation": "grep -c shared: /proc/self/mountinfo",
    "consoles": "test -e /dev/console",
}


def _edit_user(spec: Document) -> None:
    spec["ociVersion"] = "1.1.0-rc.1"
    process = spec["process"]
    process.update(
        user={"uid": 1000, "gid": 1001, "additionalGids": [5, 7, 100_000], "umask": 0o077},
        consoleSize={"height": 10, "width": 20},
        env=["PATH=/bin", "HOME=/somewhere"],
        oomScoreAdj=-321,
        scheduler={"policy": "SCHED_BATCH", "nice": 5},
        ioPriority={"class": "IOPRIO_CLASS_BE", "priority": 6},
        rlimits=[{"type": f"RLIMIT_{name}", "soft": soft, "hard": hard} for name, (soft, hard, _) in RLIMITS.items()],
        capabilities={
            "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_NET_RAW", "CAP_SETGID"],
            "permitted": ["CAP_KILL", "CAP_NET_RAW", "CAP_CHOWN"],
            "effective": ["CAP_KILL"],
            "inheritable": ["CAP_KILL", "CAP_NET_RAW"],
            "ambient": ["CAP_NET_RAW"],
        },
    )
    spec["root"]["readonly"] = True
    spec["hostname"], spec["domainname"] = "host.name-1", "domain.example"
    spec["mounts"].append(_mount("/tmp", "tmpfs", "tmpfs", "mode=1777"))


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory, rootfs: Path) -> Facts:
    return _run(tmp_path_factory.mktemp("user"), rootfs, USER, _edit_user)


def test_user(user: Facts) -> None:
    """User: uid, gid, additional groups and no others, umask."""
    assert user["identity"].text == "1000\n1001\n1001 5 7 100000\n0077"


def test_capability_sets(user: Facts) -> None:
    """Linux process, capabilities: each set as given; what execve(2) leaves of them is for the kernel to say."""
    assert _sets(user) == {
        "Bnd": _mask("CHOWN", "KILL", "NET_RAW", "SETGID"),
        "Inh": _mask("KILL", "NET_RAW"),
        "Amb": _mask("NET_RAW"),
        "Prm": _mask("NET_RAW"),
        "Eff": _mask("NET_RAW"),
    }


def test_no_new_privileges(user: Facts) -> None:
    """Process, noNewPrivileges."""
    assert "NoNewPrivs:\t1" in user["status"].text
    assert user["setuid"].status != 0


def test_rlimits(user: Facts) -> None:
    """POSIX process, rlimits: all that Linux has, soft and hard."""
    for soft, hard, name in RLIMITS.values():
        numbers = [str(number) if number < 1 << 63 else "unlimited" for number in (soft, hard)]
        assert re.search(rf"^{name} +{numbers[0]} +{numbers[1]} ", user["limits"].text, re.MULTILINE), name


def test_scheduling(user: Facts) -> None:
    """Linux process, oomScoreAdj, scheduler and ioPriority."""
    assert user["oom"].text == "-321"
    fields = user["stat"].text.split()
    assert (fields[16], fields[38]) == ("5", "3")  # nice; policy SCHED_BATCH
    assert user["io"].text == "best-effort: prio 6"


def test_names(user: Facts) -> None:
    """Hostname and domainname."""
    assert user["names"].text == "host.name-1\ndomain.example"


def test_root_is_read_only(user: Facts) -> None:
    """Root, readonly: true; what is mounted in it is as its own options say."""
    assert "Read-only file system" in user["root"].text
    assert user["scratch"] == Fact("1777", 0)


def test_home_is_not_changed(user: Facts) -> None:
    """Process, env: what the configuration says stays."""
    assert user["environment"].text.split("\n") == ["PATH=/bin", "HOME=/somewhere"]


def test_pid_namespace(user: Facts) -> None:
    """Namespaces, pid: the program is the first process, and sees only its own."""
    pid, count = user["pid"].text.split("\n")
    assert pid == "1"
    assert int(count) <= 4


def test_without_a_terminal(user: Facts) -> None:
    """Process, consoleSize: of no effect without a terminal; nor is there a /dev/console."""
    assert user["consoles"].status == 1


# --- user and time namespaces, another personality, a shared root -------------------------------------------------

MAPPED = {
    "maps": "cat /proc/self/uid_map; echo --; cat /proc/self/gid_map",
    "setgroups": "id -G",
    "owner": "stat -c '%u %g' /proc/1 /dev/null",
    "offsets": "cat /proc/self/timens_offsets",
    "uptime": "cut -d. -f1 /proc/uptime",
    "machine": "uname -m",
    "mountinfo": "cat /proc/self/mountinfo",
    "visible": "cd /tmp; mkdir a b; mount --bind /tmp b && mount -t tmpfs tmpfs a && touch a/x; ls b/a",
    "ids": "id -u; touch /tmp/mine; stat -c %u /tmp/mine; chown 5 /tmp/mine && stat -c %u /tmp/mine",
    "unmapped": "chown 70000 /tmp/mine",
}


def _edit_mapped(spec: Document) -> None:
    spec["ociVersion"] = "1.3.0"
    linux = spec["linux"]
    linux["namespaces"] += [{"type": "user"}, {"type": "time"}]
    linux["uidMappings"] = [
        {"containerID": 0, "hostID": 100_000, "size": 1000},
        {"containerID": 2000, "hostID": 300_000, "size": 5},
    ]
    linux["gidMappings"] = [{"containerID": 0, "hostID": 200_000, "size": 1000}]
    linux["timeOffsets"] = {"monotonic": {"secs": 1000, "nanosecs": 5}, "boottime": {"secs": 500_000}}
    linux["personality"] = {"domain": "LINUX32"}
    linux["rootfsPropagation"] = "shared"
    spec["process"]["user"] = {"uid": 0, "gid": 0, "additionalGids": [3]}
    names = ("CAP_SYS_ADMIN", "CAP_CHOWN")
    spec["process"]["capabilities"] = {name: [*names] for name in ("bounding", "effective", "permitted")}
    spec["mounts"].append(_mount("/tmp", "tmpfs", "tmpfs", "shared"))


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory, rootfs: Path) -> Facts:
    return _run(tmp_path_factory.mktemp("mapped"), rootfs, MAPPED, _edit_mapped)


def test_id_mappings(mapped: Facts) -> None:
    """User namespace mappings: each line of both, and only what is mapped can be used."""
    maps = [" ".join(line.split()) for line in mapped["maps"].text.splitlines()]
    assert maps == ["0 100000 1000", "2000 300000 5", "--", "0 200000 1000"]
    assert mapped["setgroups"].text == "0 3"
    assert mapped["ids"].text == "0\n0\n5"
    assert "Invalid argument" in mapped["unmapped"].text


def test_time_offsets(mapped: Facts) -> None:
    """Offset for time namespace: of both clocks."""
    assert [line.split() for line in mapped["offsets"].text.splitlines()] == [
        ["monotonic", "1000", "5"],
        ["boottime", "500000", "0"],
    ]
    assert 500_000 < int(mapped["uptime"].text) < 501_000


def test_personality(mapped: Facts) -> None:
    """Personality: that of 32 bits shows another machine."""
    assert mapped["machine"].text == "i686"


def test_root_is_shared(mapped: Facts) -> None:
    """Rootfs mount propagation, and that of a mount by its options: what is mounted in one copy is in the other."""
    root = next(line for line in mapped["mountinfo"].text.splitlines() if line.split()[4] == "/")
    assert " shared:" in root
    assert mapped["visible"].text == "x"


# --- as little as the specification demands ----------------------------------------------------------------------

MINIMAL = {
    "identity": "id -u; id -g; id -G; umask; pwd",
    "devices": f"ls -l {' '.join(DEFAULT_DEVICES)} | cut -c1",
    "null": "echo x > /dev/null && head -c2 /dev/zero | wc -c",
    "chown": "touch /mine && chown 5 /mine",
    "mounts": "mount -t proc proc /proc",
    "bind-root": "mkdir -p /elsewhere && mount --bind / /elsewhere",
}


def _edit_minimal(spec: Document) -> None:
    process = {"cwd": "/", "args": spec["process"]["args"], "env": ["PATH=/bin"], "unknown": {"deep": [1, {}]}}
    process["user"] = {"uid": 0, "gid": 0, "unknown": 1}
    names = ("CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_OF_TOMORROW")
    process["capabilities"] = {name: [*names] for name in ("bounding", "effective", "permitted")}
    root = {**spec["root"], "unknown": None}
    spec.clear()
    spec.update(
        ociVersion="1.0.0",
        process=process,
        root=root,
        annotations={"org.example.unknown": "", "other": "\u00e4"},
        mounts=[],
        hooks={},
        unknown="value",
        windows={"layerFolders": ["C:\\x"]},
        linux={
            "namespaces": [{"type": "mount", "unknown": True}],
            "rootfsPropagation": "unbindable",
            "resources": {"unknown": {"x": 1}, "memory": {"unknown": 5}},
            "unknown": [],
        },
    )


@pytest.fixture(scope="module")
def minimal(tmp_path_factory: pytest.TempPathFactory) -> Facts:
    directory = tmp_path_factory.mktemp("minimal")
    return _run(directory, make_busybox(directory / "rootfs"), MINIMAL, _edit_minimal)


def test_unknown_members_are_ignored(minimal: Facts) -> None:
    """Extensibility, Annotations: what is not known is passed over, at every level; values may be empty."""
    assert minimal["identity"].text == "0\n0\n0\n0022\n/"


def test_default_devices_without_mounts(minimal: Facts) -> None:
    """Default devices: there also where nothing is mounted at /dev."""
    assert minimal["devices"].text.split("\n") == ["c"] * len(DEFAULT_DEVICES)
    assert minimal["null"].text == "2"


def test_an_unknown_capability_is_passed_over(minimal: Facts) -> None:
    """Linux process, capabilities: what the kernel does not have is a warning, no error; the others are granted."""
    assert "katapy: warning: unknown capabilities are ignored: CAP_OF_TOMORROW\n" in minimal.errors
    assert minimal["chown"].status == 0


def test_root_that_cannot_be_bound(minimal: Facts) -> None:
    """Rootfs mount propagation: unbindable."""
    assert "Invalid argument" in minimal["bind-root"].text


# --- system call filters --------------------------------------------------------------------------------------------

FILTERED = {
    "default": "cat /proc/1/status | grep Seccomp:",
    "errno": "chmod 700 /tmp; chmod 711 /tmp",
    "masked": "mkdir -m 755 /tmp/a",
    "eperm": "hostname x",
    "errno-number": "ln /etc/passwd /tmp/hard",
    "kill": "sync",
    "trap": "mknod /tmp/p p",
    "log": "ln -s x /tmp/soft && readlink /tmp/soft",
    "trace": "rmdir /tmp/nothing",
}


def _rule(names: list[str], action: str, *args: tuple[int, int, str], errno: int | None = None) -> Document:
    made: Document = {"names": names, "action": f"SCMP_ACT_{action}"}
    if args:
        made["args"] = [{"index": index, "value": value, "op": f"SCMP_CMP_{op}"} for index, value, op in args]
    if errno is not None:
        made["errnoRet"] = errno
    return made


def _edit_filtered(spec: Document) -> None:
    spec["ociVersion"] = "1.0.2-dev"
    spec["process"]["noNewPrivileges"] = False
    for name in ("bounding", "effective", "permitted"):
        spec["process"]["capabilities"][name] += ["CAP_SYS_ADMIN"]
    spec["mounts"].append(_mount("/tmp", "tmpfs", "tmpfs"))
    spec["linux"]["seccomp"] = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            _rule(["chmod"], "ERRNO", (1, 0o711, "EQ"), errno=95),
            _rule(["fchmodat", "no_such_call_at_all"], "ERRNO", (2, 0o711, "EQ"), errno=95),
            _rule(["sethostname"], "ERRNO"),
            _rule(["link", "linkat"], "ERRNO", errno=28),
            _rule(["sync"], "KILL_PROCESS"),
            _rule(["mknod", "mknodat"], "TRAP"),
            _rule(["symlink", "symlinkat"], "LOG"),
            _rule(["rmdir"], "TRACE"),
        ],
    }


@pytest.fixture(scope="module")
def filtered(tmp_path_factory: pytest.TempPathFactory, rootfs: Path) -> Facts:
    return _run(tmp_path_factory.mktemp("filtered"), rootfs, FILTERED, _edit_filtered)


def test_seccomp(filtered: Facts) -> None:
    """Seccomp: what is not named is the default action's; errno, EPERM unless given; conditions on arguments."""
    assert filtered["default"].text.split() == ["Seccomp:", "2"]
    assert filtered["masked"].status == 0
    assert filtered["errno"].text.count("\n") == 0
    assert "not supported" in filtered["errno"].text
    assert "not permitted" in filtered["eperm"].text
    assert "No space left" in filtered["errno-number"].text


def test_seccomp_actions(filtered: Facts) -> None:
    """Seccomp: kill and trap end by SIGSYS, log only logs, trace without a tracer is ENOSYS."""
    assert filtered["kill"].status == 128 + 31
    assert filtered["trap"].status == 128 + 31
    assert filtered["log"] == Fact("x", 0)
    assert "not implemented" in filtered["trace"].text


# --- what must be refused -------------------------------------------------------------------------------------------


def _with(*path: str | int, value: Any) -> Callable[[Any], None]:
    def edit(spec: Any) -> None:
        for key in path[:-1]:
            spec = spec.setdefault(key, {}) if isinstance(spec, dict) else spec[key]
        spec[path[-1]] = value

    return edit


_RLIMIT = {"type": "RLIMIT_CPU", "soft": 1, "hard": 1}


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (_with("ociVersion", value="invalid"), "ociVersion"),
        (_with("ociVersion", value="0.9.0"), "ociVersion"),
        (_with("ociVersion", value="2.0.0"), "ociVersion"),
        (lambda spec: spec.pop("ociVersion"), "ociVersion"),
        (lambda spec: spec.pop("root"), "root"),
        # Of no use to a runtime that has it checked before anything is made; runc, too, wants it at create.
        (lambda spec: spec.pop("process"), "process"),
        (_with("annotations", value={"": "x"}), "annotations"),
        (_with("annotations", value={"x": 1}), "annotations"),
        (_with("process", "env", value=["NAME"]), "process.env[0]"),
        (_with("process", "rlimits", value=[_RLIMIT, _RLIMIT]), "process.rlimits[1]"),
        (_with("process", "rlimits", value=[{**_RLIMIT, "type": "RLIMIT_TEST"}]), "process.rlimits[0].type"),
        (_with("process", "scheduler", value={"policy": "SCHED_BEST"}), "process.scheduler.policy"),
        (_with("process", "ioPriority", value={"class": "IOPRIO_CLASS_BE", "priority": 8}), "ioPriority.priority"),
        (_with("process", "oomScoreAdj", value=1001), "process.oomScoreAdj"),
        (_with("process", "user", "umask", value=0o1000), "process.user.umask"),
        (_with("hostname", value="a/b"), "hostname"),
        (_with("hooks", value={"poststop": [{"path": "bin/true"}]}), "hooks.poststop[0].path"),
        (_with("hooks", value={"prestart": [{"path": "/bin/true", "timeout": 0}]}), "hooks.prestart[0].timeout"),
        (_with("linux", "namespaces", value=[{"type": "mount"}, {"type": "mount"}]), "namespaces[1]"),
        (_with("linux", "namespaces", value=[{"type": "mount", "path": "relative"}]), "namespaces[0].path"),
        (_with("linux", "devices", value=[{"path": "/dev/x", "type": "x"}]), "devices[0].type"),
        (_with("linux", "devices", value=[{"path": "/dev/x", "type": "c"}]), "devices[0].major"),
        (_with("linux", "resources", "devices", value=[{"allow": True, "access": "x"}]), "devices[0].access"),
        (_with("linux", "rootfsPropagation", value="public"), "rootfsPropagation"),
        (_with("linux", "maskedPaths", value=["relative"]), "maskedPaths[0]"),
        (_with("linux", "readonlyPaths", value=["relative"]), "readonlyPaths[0]"),
        (_with("linux", "personality", value={"domain": "PDP11"}), "personality.domain"),
        (_with("linux", "timeOffsets", value={"realtime": {"secs": 1}}), "timeOffsets"),
        (_with("linux", "seccomp", value={"syscalls": []}), "seccomp.defaultAction"),
        (_with("linux", "seccomp", value={"defaultAction": "ALLOW"}), "seccomp.defaultAction"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_values(katapy: Katapy, bundle: MakeBundle, edit: Edit, named: str) -> None:
    """Valid values, and the sections of each: what the specification does not allow is an error that names it."""
    done = katapy("create", "--bundle", bundle(["true"], edit=edit), "c1")
    assert done.returncode == 1
    assert named in done.stderr.decode()
    assert katapy("list", "-q").stdout == b""


def test_a_device_in_the_place_of_a_file(katapy: Katapy, bundle: MakeBundle, rootfs: Path) -> None:
    """Devices: where something else is in the root file system, it is an error."""
    device = {"path": "/etc/passwd", "type": "c", "major": 1, "minor": 3}
    edit = _with("linux", "devices", value=[device])
    done = katapy("create", "--bundle", bundle(["true"], rootfs=rootfs, edit=edit), "c1")
    assert done.returncode == 1
    assert b"cannot make device /etc/passwd: something else is there" in done.stderr
