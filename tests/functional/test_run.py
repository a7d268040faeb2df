"""`katapy run`: a bundle in its own VM, its exit code, its isolation."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from harness import BOOT_ID, DEADLINE, Katapy, MakeBundle


def sh(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


def test_runs_in_another_kernel(katapy: Katapy, bundle: MakeBundle) -> None:
    done = katapy("run", "--bundle", bundle(sh(f"cat {BOOT_ID}; cat /proc/1/cmdline; hostname")), "c1", check=True)
    boot, cmdline, *_ = done.stdout.decode().split("\n")
    assert len(boot) == 36
    assert boot != BOOT_ID.read_text().strip()
    assert cmdline.startswith("/bin/sh\0")


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("exit 0", 0),
        ("exit 7", 7),
        ("/etc/passwd", 126),
        ("no-such-program", 127),
        ("sh -c 'kill -KILL $$'", 137),
        ("sh -c 'kill -TERM $$'", 143),
    ],
)
def test_exit_code_is_the_container_s(katapy: Katapy, bundle: MakeBundle, script: str, status: int) -> None:
    # The last command's status is the shell's; `exit $?` keeps busybox from exec'ing it as pid 1.
    assert katapy("run", "--bundle", bundle(sh(f"{script}; exit $?")), "c1").returncode == status


def test_program_that_does_not_exist(katapy: Katapy, bundle: MakeBundle) -> None:
    done = katapy("run", "--bundle", bundle(["nonsense"]), "c1")
    assert done.returncode == 127
    assert b'exec: "nonsense": executable file not found in $PATH' in done.stderr


def test_namespaces_limits_and_privileges(katapy: Katapy, bundle: MakeBundle, tmp_path: Path) -> None:
    """One VM, many facts: what the configuration asked for is what the container sees."""
    volume, secret = tmp_path / "volume", tmp_path / "secret"
    volume.mkdir()
    secret.mkdir()
    (secret / "key").write_text("s3cret")

    def edit(spec: dict[str, Any]) -> None:
        process, linux = spec["process"], spec["linux"]
        process["user"] = {"uid": 1000, "gid": 1000, "additionalGids": [7], "umask": 0o027}
        process["env"] += ["COLOUR=green"]
        process["cwd"] = "/tmp"
        process["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 99}]
        process["oomScoreAdj"] = 123
        spec["hostname"] = "box"
        spec["mounts"] += [
            {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]},
            {"destination": "/volume", "type": "bind", "source": str(volume), "options": ["rbind", "rw"]},
            {"destination": "/secret", "type": "bind", "source": str(secret), "options": ["rbind", "ro"]},
        ]
        volume.chmod(0o777)
        linux["resources"] |= {
            "memory": {"limit": 100 << 20, "reservation": 16 << 20},
            "pids": {"limit": 33},
            "cpu": {"shares": 512, "quota": 50_000, "period": 100_000, "cpus": "0", "mems": "0"},
            "unified": {"memory.high": str(90 << 20)},
        }
        linux["sysctl"] = {"kernel.msgmax": "5000"}
        linux["seccomp"] = {
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["chmod", "fchmodat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 99}],
        }

    script = r"""
        echo uid=$(id -u) gid=$(id -g) groups=$(id -G | tr ' ' ,) umask=$(umask) pid=$$ host=$(hostname) cwd=$(pwd)
        echo colour=$COLOUR nofile=$(ulimit -n) oom=$(cat /proc/self/oom_score_adj)
        echo msgmax=$(cat /proc/sys/kernel/msgmax)
        echo caps=$(grep CapEff /proc/self/status | cut -f2) nnp=$(grep NoNewPrivs /proc/self/status | cut -f2)
        echo seccomp=$(grep 'Seccomp:' /proc/self/status | cut -f2) fds=$(ls /proc/$$/fd | tr '\n' ,)
        echo written > /volume/file; cat /secret/key; echo
        echo x > /secret/key 2>&1 || echo readonly-volume
        touch /bin/x 2>&1 || echo readonly-root
        cat /proc/kcore 2>/dev/null | head -c1 | wc -c
        echo 1 > /proc/sys/kernel/msgmax || echo readonly-sys
        touch /tmp/f; chmod 777 /tmp/f 2>&1 || echo no-chmod
        ls /dev | tr '\n' ' '
        echo; mount | grep ' / '
        cd /sys/fs/cgroup && echo memory=$(cat memory.max) pids=$(cat pids.max) cpu=$(cat cpu.max | tr ' ' /)
        echo weight=$(cat cpu.weight) cpus=$(cat cpuset.cpus) mems=$(cat cpuset.mems)
        echo low=$(cat memory.low) high=$(cat memory.high) cgroup=$(cat /proc/self/cgroup); ls -d katapy
        echo done
    """
    done = katapy("run", "--bundle", bundle(sh(script), edit=edit), "c1")
    out = done.stdout.decode()
    assert done.returncode == 0, (out, done.stderr)
    for fact in (
        "uid=1000 gid=1000 groups=1000,7 umask=0027 pid=1 host=box cwd=/tmp",
        "colour=green nofile=77 oom=123",
        "msgmax=5000",
        "caps=0000000000000000 nnp=1",
        "seccomp=2 fds=0,1,2,",
        "s3cret",
        "readonly-volume",
        "readonly-root",
        "readonly-sys",
        "no-chmod",
        "memory=104857600 pids=33 cpu=50000/100000",
        "weight=20 cpus=0 mems=0",
        "low=16777216 high=94371840 cgroup=0::/",
        "done",
    ):
        assert fact in out, out
    devices = next(line.split() for line in out.splitlines() if " null " in f" {line} ")
    assert {"null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts", "fd", "stdin"} <= set(devices)
    assert "vda" not in devices
    assert "katapy: No such file" in done.stderr.decode()  # no cgroup but its own is in sight
    assert (volume / "file").read_text() == "written\n"
    assert (secret / "key").read_text() == "s3cret"


def test_limits_hold(katapy: Katapy, bundle: MakeBundle) -> None:
    """A memory hog, a fork bomb and a forbidden device are stopped; the pod survives all three."""

    def edit(spec: dict[str, Any]) -> None:
        # CAP_MKNOD, so that only the device rules stand between the container and the guest's disk.
        for name in ("bounding", "effective", "permitted"):
            spec["process"]["capabilities"][name].append("CAP_MKNOD")
        spec["linux"]["resources"] |= {"memory": {"limit": 128 << 20, "swap": 128 << 20}, "pids": {"limit": 20}}
        spec["mounts"].append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["size=1m"]})

    script = r"""
        tail /dev/zero; echo hog=$?
        i=0; while [ $i -lt 40 ]; do sleep 1000 & i=$((i+1)); done 2>&1 | grep -q -i "can't fork" && echo forks-stopped
        mknod /tmp/disk b 254 0 && head -c1 /tmp/disk 2>&1
        mknod /tmp/kmsg c 1 11 2>&1; head -c1 /tmp/kmsg 2>&1
        mknod /tmp/null c 1 3 && echo x > /tmp/null && echo null-allowed
    """
    done = katapy("run", "--bundle", bundle(sh(script), edit=edit), "c1")
    out = done.stdout.decode() + done.stderr.decode()
    assert "hog=137" in out, out
    assert "forks-stopped" in out, out
    assert "null-allowed" in out, out
    assert out.count("not permitted") >= 2, out


def test_detach_exec_kill_delete(katapy: Katapy, bundle: MakeBundle) -> None:
    """The life of a container, verb by verb, and what each verb says when it is not its turn."""
    directory = bundle(sh("trap 'exit 9' TERM; echo up; while :; do sleep 1 & wait $!; done"))
    katapy.detach("run", "--detach", "--bundle", directory, "c1")
    state = katapy.state("c1")
    assert (state["status"], state["id"], state["bundle"]) == ("running", "c1", str(directory))
    assert state["ociVersion"]
    os.kill(state["pid"], 0)

    done = katapy("exec", "--env", "A=b", "--cwd", "/bin", "--user", "1000:1000", "c1", *sh("echo $A $(pwd) $(id -u)"))
    assert (done.returncode, done.stdout) == (0, b"b /bin 1000\n")
    assert katapy("exec", "c1", *sh("exit 5")).returncode == 5
    assert katapy("exec", "c1", "cat", stdin=b"through").stdout == b"through"
    missing = katapy("exec", "c1", "nonsense")
    assert missing.returncode == 127
    assert b"executable file not found" in missing.stderr

    again = katapy("run", "--bundle", directory, "c1")
    assert (again.returncode, again.stderr) == (1, b"katapy: container with id exists: c1\n")
    running = katapy("delete", "c1")
    assert running.returncode == 1
    assert b"running" in running.stderr
    listed = json.loads(katapy("list", "--format", "json", check=True).stdout)
    assert [(one["id"], one["status"]) for one in listed] == [("c1", "running")]
    assert katapy("list", "-q").stdout == b"c1\n"

    pidfd = os.pidfd_open(state["pid"])
    katapy("kill", "c1", "TERM", check=True)
    # The stand-in ends with the container's own status.
    assert select.select([pidfd], [], [], DEADLINE)[0]
    os.close(pidfd)
    assert katapy.state("c1")["status"] == "stopped"
    assert katapy("kill", "c1").returncode == 1
    late = katapy("exec", "c1", "true")
    assert late.returncode == 1
    katapy("delete", "c1", check=True)
    gone = katapy("state", "c1")
    assert (gone.returncode, gone.stderr) == (1, b'katapy: container "c1" does not exist\n')
    assert katapy("delete", "--force", "c1").returncode == 0
    assert katapy("delete", "c1").returncode == 1


def test_create_then_start(katapy: Katapy, bundle: MakeBundle, tmp_path: Path) -> None:
    directory = bundle(sh("echo ran; exit 3"))
    output = tmp_path / "output"
    katapy.detach("create", "--bundle", directory, "--pid-file", tmp_path / "pid", "c1", output=output)
    assert katapy.state("c1")["status"] == "created"
    assert output.read_text() == ""
    pid = int((tmp_path / "pid").read_text())
    assert katapy.state("c1")["pid"] == pid
    katapy("start", "c1", check=True)
    # The stand-in is our child now (the test is its subreaper): its status is the container's.
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 3
    assert output.read_text() == "ran\n"
    assert katapy("start", "c1").returncode == 1
    katapy("delete", "c1", check=True)


def test_signals_reach_the_container(katapy: Katapy, bundle: MakeBundle) -> None:
    directory = bundle(sh("trap 'echo caught; exit 11' TERM; echo up; while :; do sleep 1 & wait $!; done"))
    with katapy.start("run", "--bundle", directory, "c1", stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == b"caught\n"
        assert process.wait(DEADLINE) == 11


@pytest.mark.timeout(900)
def test_ten_in_parallel(katapy: Katapy, bundle: MakeBundle) -> None:
    def one(number: int) -> bytes:
        return katapy("run", "--bundle", bundles[number], f"c{number}", check=True, timeout=4 * DEADLINE).stdout

    bundles = [bundle(sh(f"echo {number}; cat /proc/sys/kernel/random/boot_id")) for number in range(10)]
    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(one, range(10)))
    assert [answer.split()[0] for answer in answers] == [str(number).encode() for number in range(10)]
    assert len({answer.split()[1] for answer in answers}) == 10


def test_owner_killed(katapy: Katapy, bundle: MakeBundle) -> None:
    """A foreground run whose command is killed with SIGKILL leaves no VM: nobody would ever end it."""
    directory = bundle(sh("echo up; sleep 1000"))
    with katapy.start("run", "--bundle", directory, "c1", stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
        process.kill()
    deadline = time.monotonic() + DEADLINE
    while katapy("list", "-q").stdout:
        assert time.monotonic() < deadline
