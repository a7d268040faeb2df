"""Real engines with katapy as their runtime: podman (with conmon) and buildah, as Debian packages them.

Where it can be compared, the same command runs with runc too. Where runc cannot run either, the machine is the reason
and the test is skipped with it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine import CONMON_SECONDS, Done, Engine
from facts import FACTS, TYPED, difference, on_terminal
from harness import BOOT_ID, await_ends, descendants, make_busybox

from katapy.assets.guest import find_kernel
from katapy.config import Config

SOURCE = Path(__file__).resolve().parents[2]


@pytest.fixture
def engine(host: None) -> Iterator[Engine]:
    """Engines with a root file system of busybox at ``rootfs``; afterwards there is no container, and no state.

    Not in pytest's directory: conmon binds a unix socket in it, and where its name is too long podman waits for 20 s.
    """
    with tempfile.TemporaryDirectory(prefix="katapy-") as name:
        made, known = Engine.make(Path(name) / "e"), descendants()
        make_busybox(Path(made.rootfs))
        yield made
        _clean_up(made, known)


def _clean_up(made: Engine, known: Collection[int]) -> None:
    left = list(made.containers())
    if left:
        made("podman", "pod", "rm", "--all", "--force", "--time", "0", check=False)
    for name in left:
        made("podman", "rm", "--force", "--time", "0", name, check=False)
    # It may still be tidying up after its container, in its cgroup; who stays longer is for ``host`` to find.
    await_ends(known, CONMON_SECONDS)
    made.remove_cgroup()
    state = made.directory / "katapy.state"
    names = os.listdir(state) if state.exists() else []
    for name in names:
        made(made.directory / "katapy", "delete", "--force", name, check=False)
    assert (left, names) == ([], []), "containers left behind"


def _same(engine: Engine, *args: str | Path, stdin: str | None = None) -> tuple[Done, Done]:
    """Run a container with runc, then with katapy. Skips the test where runc cannot."""
    theirs = engine(*engine.create("run", "--rm", *args, runtime="runc"), stdin=stdin, check=False)
    if theirs.status == 125:
        pytest.skip(f"podman cannot run runc on this machine either: {theirs.err.strip()}")
    return theirs, engine.run("--rm", *args, stdin=stdin, check=False)


def _inspect(engine: Engine, name: str) -> dict[str, Any]:
    [document] = json.loads(engine.podman("inspect", name).out)
    state: dict[str, Any] = document["State"]
    return state


def _until_logged(engine: Engine, name: str, text: str) -> None:
    """Wait until a container has said the line ``text``, as a user would: by following its log."""
    argv = ("podman", "--runtime", "katapy", "logs", "--follow", name)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=engine.env) as follow:
        assert follow.stdout
        for line in follow.stdout:
            if line == f"{text}\n":
                break
        follow.kill()


def test_attached(engine: Engine) -> None:
    """Each stream, the exit status, the arguments; and with the host's name, for which "(none)" came."""
    script = 'hostname; read line; echo "out $line $1"; echo err >&2; cat | wc -c; exit 7'
    bulk = "word\n" + "x" * 300_000
    theirs, ours = _same(
        engine,
        "--interactive",
        "--uts",
        "host",
        "--rootfs",
        engine.rootfs,
        "sh",
        "-c",
        script,
        "sh",
        "two  words",
        stdin=bulk,
    )
    assert ours == theirs == Done(7, f"{os.uname().nodename}\nout word two  words\n300000\n", "err\n")


@pytest.mark.parametrize(("program", "status"), [("/nonesuch", 127), ("/etc/passwd", 126)])
def test_programs_that_cannot_run(engine: Engine, program: str, status: int) -> None:
    """podman tells the two from the runtime's words."""
    theirs, ours = _same(engine, "--rootfs", engine.rootfs, program)
    assert ours.status == theirs.status == status
    assert program in ours.err


def test_a_container_s_life(engine: Engine) -> None:
    """run -d, ps, inspect, logs, exec, stop, start again, restart, kill, rm: each as podman's manual says."""
    script = 'trap "echo bye; exit 5" TERM; echo up; echo err >&2; while :; do sleep 1000 & wait; done'
    made = engine.run(
        "--detach", "--init", "--name", "c1", "--env", "A=b", "--rootfs", engine.rootfs, "sh", "-c", script
    )
    _until_logged(engine, "c1", "up")
    identity = made.out.strip()
    state = _inspect(engine, "c1")
    assert (state["Status"], state["Running"], state["ExitCode"]) == ("running", True, 0)
    assert b"katapy" in Path(f"/proc/{state['Pid']}/cmdline").read_bytes()
    assert Path(f"/proc/{state['ConmonPid']}/comm").read_text() == "conmon\n"
    assert engine.podman("ps", "--quiet", "--no-trunc").out.split() == [identity]
    # It listed every process of the host: top looks where the container's pid is, and that was there.
    assert engine.podman("top", "c1", "pid").out.split() == ["PID", "1"]
    found = engine.podman("top", "c1", "-o", "pid,args").out
    if engine.podman("version", "--format", "{{.Client.Version}}").out.startswith("4."):
        # By a ps in the container.
        assert "sleep 1000" in found
    else:
        # By the host's where the container's pid is, which is its stand-in.
        assert "sleep 1000" not in found
        assert "katapy" in found

    done = engine.podman(
        "exec", "--interactive", "c1", "sh", "-c", "cat; echo $A; echo e >&2; exit 9", stdin="in\n", check=False
    )
    assert done.status == 9
    assert done.out == "in\nb\n"
    assert done.err.startswith("e\n")
    options = ("--user", "1000:1000", "--workdir", "/tmp", "--env", "A=c")
    assert engine.podman("exec", *options, "c1", "sh", "-c", "id -u; pwd; echo $A").out.split() == ["1000", "/tmp", "c"]
    for program, status in (("nonesuch", 127), ("/etc/passwd", 126)):
        assert engine.podman("exec", "c1", program, check=False).status == status
    assert on_terminal(engine, "podman", "exec", "-it", "c1", "sh", "-c", TYPED) == 6

    figures = json.loads(engine.podman("stats", "--no-stream", "--format", "json", "c1").out)[0]
    assert int(figures["pids"]) > 5  # the VM's, on the host
    engine.podman("pause", "c1")
    assert _inspect(engine, "c1")["Status"] == "paused"
    engine.podman("unpause", "c1")

    engine.podman("stop", "c1")
    state = _inspect(engine, "c1")
    assert (state["Status"], state["ExitCode"], state["Pid"]) == ("exited", 5, 0)
    done = engine.podman("logs", "c1")
    assert (done.out, done.err) == ("up\nbye\n", "err\n")
    assert engine.podman("exec", "c1", "true", check=False).status == 255

    engine.podman("start", "c1")
    assert _inspect(engine, "c1")["Status"] == "running"
    engine.podman("restart", "--time", "0", "c1")
    assert _inspect(engine, "c1")["Status"] == "running"
    assert engine.podman("rm", "c1", check=False).status == 2
    engine.podman("kill", "c1")
    assert engine.podman("wait", "c1").out.strip() == "137"
    assert _inspect(engine, "c1")["ExitCode"] == 137
    engine.podman("rm", "c1")
    assert engine.podman("ps", "--all", "--quiet").out == ""


def test_copies(engine: Engine) -> None:
    """Into and out of a running container; they were into and out of the host, where podman looks by the pid.

    What only the guest has, it cannot have: that is refused, and nothing goes elsewhere.
    """
    given, volume = engine.directory / "given", engine.directory / "volume"
    given.write_text("given\n")
    volume.mkdir()
    options = ("--tmpfs", "/tmp", "--volume", f"{volume}:/volume", "--volume", f"{volume}:/kept:ro")
    engine.run("--detach", "--name", "c1", *options, "--rootfs", engine.rootfs, "sleep", "1000")
    name = f"katapy-copy-{os.getpid()}"
    engine.podman("cp", given, f"c1:/{name}")
    engine.podman("cp", given, f"c1:/volume/{name}")
    assert engine.podman("exec", "c1", "cat", f"/{name}", f"/volume/{name}").out == "given\n" * 2
    assert not Path("/", name).exists()
    engine.podman("cp", "c1:/etc/passwd", engine.directory / "taken")
    assert (engine.directory / "taken").read_text() == Path(engine.rootfs, "etc/passwd").read_text()
    for place in ("tmp", "kept"):
        refused = engine.podman("cp", given, f"c1:/{place}/new", check=False)
        assert "read-only file system" in refused.err
        assert not Path("/", place, "new").exists()
    assert os.listdir(volume) == [name]
    assert not Path(f"/proc/{_inspect(engine, 'c1')['Pid']}/root/etc").exists()
    engine.podman("rm", "--force", "--time", "0", "c1")


def test_terminal(engine: Engine) -> None:
    """And --rm: nothing is left of it."""
    argv = engine.create("run", "--rm", "-it", "--rootfs", engine.rootfs)
    assert on_terminal(engine, *argv, "sh", "-c", TYPED) == 6


def test_limits(engine: Engine) -> None:
    """They hold in the guest's cgroup: a fork bomb gets no further than its limit, and a memory hog is killed."""
    script = """
        cd /sys/fs/cgroup; cat memory.max pids.max cpu.max
        (for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 1000 & done) 2> /dev/null
        read -r _ refused < pids.events; echo $((refused > 0))
        exec tail /dev/zero"""
    limits = ("--memory", "128m", "--memory-swap", "128m", "--cpus", "0.5", "--pids-limit", "10")
    done = engine.run("--name", "c1", *limits, "--rootfs", engine.rootfs, "sh", "-c", script, check=False)
    assert done.out.split() == [str(128 << 20), "10", "50000", "100000", "1"]
    assert done.status == 137
    # Which podman's conmon cannot see: the cgroup that it watches is another.
    assert _inspect(engine, "c1")["OOMKilled"]
    engine.podman("rm", "c1")


_CONFINED = [
    *("--user", "1000:1000", "--group-add", "7", "--workdir", "/etc", "--umask", "0027", "--env", "A=b c"),
    *("--cap-drop", "all", "--cap-add", "net_raw", "--security-opt", "no-new-privileges", "--oom-score-adj", "300"),
    *(
        "--ulimit",
        "nofile=100:200",
        "--ulimit",
        "core=0",
        "--ulimit",
        "nproc=300:400",
        "--ulimit",
        "stack=4194304",
        "--env-host=false",
    ),
    *("--security-opt", "seccomp=DIR/seccomp.json", "--device", "/dev/zero:/dev/other:r", "--shm-size", "1m"),
]
_READ_ONLY = [
    *("--read-only", "--tmpfs", "/tmp:size=1m", "--tmpfs", "/new", "--volume", "DIR/volume:/ro:ro"),
    *("--volume", "DIR/volume:/rw", "--mount", "type=tmpfs,destination=/root,tmpfs-mode=0700"),
]
_PRIVILEGED = ["--privileged", "--security-opt", "unmask=all"]


@pytest.mark.parametrize(
    "options", [[], _CONFINED, _READ_ONLY, _PRIVILEGED], ids=["plain", "confined", "read-only", "privileged"]
)
def test_a_container_sees_what_it_sees_with_runc(engine: Engine, options: list[str]) -> None:
    """The facts of FACTS, line by line. That seccomp's profile is in force is seen from mkdir(2), which it forbids."""
    (engine.directory / "rootfs/etc/facts").write_text(FACTS)
    (engine.directory / "volume").mkdir(mode=0o777)
    profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["getpriority"], "action": "SCMP_ACT_ERRNO"}]}
    (engine.directory / "seccomp.json").write_text(json.dumps(profile))
    options = [option.replace("DIR", str(engine.directory)) for option in options]
    found: list[list[str]] = []
    for runtime in ("runc", "katapy"):
        # A root of its own, for podman makes mount points and files in it.
        root = make_busybox(engine.directory / f"root-{runtime}")
        (root / "etc/facts").write_text(FACTS)
        argv = engine.create("run", "--rm", "--hostname", "box", *options, "--rootfs", str(root), runtime=runtime)
        done = engine(*argv, "sh", "/etc/facts", check=False)
        if runtime == "runc" and done.status == 125:
            pytest.skip(f"podman cannot run runc on this machine either: {done.err.strip()}")
        found.append(f"{done.out}status {done.status}".splitlines())
    assert len(found[0]) > 60, done.err
    assert not (unlike := difference(*found)), unlike


def test_volumes(engine: Engine) -> None:
    """What a container writes into a volume is on the host, with its owner; one that is read-only stays as it was."""
    for name in ("read", "write"):
        (engine.directory / name).mkdir()
        (engine.directory / name / "file").write_text(name)
    read, write = engine.directory / "read", engine.directory / "write"
    volumes = ("--volume", f"{read}:/r:ro", "--volume", f"{write}:/w", "--volume", f"{read}/file:/one:ro")
    script = "cat /r/file /one; touch /r/x; echo x > /one; echo new > /w/new; chown 7:8 /w/new; rm /w/file"
    done = engine.run("--rm", *volumes, "--rootfs", engine.rootfs, "sh", "-c", script)
    assert done.out == "readread"
    assert done.err.count("Read-only file system") == 2
    assert os.listdir(read) == ["file"]
    assert (read / "file").read_text() == "read"
    status = (write / "new").stat()
    assert (status.st_uid, status.st_gid, os.listdir(write)) == (7, 8, ["new"])


@pytest.fixture(scope="module")
def network() -> Iterator[Path]:
    """A network namespace that stands for a host's, made before ``host`` looks: iproute2 leaves a mount behind."""
    name = f"katapy-podman-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
    yield Path("/run/netns", name)
    subprocess.run(["ip", "netns", "delete", name], check=True)


@pytest.fixture
def elsewhere(network: Path, engine: Engine) -> Callable[..., Done]:
    """Run programs on a host of their own, as far as networks go: podman leaves a bridge and rules behind."""

    def run(*argv: str | Path, check: bool = True) -> Done:
        return engine("nsenter", f"--net={network}", "--", *argv, check=check)

    return run


def test_networks(engine: Engine, elsewhere: Callable[..., Done]) -> None:
    """Podman's own network and one of the user's, as with runc; and a published port."""
    facts = """
        ip addr show eth0 | grep -w inet | sed 's/[.][0-9]*[/]/.N\\//'
        ip route | sed 's/src .*//'; cat /sys/class/net/eth0/mtu; ls /sys/class/net
        grep -c "$(hostname -i)" /etc/hosts
    """
    elsewhere("podman", "network", "create", "--subnet", "10.79.0.0/24", "own")
    for network in ("podman", "own"):
        said = []
        for runtime in ("runc", "katapy"):
            options = ("--rm", "--network", network, "--rootfs", engine.rootfs, "sh", "-c", facts)
            done = elsewhere(*engine.create("run", *options, runtime=runtime), check=False)
            if done.status and runtime == "runc":
                pytest.skip(f"podman cannot run runc with a network on this machine either: {done.err.strip()}")
            said.append(done.out)
        assert said[0] == said[1]
        assert "eth0" in said[0]
    web = ("--detach", "--name", "web", "--network", "own", "--publish", "8081:80", "--rootfs", engine.rootfs)
    elsewhere(*engine.create("run", *web, "httpd", "-f", "-p", "80", "-h", "/etc"))
    page = ("busybox", "wget", "-q", "-O-", "http://127.0.0.1:8081/passwd")
    elsewhere("sh", "-c", 'until "$@" > /dev/null 2>&1; do sleep 0.1; done', "sh", *page)
    assert elsewhere(*page).out == Path(engine.rootfs, "etc/passwd").read_text()
    elsewhere("podman", "rm", "--force", "--time", "0", "web")
    elsewhere("podman", "network", "rm", "own")


def test_a_pod(engine: Engine, elsewhere: Callable[..., Done]) -> None:
    """Its infra container is the sandbox: one VM, one network, a published port; and all of it stops and starts."""
    podman = ("podman", "--runtime", "katapy")
    shared = ("--share", "net,ipc,uts,pid", "--hostname", "inside", "--publish", "8082:80")
    elsewhere(*podman, "pod", "create", "--name", "p1", *shared, "--cgroup-parent", engine.cgroup)
    run = (*podman, "run", "--pod", "p1", "--rootfs", engine.rootfs)
    elsewhere(*run[:-2], "--detach", "--name", "web", *run[-2:], "httpd", "-f", "-p", "80", "-h", "/etc")
    script = """
        hostname; wget -q -O- http://127.0.0.1/group; ps -o args | grep -cE '^(httpd -f|.catatonit -P)'
        ls /sys/class/net; cat /sys/fs/cgroup/memory.max /proc/sys/kernel/random/boot_id; echo shared > /dev/shm/file
    """
    seen = elsewhere(*run[:-2], "--rm", "--memory", "32m", *run[-2:], "sh", "-c", script).out
    group = Path(engine.rootfs, "etc/group").read_text()
    look = ("exec", "web", "cat", "/proc/sys/kernel/random/boot_id", "/dev/shm/file")
    boot, shared_file = engine.podman(*look).out.splitlines()
    assert seen == f"inside\n{group}2\neth0\nlo\n{32 << 20}\n{boot}\n"
    assert shared_file == "shared"
    page = ("busybox", "wget", "-q", "-O-", "http://127.0.0.1:8082/group")
    assert elsewhere(*page).out == group

    def status() -> str:
        return engine.podman("pod", "inspect", "p1", "--format", "{{.State}}").out.strip()

    assert status() == "Running"
    elsewhere(*podman, "pod", "pause", "p1")
    assert status() == "Paused"
    elsewhere(*podman, "pod", "unpause", "p1")
    elsewhere(*podman, "pod", "stop", "--time", "0", "p1")
    assert status() == "Exited"
    elsewhere(*podman, "pod", "start", "p1")
    assert engine.podman("exec", "web", "cat", "/proc/sys/kernel/random/boot_id").out.strip() != boot
    elsewhere(*podman, "pod", "rm", "--force", "--time", "0", "p1")


CONTAINERFILE = """
FROM scratch AS base
COPY rootfs /
ENV PATH=/bin WORD=built
FROM base AS tools
RUN cat /proc/sys/kernel/random/boot_id > /kernel && echo "$WORD" > /word && mkdir /srv && chown user /srv
FROM base
COPY --from=tools /kernel /word /
COPY --from=tools --chown=user /srv /srv
USER user
WORKDIR /srv
RUN id -u > who && pwd > where && ! touch /kernel 2> /dev/null
CMD cat /kernel /word who where
"""


def test_an_image_that_is_built(engine: Engine) -> None:
    """From a Containerfile, each RUN in a VM; then it runs."""
    (engine.directory / "Containerfile").write_text(CONTAINERFILE)
    options = ("--isolation", "oci", "--network", "none", "--runtime", engine.directory / "katapy")
    engine("buildah", "build", *options, "--tag", "localhost/image", ".")
    kernel, *rest = engine.run("--rm", "localhost/image").out.splitlines()
    assert len(kernel) == 36
    assert kernel != BOOT_ID.read_text().strip()
    assert rest == ["built", "1000", "/srv"]
    engine("podman", "image", "rm", "--all", "--force")


def test_buildah(engine: Engine) -> None:
    """Built from nothing with a RUN in a VM, then run: buildah itself waits for the pid, without conmon."""
    run = ("buildah", "run", "--isolation", "oci", "--network", "none")
    script = f'test "$(cat {BOOT_ID})" != "$1" && echo built in a VM > /result; id -u; exit "$2"'
    container = engine("buildah", "from", "scratch").out.strip()
    engine("buildah", "copy", "--quiet", container, engine.directory / "rootfs", "/")
    theirs = engine(*run, "--runtime", engine.directory / "runc", container, "true", check=False)
    if theirs.status:
        pytest.skip(f"buildah cannot run runc on this machine either: {theirs.err.strip()}")
    arguments = ("sh", "-c", script, "sh", BOOT_ID.read_text().strip(), "7")
    done = engine(*run, "--runtime", engine.directory / "katapy", container, *arguments, check=False)
    assert (done.status, done.out) == (7, "0\n")
    engine("buildah", "config", "--cmd", "cat /result", container)
    engine("buildah", "commit", "--quiet", "--rm", container, "localhost/built")
    assert engine.run("--rm", "localhost/built").out == "built in a VM\n"
    engine("podman", "image", "rm", "--all", "--force")


def test_the_readme_s_commands(engine: Engine, elsewhere: Callable[..., Done]) -> None:
    """As written, but for the installation: in a directory that looks like a checkout after `make run`."""
    section = (SOURCE / "README.md").read_text().partition("## With podman and buildah")[2]
    script = section.partition("```sh\n")[2].partition("```")[0]
    install, _, script = script.partition("\n")
    assert install.startswith("apt-get install ")
    hello = shutil.copytree(SOURCE / "examples/hello", engine.directory / "examples/hello")
    engine(hello / "prepare")
    (engine.directory / ".venv/bin").mkdir(parents=True)
    (engine.directory / ".venv/bin/katapy").symlink_to(engine.directory / "katapy")
    lines = elsewhere("sh", "-euc", script).out.splitlines()
    engine("podman", "image", "rm", "--all", "--force")
    # It may be that of the host, too.
    assert lines[0] == lines[-1] == find_kernel(Config.load().runtime.data_dir).version
    assert any(line.endswith("sleep 1000") for line in lines)
