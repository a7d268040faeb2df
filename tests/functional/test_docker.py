"""Docker with katapy as its runtime: Debian's docker.io, whose daemon calls an OCI command line.

Where it can be compared, the same runs with runc too. Where docker cannot run that either, the machine is the reason,
and the tests are skipped with it.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from docker_daemon import DOCKER, IMAGE, Docker, start_docker
from engine import Done
from facts import FACTS, TYPED, difference, on_terminal
from harness import DEADLINE

SOURCE = Path(__file__).resolve().parents[2]
WEB = ("httpd", "-f", "-p", "80", "-h", "/etc")
PAGE = "passwd"
# Everything about a container's network but what is its own: its address, its names.
NETWORK = r"""
part() { echo "== $1"; }
part links; for path in /sys/class/net/*; do
    echo "${path##*/} mtu $(cat $path/mtu) up $(( $(cat $path/flags) & 1 ))"
done
part addresses; ip addr show eth0 | grep -wE 'inet|inet6' | sed 's/10\.7[78]\.[0-9]*\.[0-9]*/ADDRESS/g'
part mac; [ "$(cat /sys/class/net/eth0/address)" = "02:42$(hostname -i | tr . '\n' |
    while read -r part; do printf ':%02x' $part; done)" ] && echo by address
part routes; ip route | sed "s/$(hostname -i)/ADDRESS/"; ip -6 route | grep -v fe80
part files; cat /etc/resolv.conf; sed "s/$(hostname -i)/ADDRESS/; s/$(hostname)/NAME/" /etc/hosts
"""


@pytest.fixture(scope="module")
def daemon(busybox: Path) -> Iterator[Docker]:
    """A daemon with runc and katapy."""
    with tempfile.TemporaryDirectory(prefix="katapy-") as name:
        try:
            with start_docker(Path(name), busybox) as docker:
                probe = docker.run("--rm", IMAGE, "true", runtime="runc", check=False)
                if probe.status:
                    pytest.skip(f"docker cannot run runc on this machine either: {probe.err.strip()}")
                yield docker
        except RuntimeError as error:
            pytest.skip(f"docker cannot run on this machine: {error}")


@pytest.fixture
def docker(daemon: Docker, host: None) -> Iterator[Docker]:
    """The daemon; afterwards it has no container, and no network of the test's."""
    yield daemon
    left = daemon("ps", "--all", "--quiet").out.split()
    if left:
        daemon("rm", "--force", *left, check=False)
    daemon("network", "prune", "--force")
    assert not left, "containers left behind"


@contextmanager
def container(docker: Docker, name: str, *args: str) -> Iterator[str]:
    """Run a container while the context lasts, and give its name."""
    docker.run("--detach", "--name", name, *args)
    try:
        yield name
    finally:
        docker("rm", "--force", name)


def inspect(docker: Docker, name: str) -> dict[str, Any]:
    """Return the state of a container as docker knows it."""
    [document] = json.loads(docker("inspect", name).out)
    return {**document["State"], "RestartCount": document["RestartCount"]}


def until_logged(docker: Docker, name: str, text: str) -> None:
    """Wait until a container has said the line ``text``, as a user would: by following its log."""
    argv = (DOCKER, "logs", "--follow", name)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=docker.env) as follow:
        assert follow.stdout
        for line in follow.stdout:
            if line == f"{text}\n":
                break
        follow.kill()


def test_attached(docker: Docker) -> None:
    """Each stream, the exit status, the arguments; a program that there is not; and a terminal."""
    script = 'read line; echo "out $line $1"; echo err >&2; cat | wc -c; exit 7'
    bulk = "word\n" + "x" * 300_000
    found = [
        docker.run(
            "--rm", "--interactive", IMAGE, "sh", "-c", script, "sh", "a  b", runtime=runtime, stdin=bulk, check=False
        )
        for runtime in ("runc", "katapy")
    ]
    assert found[0] == found[1] == Done(7, "out word a  b\n300000\n", "err\n")
    assert docker.run("--rm", IMAGE, "nonesuch", check=False).status == 127
    assert on_terminal(docker, DOCKER, "run", "--runtime", "katapy", "--rm", "-it", IMAGE, "sh", "-c", TYPED) == 6


def test_a_container_s_life(docker: Docker) -> None:
    """run -d, logs, exec, top, stats, pause, update, cp, stop, restart, kill, wait: as docker's manual says."""
    script = 'trap "echo bye; exit 5" TERM; echo up; echo err >&2; while :; do sleep 1000 & wait; done'
    limits = ("--memory", "64m", "--memory-swap", "64m", "--cpus", "0.5", "--pids-limit", "20")
    given = docker.directory / "given"
    given.write_text("given\n")
    with container(docker, "c1", "--init", "--env", "A=b", *limits, IMAGE, "sh", "-c", script):
        until_logged(docker, "c1", "up")
        state = inspect(docker, "c1")
        assert (state["Status"], state["Running"], state["ExitCode"]) == ("running", True, 0)
        assert b"katapy" in Path(f"/proc/{state['Pid']}/cmdline").read_bytes()
        assert docker("ps", "--format", "{{.Names}} {{.State}}").out == "c1 running\n"
        done = docker(
            "exec", "--interactive", "c1", "sh", "-c", "cat; echo $A; echo e >&2; exit 9", stdin="in\n", check=False
        )
        assert (done.status, done.out, done.err) == (9, "in\nb\n", "e\n")
        options = ("--user", "1000:1000", "--workdir", "/tmp", "--env", "A=c")
        assert docker("exec", *options, "c1", "sh", "-c", "id -u; pwd; echo $A").out.split() == ["1000", "/tmp", "c"]
        for program in ("nonesuch", "/etc/passwd"):
            # docker makes 126 of runc's words, too.
            done = docker("exec", "c1", program, check=False)
            assert (done.status, program in done.out) == (126, True)
        assert on_terminal(docker, DOCKER, "exec", "-it", "c1", "sh", "-c", TYPED) == 6
        docker("exec", "--detach", "c1", "sh", "-c", "echo later > /later")
        docker("exec", "c1", "sh", "-c", "until grep later /later 2> /dev/null; do sleep 0.1; done")

        show = ("exec", "c1", "sh", "-c", "cd /sys/fs/cgroup; cat memory.max cpu.max pids.max; cat /proc/1/comm")
        assert docker(*show).out.split() == [str(64 << 20), "50000", "100000", "20", "docker-init"]
        docker("update", "--memory", "48m", "--memory-swap", "48m", "--cpus", "0.25", "--pids-limit", "30", "c1")
        assert docker(*show).out.split() == [str(48 << 20), "25000", "100000", "30", "docker-init"]
        # The host's side of it is its one stand-in.
        assert len(docker("top", "c1").out.splitlines()) == 2
        figures = json.loads(docker("stats", "--no-stream", "--format", "{{json .}}", "c1").out)
        if "runtimeType" in (docker.directory / "daemon.json").read_text():
            # katapy's shim is asked, and says what the container has: docker-init, sh, sleep.
            assert int(figures["PIDs"]) == 3
        else:
            # containerd's looks at the cgroup on the host: the VM's cost.
            assert int(figures["PIDs"]) > 5
        docker("cp", given, "c1:/given")
        assert docker("exec", "c1", "cat", "/given").out == "given\n"
        docker("cp", "c1:/given", docker.directory / "taken")
        assert (docker.directory / "taken").read_text() == "given\n"
        assert "A /given\n" in docker("diff", "c1").out
        docker("pause", "c1")
        state = inspect(docker, "c1")
        assert (state["Status"], state["Paused"]) == ("paused", True)
        docker("unpause", "c1")

        docker("stop", "c1")
        state = inspect(docker, "c1")
        assert (state["Status"], state["ExitCode"], state["Pid"]) == ("exited", 5, 0)
        done = docker("logs", "c1")
        assert (done.out, done.err) == ("up\nbye\n", "err\n")
        docker("restart", "c1")
        assert docker("exec", "c1", "cat", "/given").out == "given\n"
        assert inspect(docker, "c1")["Status"] == "running"
        docker("kill", "c1")
        assert docker("wait", "c1").out == "137\n"
        assert inspect(docker, "c1")["ExitCode"] == 137


def test_what_is_started_again(docker: Docker) -> None:
    """By docker itself, as often as it was told to."""
    with container(docker, "c1", "--restart", "on-failure:1", IMAGE, "sh", "-c", "echo here; exit 3"):
        deadline = time.monotonic() + DEADLINE
        while (state := inspect(docker, "c1"))["Status"] != "exited":
            assert time.monotonic() < deadline, state
            time.sleep(0.1)
        assert (state["ExitCode"], state["RestartCount"]) == (3, 1)
        assert docker("logs", "c1").out == "here\n" * 2


_CONFINED = [
    *("--user", "1000:1000", "--group-add", "7", "--workdir", "/etc", "--env", "A=b c", "--init"),
    *("--cap-drop", "all", "--cap-add", "net_raw", "--security-opt", "no-new-privileges", "--oom-score-adj", "300"),
    *("--ulimit", "nofile=100:200", "--ulimit", "core=0", "--ulimit", "nproc=300:400", "--ulimit", "stack=4194304"),
    *("--security-opt", "seccomp=DIR/seccomp.json", "--device", "/dev/zero:/dev/other:r", "--shm-size", "1m"),
]
_READ_ONLY = [
    *("--read-only", "--tmpfs", "/tmp:size=1m", "--tmpfs", "/new", "--volume", "DIR/volume:/ro:ro"),
    *("--volume", "DIR/volume:/rw", "--mount", "type=tmpfs,destination=/root,tmpfs-mode=0700"),
    *("--sysctl", "net.ipv4.ip_unprivileged_port_start=7", "--cgroupns", "private", "--tty"),
]


@pytest.mark.parametrize("options", [_CONFINED, _READ_ONLY], ids=["confined", "read-only"])
def test_a_container_sees_what_it_sees_with_runc(docker: Docker, options: list[str]) -> None:
    """The facts of FACTS, line by line, and a seccomp profile that is in force."""
    (docker.directory / "volume").mkdir(mode=0o777, exist_ok=True)
    profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["getpriority"], "action": "SCMP_ACT_ERRNO"}]}
    (docker.directory / "seccomp.json").write_text(json.dumps(profile))
    options = [option.replace("DIR", str(docker.directory)) for option in options]
    arguments = (
        "--rm",
        "--network",
        "none",
        "--hostname",
        "box",
        *options,
        IMAGE,
        "sh",
        "-c",
        f"{FACTS}\nnice; exit 3",
    )
    theirs, ours = (docker.run(*arguments, runtime=runtime, check=False) for runtime in ("runc", "katapy"))
    assert theirs.status == 3, theirs.err
    assert ours.status == 3, ours.err
    assert len(theirs.out.splitlines()) > 60
    assert not (unlike := difference(theirs.out.splitlines(), ours.out.splitlines())), unlike


def test_volumes_and_memory(docker: Docker) -> None:
    """A volume of docker's and a directory: what is written stays, with its owner; also of one that needs too much."""
    shared = docker.directory / "shared"
    shared.mkdir()
    volumes = ("--volume", "kept:/kept", "--volume", f"{shared}:/shared", "--volume", f"{shared}:/ro:ro")
    write = "touch /ro/x; echo one > /kept/file; echo two > /shared/file; chown 7:8 /shared/file; exec tail /dev/zero"
    done = docker.run(
        "--name", "c1", "--memory", "32m", "--memory-swap", "32m", *volumes, IMAGE, "sh", "-c", write, check=False
    )
    assert done.status == 137
    assert "Read-only file system" in done.err
    docker("rm", "c1")
    status = (shared / "file").stat()
    assert (status.st_uid, status.st_gid) == (7, 8)
    assert docker.run("--rm", *volumes, IMAGE, "cat", "/kept/file", "/ro/file").out == "one\ntwo\n"
    docker("volume", "rm", "kept")


def fetched(docker: Docker, url: str) -> str:
    """Return a page as the host gets it, once the server is up."""
    deadline = time.monotonic() + DEADLINE
    while (done := docker.on_host("busybox", "wget", "-q", "-O-", url, check=False)).status:
        assert time.monotonic() < deadline, done
        time.sleep(0.1)
    return done.out


@pytest.mark.parametrize("network", ["bridge", "custom"])
def test_a_container_s_network_is_that_of_runc(docker: Docker, network: str) -> None:
    """On the default bridge and on a network of the user's, where docker resolves names itself."""
    if network == "custom":
        docker("network", "create", network)
    options = ("--rm", "--network", network, "--dns-search", "example.org", IMAGE, "sh", "-c", NETWORK)
    theirs, ours = (docker.run(*options, runtime=runtime).out for runtime in ("runc", "katapy"))
    assert ours == theirs
    assert "ADDRESS" in ours


def test_a_published_port(docker: Docker, busybox: Path) -> None:
    """By docker's proxy on the loopback, by its rules on another address; and containers reach one another."""
    page = (busybox / "etc" / PAGE).read_text()
    with container(docker, "web", "--publish", "8080:80", IMAGE, *WEB):
        address = docker("inspect", "--format", "{{.NetworkSettings.IPAddress}}", "web").out.strip()
        assert fetched(docker, f"http://{address}/{PAGE}") == page
        for host in ("127.0.0.1", "10.77.0.1"):
            assert fetched(docker, f"http://{host}:8080/{PAGE}") == page
        for runtime in ("runc", "katapy"):
            command = ("wget", "-q", "-O-", f"http://{address}/{PAGE}")
            assert docker.run("--rm", IMAGE, *command, runtime=runtime).out == page


def test_names_of_a_user_s_network(docker: Docker, busybox: Path) -> None:
    """Docker answers them on the loopback of the container's namespace, which is not the VM's."""
    docker("network", "create", "custom")
    with container(docker, "web", "--network", "custom", "--network-alias", "www", IMAGE, *WEB):
        address = docker("inspect", "--format", "{{.NetworkSettings.Networks.custom.IPAddress}}", "web").out.strip()
        fetched(docker, f"http://{address}/{PAGE}")
        # Many at once, and each gets its own answer.
        ask = f"""
            for name in web www; do wget -q -O- http://$name/{PAGE}; done
            for i in $(seq 40); do nslookup web > /tmp/$i & done; wait; grep -l 'Address: {address}' /tmp/* | wc -l
            nslookup nobody.invalid > /dev/null || echo unknown
        """
        expected = 2 * (busybox / "etc" / PAGE).read_text() + "40\nunknown\n"
        assert docker.run("--rm", "--network", "custom", IMAGE, "sh", "-c", ask).out == expected


def test_dns(docker: Docker) -> None:
    """The files are docker's, and what they name is asked."""
    done = docker.run(
        "--rm", "--dns", "10.77.0.1", "--add-host", "db:192.0.2.7", IMAGE, "cat", "/etc/resolv.conf", "/etc/hosts"
    )
    assert "nameserver 10.77.0.1\n" in done.out
    assert "192.0.2.7\tdb\n" in done.out


def test_networks_come_and_go(docker: Docker) -> None:
    """`docker network connect` and `disconnect`, while the container runs."""
    docker("network", "create", "custom")
    appears = "until ip addr | grep -q 'inet 10.78'; do sleep 0.1; done"
    goes = "while [ $(ls /sys/class/net | wc -l) != 2 ]; do sleep 0.1; done; ip addr show eth0 | grep -c 'inet 10.77'"
    with container(docker, "web", IMAGE, *WEB):
        for _ in range(2):
            docker("network", "connect", "custom", "web")
            docker("exec", "web", "sh", "-c", appears)
            docker("network", "disconnect", "custom", "web")
            assert docker("exec", "web", "sh", "-c", goes).out == "1\n"


def test_without_a_network(docker: Docker) -> None:
    """Loopback, and no device that could be one."""
    look = "ls /sys/class/net; grep -il '^0x1041\\|^0x1000' /sys/bus/pci/devices/*/device | wc -l"
    assert docker.run("--rm", "--network", "none", IMAGE, "sh", "-c", look).out == "lo\n0\n"


def test_the_readme_s_docker_commands(docker: Docker, busybox: Path) -> None:
    """As written, but for the installation and the daemon."""
    section = (SOURCE / "README.md").read_text().partition("## With docker")[2]
    blocks = [block.partition("```")[0] for block in section.split("```sh\n")[1:3]]
    assert blocks[0].startswith("apt-get install ")
    # Which is how the daemon of these tests is configured.
    assert ".venv/bin/katapy install --docker\n" in blocks[0]
    (docker.directory / "examples/hello").mkdir(parents=True)
    (docker.directory / "examples/hello/rootfs").symlink_to(busybox)
    lines = docker.on_host("sh", "-euc", blocks[1]).out
    docker("image", "rm", "hello")
    assert lines.count((busybox / "etc/passwd").read_text()) == 2
