"""SIGKILL for stand-ins and for commands in the middle of a verb: `state` tells the truth, and nothing stays behind."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from pathlib import Path

import pytest
from harness import DEADLINE, Katapy, MakeBundle

VERBS = {
    "start": [],
    "exec": ["sh", "-c", "sleep 1000"],
    "kill": ["KILL"],
    "state": [],
    "delete": [],
}


def _await_status(katapy: Katapy, container_id: str, status: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while katapy.state(container_id)["status"] != status:
        assert time.monotonic() < deadline


def test_killed_stand_in_of_a_container(katapy: Katapy, bundle: MakeBundle) -> None:
    """For an engine the container has ended with it: one that went on would be nobody's."""
    katapy.detach("run", "--detach", "--bundle", bundle(["sleep", "1000"]), "c1")
    os.kill(katapy.state("c1")["pid"], signal.SIGKILL)
    _await_status(katapy, "c1", "stopped")
    assert katapy.state("c1")["pid"] == 0
    katapy("delete", "c1", check=True)


def test_killed_stand_in_of_an_exec(katapy: Katapy, bundle: MakeBundle, tmp_path: Path) -> None:
    katapy.detach("run", "--detach", "--bundle", bundle(["sleep", "1000"]), "c1")
    katapy.detach("exec", "--detach", "--pid-file", tmp_path / "pid", "c1", "sleep", "2000")
    count = ("exec", "c1", "sh", "-c", "ps -o args | grep -c '[s]leep 2000'")
    assert katapy(*count).stdout == b"1\n"
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    deadline = time.monotonic() + DEADLINE
    while katapy(*count).stdout != b"0\n":
        assert time.monotonic() < deadline
    assert katapy.state("c1")["status"] == "running"
    katapy("delete", "--force", "c1", check=True)


@pytest.mark.parametrize("verb", VERBS)
def test_command_killed_in_the_middle_of_a_verb(katapy: Katapy, bundle: MakeBundle, verb: str) -> None:
    """At several moments, from before it has said anything to after it is done."""
    directory = bundle(["sleep", "1000"])
    katapy.detach("create", "--bundle", directory, "c1")
    if verb in ("exec", "kill", "state"):
        katapy("start", "c1", check=True)
    for moment in (0.02, 0.1, 0.2, 0.3, 0.5):
        flags = ["--force"] if verb == "delete" else []
        process = katapy.start(verb, *flags, "c1", *VERBS[verb], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        pidfd = os.pidfd_open(process.pid)
        select.select([pidfd], [], [], moment)
        os.close(pidfd)
        process.kill()
        process.wait()
        state = katapy("state", "c1")
        if state.returncode:
            break
        assert json.loads(state.stdout)["status"] in ("created", "running", "stopped")
    katapy("delete", "--force", "c1", check=True)
    assert katapy("list", "-q").stdout == b""


def test_long_lived_processes_keep_no_descriptors(katapy: Katapy, bundle: MakeBundle) -> None:
    """Of any number of processes that came and went."""
    katapy.detach("run", "--detach", "--bundle", bundle(["sleep", "1000"]), "c1")
    state = json.loads((katapy.root / "c1/state.json").read_text())
    names = {process["pid"]: process["name"] for process in (state["shim"], *state["helpers"])}

    def descriptors() -> dict[str, int]:
        return {name: len(os.listdir(f"/proc/{pid}/fd")) for pid, name in names.items()}

    script = "ls /proc/$PPID/fd 2>/dev/null | wc -l; ls /proc/self/fd | wc -l"
    first = katapy("exec", "c1", "sh", "-c", script, check=True).stdout
    before = descriptors()
    for number in range(12):
        assert katapy("exec", "c1", "sh", "-c", f"exit {number}", stdin=b"x").returncode == number
        katapy.detach("exec", "--detach", "c1", "true")
    deadline = time.monotonic() + DEADLINE
    # The last detached one may still be on its way out.
    while any(descriptors()[name] > count for name, count in before.items()):
        assert time.monotonic() < deadline, (before, descriptors())
    assert katapy("exec", "c1", "sh", "-c", script, check=True).stdout == first
    katapy("delete", "--force", "c1", check=True)
