"""The runtime's contract with an engine: hooks, console sockets, pid files, process.json, cgroups on the host."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from harness import DEADLINE, Katapy, MakeBundle, vsock_kind

from katapy.transport.vsock import VsockKind

HOOK = """#!{python} -I
import json, os, sys
state = json.load(sys.stdin)
network = os.readlink(f"/proc/{{state['pid']}}/ns/net") if state["pid"] else ""
facts = {{"argv": sys.argv, "state": state, "env": sorted(os.environ), "cwd": os.getcwd(), "network": network,
          "mounts": os.readlink("/proc/self/ns/mnt")}}
with open({log!r}, "a") as log:
    log.write(json.dumps(facts) + chr(10))
sys.exit(int(os.environ.get("STATUS", "0")))
"""


@pytest.fixture
def hook(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Make a hook that writes down what it was given: ``hook("createRuntime", env=["STATUS=3"])``."""
    program = tmp_path / "hook"
    program.write_text(HOOK.format(python=sys.executable, log=str(tmp_path / "hooks.log")))
    program.chmod(0o755)
    return lambda name, **more: {"path": str(program), "args": [name, "argument"], **more}


def _log(tmp_path: Path) -> list[dict[str, Any]]:
    log = tmp_path / "hooks.log"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def _hooks(**hooks: list[dict[str, Any]]) -> Callable[[dict[str, Any]], None]:
    def edit(spec: dict[str, Any]) -> None:
        spec["hooks"] = hooks
        spec["annotations"] = {"colour": "green"}

    return edit


def test_hooks(katapy: Katapy, bundle: MakeBundle, tmp_path: Path, hook: Callable[..., dict[str, Any]]) -> None:
    """Each at its point, in order, with the state on stdin; in the host's mount namespace; the pid in the new netns."""
    points = ("prestart", "createRuntime", "createContainer", "poststart", "poststop")
    directory = bundle(["sleep", "1000"], edit=_hooks(**{name: [hook(name)] for name in points}))
    katapy.detach("create", "--bundle", directory, "c1")
    pid = katapy.state("c1")["pid"]
    assert [facts["argv"][1] for facts in _log(tmp_path)] == ["argument"] * 3
    katapy("start", "c1", check=True)
    network = os.readlink(f"/proc/{pid}/ns/net")
    assert network != os.readlink("/proc/self/ns/net")
    katapy("delete", "--force", "c1", check=True)
    found = _log(tmp_path)
    assert [facts["state"]["status"] for facts in found] == ["creating", "creating", "creating", "running", "stopped"]
    assert [facts["state"]["pid"] for facts in found] == [pid, pid, pid, pid, 0]
    assert {facts["network"] for facts in found[:4]} == {network}
    for facts in found:
        assert (facts["state"]["id"], facts["state"]["bundle"]) == ("c1", str(directory))
        assert facts["state"]["annotations"] == {"colour": "green"}
        assert facts["cwd"] == str(directory)
        assert facts["mounts"] == os.readlink("/proc/self/ns/mnt")
        assert "PATH" in facts["env"]


def test_environment_and_arguments_of_a_hook_are_its_own(katapy: Katapy, bundle: MakeBundle, tmp_path: Path) -> None:
    """docker's hook goes by argv[0]: a runtime that puts the path there breaks every network of it."""
    out = tmp_path / "out"
    program = tmp_path / "program"
    program.write_text(f'#!/bin/sh\n{{ tr "\\0" "\\n" < /proc/$$/cmdline; env; }} > {out}\n')
    program.chmod(0o755)
    script = f'{{ tr "\\0" " " < /proc/self/cmdline; echo; env; }} > {out}'
    hooks = _hooks(createRuntime=[{"path": "/bin/sh", "args": ["own-name", "-c", script], "env": ["COLOUR=green"]}])
    katapy("run", "--bundle", bundle(["true"], edit=hooks), "c1", check=True)
    lines = out.read_text().splitlines()
    assert "COLOUR=green" in lines
    assert not any(line.startswith("LC_ALL=") for line in lines)


@pytest.mark.parametrize("point", ["prestart", "createRuntime", "createContainer"])
def test_a_failing_hook_undoes_the_create(
    katapy: Katapy, bundle: MakeBundle, tmp_path: Path, hook: Callable[..., dict[str, Any]], point: str
) -> None:
    hooks = _hooks(**{point: [hook("bad", env=["STATUS=3"])], "poststop": [hook("undo")]})
    done = katapy("create", "--bundle", bundle(["true"], edit=hooks), "c1")
    assert done.returncode == 1
    assert f"hooks.{point}[0]".encode() in done.stderr
    assert b"ended with status 3" in done.stderr
    assert katapy("list", "-q").stdout == b""
    assert [facts["state"]["status"] for facts in _log(tmp_path)] == ["creating", "stopped"]


def test_a_caller_that_ignores_the_end_of_its_children(
    katapy: Katapy, bundle: MakeBundle, tmp_path: Path, hook: Callable[..., dict[str, Any]]
) -> None:
    """As PID 1 of many a container does: what it ignores is inherited, and with it no status of a child is known."""
    hooks = _hooks(createRuntime=[hook("bad", env=["STATUS=3"])])
    for edit, args, expected in ((hooks, ["true"], 1), (None, ["sh", "-c", "exit 5"], 5)):
        call = katapy.argv("run", "--bundle", bundle(args, edit=edit), "c1")
        done = subprocess.run(
            call,
            preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=DEADLINE,
        )
        assert done.returncode == expected, done.stderr
        assert (b"ended with status 3" in done.stderr) == (expected == 1)


def test_a_hook_that_hangs_is_killed(katapy: Katapy, bundle: MakeBundle) -> None:
    hooks = _hooks(createRuntime=[{"path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1}])
    done = katapy("create", "--bundle", bundle(["true"], edit=hooks), "c1")
    assert done.returncode == 1
    assert b"hooks.createRuntime[0]: /bin/sleep: did not end within 1 s" in done.stderr


def test_hooks_after_the_start(
    katapy: Katapy, bundle: MakeBundle, tmp_path: Path, hook: Callable[..., dict[str, Any]]
) -> None:
    """A poststart hook that fails stops the container; one of poststop changes nothing, and is told."""
    katapy.detach(
        "create", "--bundle", bundle(["sleep", "1000"], edit=_hooks(poststart=[hook("x", env=["STATUS=4"])])), "c1"
    )
    pidfd = os.pidfd_open(katapy.state("c1")["pid"])
    started = katapy("start", "c1")
    assert started.returncode == 1
    assert b"hooks.poststart[0]" in started.stderr
    assert select.select([pidfd], [], [], DEADLINE)[0]
    os.close(pidfd)
    assert katapy.state("c1")["status"] == "stopped"
    katapy("delete", "c1", check=True)

    hooks = _hooks(poststop=[hook("y", env=["STATUS=5"]), hook("z")])
    log = tmp_path / "katapy.log"
    done = katapy("--log", log, "--log-format", "json", "run", "--bundle", bundle(["true"], edit=hooks), "c2")
    assert done.returncode == 0
    assert b"warning: c2: hooks.poststop[0]" in done.stderr
    [line] = [json.loads(line) for line in log.read_text().splitlines()]
    assert line["level"] == "warning"
    assert _log(tmp_path)[-1]["argv"][1] == "argument"
    assert len(_log(tmp_path)) == 3


@pytest.mark.parametrize("point", ["prestart", "createRuntime"])
def test_an_interface_that_a_hook_makes_is_in_the_vm(katapy: Katapy, bundle: MakeBundle, point: str) -> None:
    """In the namespace of the process whose pid the hook is told; attached and detached."""
    script = """
        pid=$(sed 's/.*"pid": *\\([0-9]*\\).*/\\1/')
        ip link add katapy-$pid type veth peer name eth7 netns $pid
        nsenter --net=/proc/$pid/ns/net ip address add 192.0.2.7/24 dev eth7
        nsenter --net=/proc/$pid/ns/net ip link set eth7 up
    """
    path = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"
    hooks = _hooks(**{point: [{"path": "/bin/sh", "args": ["sh", "-c", script], "env": [path]}]})
    look = "ip addr show eth7 | grep -c 192.0.2.7/24"
    done = katapy("run", "--bundle", bundle(["sh", "-c", look], edit=hooks), "c1", check=True)
    assert done.stdout == b"1\n"
    katapy.detach("create", "--bundle", bundle(["sleep", "1000"], edit=hooks), "c2")
    katapy("start", "c2", check=True)
    assert katapy("exec", "c2", "sh", "-c", look, check=True).stdout == b"1\n"
    katapy("delete", "--force", "c2", check=True)


@contextmanager
def _console(path: Path) -> Iterator[Callable[[], int]]:
    """Listen as conmon does; yields what returns the master that came."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)
        listener.settimeout(DEADLINE)

        def receive() -> int:
            with listener.accept()[0] as sock:
                name, [master], _, _ = socket.recv_fds(sock, 4096, 1)
                assert name.decode().startswith("/dev/pts/")
                return master

        yield receive


def _expect(fd: int, text: bytes) -> None:
    seen = b""
    while text not in seen:
        assert select.select([fd], [], [], DEADLINE)[0], f"no {text!r} in {seen!r}"
        seen += os.read(fd, 65536)


def test_terminals_over_console_sockets(katapy: Katapy, bundle: MakeBundle, tmp_path: Path) -> None:
    """As podman and docker have them: the master goes to a socket, the container's and each exec's."""

    def edit(spec: dict[str, Any]) -> None:
        spec["process"]["terminal"] = True
        spec["process"]["consoleSize"] = {"height": 20, "width": 70}

    directory = bundle(["sh", "-c", "stty size; read line; echo got-$line; exec sleep 1000"], edit=edit)
    missing = katapy("create", "--bundle", directory, "c1")
    assert missing.returncode == 1
    assert b"console socket" in missing.stderr
    with _console(tmp_path / "console") as receive:
        katapy.detach("create", "--bundle", directory, "--console-socket", tmp_path / "console", "c1")
        master = receive()
    katapy("start", "c1", check=True)
    os.write(master, b"word\n")
    _expect(master, b"got-word")
    process = tmp_path / "process.json"
    document = json.loads((directory / "config.json").read_text())["process"]
    process.write_text(json.dumps({**document, "args": ["sh", "-c", "tty; read line; exit $line"]}))
    with _console(tmp_path / "exec") as receive:
        argv = ("exec", "--detach", "--process", process, "--pid-file", tmp_path / "pid")
        katapy.detach(*argv, "--console-socket", tmp_path / "exec", "c1")
        inner = receive()
    _expect(inner, b"/dev/pts/")
    os.write(inner, b"6\n")
    _, status = os.waitpid(int((tmp_path / "pid").read_text()), 0)
    assert os.waitstatus_to_exitcode(status) == 6
    os.close(inner)
    os.close(master)
    katapy("delete", "--force", "c1", check=True)


def test_flags_of_exec(katapy: Katapy, bundle: MakeBundle, tmp_path: Path) -> None:
    katapy.detach("run", "--detach", "--bundle", bundle(["sleep", "1000"]), "c1")
    script = "id -G; grep -E 'CapEff|NoNewPrivs' /proc/self/status | cut -f2"
    flags = ("--additional-gids", "7", "--additional-gids", "8", "--cap", "CAP_NET_RAW", "--no-new-privs")
    lines = katapy("exec", *flags, "c1", "sh", "-c", script, check=True).stdout.decode().splitlines()
    assert lines[0].split()[1:] == ["7", "8"]
    assert int(lines[1], 16) & 1 << 13
    assert lines[2] == "1"
    process = tmp_path / "process.json"
    process.write_text(json.dumps({"cwd": "/tmp", "args": ["sh", "-c", "pwd; exit 9"], "env": ["PATH=/bin"]}))
    done = katapy("exec", "--process", process, "c1")
    assert (done.returncode, done.stdout) == (9, b"/tmp\n")
    for wrong, text in (
        (("exec", "--process", process, "c1", "true"), b"exclude one another"),
        (("exec", "--process", tmp_path / "none", "c1"), b"no such file"),
        (("exec", "--preserve-fds", "2", "c1", "true"), b"--preserve-fds 2"),
        (("exec", "--detach", "--tty", "c1", "true"), b"console socket"),
    ):
        refused = katapy(*wrong)
        assert refused.returncode == 1
        assert text in refused.stderr
    katapy("delete", "--force", "c1", check=True)


def test_keep(katapy: Katapy, bundle: MakeBundle) -> None:
    assert katapy("run", "--keep", "--bundle", bundle(["sh", "-c", "exit 3"]), "c1").returncode == 3
    assert katapy.state("c1")["status"] == "stopped"
    katapy("delete", "c1", check=True)


def test_of_many_simultaneous_creates_one_wins(katapy: Katapy, bundle: MakeBundle) -> None:
    directory = bundle(["sleep", "1000"])
    pipe, null = subprocess.PIPE, subprocess.DEVNULL
    started = [
        katapy.start("create", "--bundle", directory, "c1", stdin=null, stdout=null, stderr=pipe) for _ in range(100)
    ]
    won = 0
    for process in started:
        assert process.stderr
        # A winner's stand-in keeps the stream: to be read to its end only where there was an error.
        if process.wait(DEADLINE) == 0:
            won += 1
        else:
            assert process.stderr.read() == b"katapy: container with id exists: c1\n"
        process.stderr.close()
    assert won == 1
    assert katapy.state("c1")["status"] == "created"
    katapy("delete", "c1", check=True)


def _cgroup_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return {line.split(":")[1]: line.split(":", 2)[2] for line in lines}


def test_the_pod_is_in_its_cgroup_on_the_host(katapy: Katapy, bundle: MakeBundle) -> None:
    """Stand-in, shim, QEMU and virtiofsd; with the VM's memory and the overhead; gone with a shim that is killed."""

    def edit(spec: dict[str, Any]) -> None:
        spec["linux"]["cgroupsPath"] = f"/katapy-test-{os.getpid()}/c1"
        spec["linux"]["resources"] |= {
            "memory": {"limit": 128 << 20},
            "cpu": {"quota": 50_000, "period": 100_000, "shares": 512},
        }

    own = _cgroup_of(os.getpid())
    katapy.detach("run", "--detach", "--bundle", bundle(["sleep", "1000"], edit=edit), "c1")
    state = json.loads((katapy.root / "c1/state.json").read_text())
    pids = [state["pid"], state["shim"]["pid"], *(helper["pid"] for helper in state["helpers"])]
    # The kernel's vsock device is no process.
    assert len(pids) == (5 if vsock_kind() is VsockKind.USER else 4)
    expected = f"/katapy-test-{os.getpid()}/c1"
    for pid in pids:
        assert {path for path in _cgroup_of(pid).values() if path.endswith("/c1")} == {expected}
    directories = [Path(path) for path in state["cgroup"]["paths"].values()]
    values = {
        name: (directory / name).read_text().strip()
        for directory in directories
        for name in ("memory.limit_in_bytes", "memory.max", "cpu.cfs_quota_us", "cpu.max", "cpu.shares", "cpu.weight")
        if (directory / name).exists()
    }
    memory = int(values.get("memory.limit_in_bytes") or values["memory.max"])
    assert (128 + 128 + 128) << 20 < memory < 1 << 30  # the container's, the guest's own, QEMU's
    assert values.get("cpu.cfs_quota_us", "75000") == "75000"  # a quarter of a CPU for QEMU itself
    assert values.get("cpu.max", "75000 100000") == "75000 100000"
    os.kill(state["shim"]["pid"], signal.SIGKILL)
    katapy("delete", "--force", "c1", check=True)
    assert not any(directory.exists() for directory in directories)
    assert _cgroup_of(os.getpid()) == own


def test_block_io_is_limited_on_the_host(katapy: Katapy, bundle: MakeBundle) -> None:
    """A container's files are read and written by virtiofsd: a limit in the guest would limit nothing."""
    device = os.stat("/").st_dev

    def edit(spec: dict[str, Any]) -> None:
        rate = [{"major": os.major(device), "minor": os.minor(device), "rate": 1 << 20}]
        spec["linux"]["resources"]["blockIO"] = {"throttleReadBpsDevice": rate, "throttleWriteIOPSDevice": rate}

    katapy.detach("run", "--detach", "--bundle", bundle(["sleep", "1000"], edit=edit), "c1")
    state = json.loads((katapy.root / "c1/state.json").read_text())
    files = ("blkio.throttle.read_bps_device", "blkio.throttle.write_iops_device", "io.max")
    paths = [Path(directory) / name for directory in state["cgroup"]["paths"].values() for name in files]
    text = " ".join(path.read_text() for path in paths if path.exists())
    assert text.count(f"{os.major(device)}:{os.minor(device)}") in (1, 2)  # one line in v2, two files in v1
    assert text.count(str(1 << 20)) == 2
    katapy("delete", "--force", "c1", check=True)


def test_the_command_itself_stays_where_it_was(katapy: Katapy, bundle: MakeBundle) -> None:
    """A foreground run stands for its container, but its cgroup is its caller's."""
    with katapy.start("run", "--bundle", bundle(["sh", "-c", "echo up; cat"]), "c1", stdin=-1, stdout=-1) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
        assert _cgroup_of(process.pid) == _cgroup_of(os.getpid())
        process.stdin.close()
        assert process.wait(DEADLINE) == 0


def test_the_same_id_below_two_roots(katapy: Katapy, bundle: MakeBundle, tmp_path: Path) -> None:
    """Ids are unique below one root: a cgroup called by the id alone was already taken for the second container."""
    directory = bundle(["sh", "-c", "echo up; cat"])
    other = Katapy(tmp_path / "other")
    with katapy.start("run", "--bundle", directory, "c1", stdin=-1, stdout=-1) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
        assert other("run", "--bundle", directory, "c1", stdin=b"x", check=True).stdout == b"up\nx"
        process.stdin.close()
        assert process.wait(DEADLINE) == 0
