"""The runtime specification's rules for a container's life (runtime.md), case by case: which verb is legal when.

Where the specification and runc differ, engines have been built on runc, and so has this: a created container may be
deleted. What a hook gets and what its failure does is in test_contract; ids that are refused are in test_bad_input.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import DEADLINE, Katapy, MakeBundle, make_busybox

VERBS = ("state", "start", "kill", "delete")
Refused = Callable[..., None]


@pytest.fixture
def refused(katapy: Katapy) -> Refused:
    """Assert that a call fails in one line and leaves the container's state as it was: ``refused("start", "c1")``."""

    def call(*args: str | Path) -> None:
        before = katapy("list", "--format", "json", check=True).stdout
        done = katapy(*args)
        error = done.stderr.decode()
        assert done.returncode == 1, (args, error)
        assert error.startswith("katapy: "), (args, error)
        assert error.count("\n") == 1, (args, error)
        assert katapy("list", "--format", "json", check=True).stdout == before, args

    return call


def _await_status(katapy: Katapy, container_id: str, status: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while katapy.state(container_id)["status"] != status:
        assert time.monotonic() < deadline, katapy.state(container_id)


def _await_text(path: Path, text: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while text not in path.read_text():
        assert time.monotonic() < deadline, path.read_text()


def _list_tree(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


@pytest.mark.parametrize("verb", ["create", "run", "state", "start", "kill", "delete", "exec"])
def test_no_id(katapy: Katapy, verb: str) -> None:
    """Operations: each of them must fail without an id; so must an exec."""
    done = katapy(verb)
    assert done.returncode == 2
    assert b"Usage:" in done.stderr


def test_no_container(katapy: Katapy, refused: Refused) -> None:
    """Operations: there is nothing to ask, start, signal or delete where no such container exists."""
    for verb in VERBS:
        refused(verb, "c1")


def test_life(katapy: Katapy, refused: Refused, bundle: MakeBundle, tmp_path: Path) -> None:
    """Lifecycle, Operations: one container from its creation to its end, with each verb in each of its states."""
    directory = bundle(["sh", "-c", "echo ran on $(hostname); sleep 1000 & echo pid $$; wait"])
    output, pid_file = tmp_path / "output", tmp_path / "pid"
    # Create: the path of the bundle may be relative to the caller's directory.
    argv = katapy.argv("create", "--bundle", f"./{directory.name}", "--pid-file", "pid", "c1")
    with output.open("wb") as file:
        subprocess.run(argv, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=file, check=True, timeout=DEADLINE)

    # State: what the specification demands of it.
    state = katapy.state("c1")
    assert {key: state[key] for key in ("ociVersion", "id", "status", "bundle")} == {
        "ociVersion": "1.2.0",
        "id": "c1",
        "status": "created",
        "bundle": str(directory),
    }
    assert state["pid"] == int(pid_file.read_text())
    assert pid_file.read_text() == str(state["pid"])
    os.kill(state["pid"], 0)
    # Create: the program does not run before start, and an id that is in use is refused.
    assert output.read_text() == ""
    refused("create", "--bundle", directory, "c1")

    # Lifecycle, step 2: what becomes of config.json after create has no effect.
    document = json.loads((directory / "config.json").read_text())
    document["hostname"], document["process"]["args"] = "changed", ["false"]
    document["hooks"] = {"poststart": [{"path": "/bin/false"}]}
    (directory / "config.json").write_text(json.dumps(document))
    katapy("start", "c1", check=True)
    _await_text(output, "ran on katapy\npid 1\n")
    (directory / "config.json").unlink()

    # Running: neither started again nor deleted, and its id is still in use.
    assert katapy.state("c1") == {**state, "status": "running"}
    refused("start", "c1")
    refused("delete", "c1")
    refused("create", "--bundle", bundle(["true"]), "c1")

    # The end of its first process is the end of all others, and of those that exec has added.
    pidfd = os.pidfd_open(state["pid"])
    katapy.detach("exec", "--detach", "--pid-file", tmp_path / "exec", "c1", "sleep", "1000")
    katapy("kill", "c1", "KILL", check=True)
    assert os.waitstatus_to_exitcode(os.waitpid(int((tmp_path / "exec").read_text()), 0)[1]) == 137
    assert select.select([pidfd], [], [], DEADLINE)[0]
    os.close(pidfd)
    assert os.waitstatus_to_exitcode(os.waitpid(state["pid"], 0)[1]) == 137

    # Stopped: not to be started, signalled or entered, only asked and deleted.
    assert katapy.state("c1") == {**state, "status": "stopped", "pid": 0}
    refused("start", "c1")
    refused("kill", "c1", "KILL")
    refused("exec", "c1", "true")
    refused("create", "--bundle", bundle(["true"]), "c1")
    katapy("delete", "c1", check=True)
    for verb in VERBS:
        refused(verb, "c1")


def test_a_container_that_never_ran(
    katapy: Katapy, refused: Refused, bundle: MakeBundle, tmp_path: Path, busybox: Path
) -> None:
    """Delete: only what create has made goes, the bundle stays. Kill: legal in created. Its id is free again then.

    The bundle is the current directory where none is named, and its root file system may be the bundle itself.
    """
    name = "A_long+unusual.id-" + "9" * 58
    directory = make_busybox(tmp_path / "whole")
    document = json.loads((bundle(["true"]) / "config.json").read_text())
    document["root"] = {"path": "."}
    (directory / "config.json").write_text(json.dumps(document))
    before = _list_tree(directory)
    argv = katapy.argv("create", name)
    null = subprocess.DEVNULL
    subprocess.run(argv, cwd=directory, stdin=null, stdout=null, check=True, timeout=DEADLINE)
    state = katapy.state(name)
    assert (state["status"], state["bundle"], state["rootfs"]) == ("created", str(directory), str(directory))
    katapy("kill", name, "KILL", check=True)
    _await_status(katapy, name, "stopped")
    refused("start", name)
    katapy("delete", name, check=True)
    assert not {path for path in before if not (directory / path).exists()}

    # Not what the specification says, which would have it killed first, but what runc does and engines count on. It
    # took ten seconds, for output that such a container cannot have.
    katapy.detach("create", "--bundle", bundle(["true"]), name)
    pid, begun = katapy.state(name)["pid"], time.monotonic()
    katapy("delete", name, check=True)
    assert time.monotonic() - begun < 9
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 137
    refused("state", name)


def test_verbs_while_it_is_created(katapy: Katapy, bundle: MakeBundle, tmp_path: Path) -> None:
    """Operations: start, kill and delete of a container that is still being created fail and change nothing.

    A hook is when somebody can try it: before the VM is up, and when the container is in it and could be started.
    """
    log = tmp_path / "log"
    lines = [
        f"{' '.join(katapy.argv(verb, 'c1'))} >/dev/null 2>&1; echo {verb} $? >> {log}"
        for verb in ("start", "kill", "delete")
    ]
    state = f"{' '.join(katapy.argv('state', 'c1'))} | grep -o creating >> {log}"
    hook = {"path": "/bin/sh", "args": ["sh", "-c", "\n".join([*lines, state])]}

    def edit(spec: dict[str, Any]) -> None:
        spec["hooks"] = {"createRuntime": [hook], "createContainer": [hook]}

    output = tmp_path / "output"
    katapy.detach("create", "--bundle", bundle(["echo", "ran"], edit=edit), "c1", output=output)
    assert log.read_text().split("\n") == [*(["start 1", "kill 1", "delete 1", "creating"] * 2), ""]
    assert katapy.state("c1")["status"] == "created"
    assert output.read_text() == ""
    katapy("start", "c1", check=True)
    _await_status(katapy, "c1", "stopped")
    assert output.read_text() == "ran\n"
    katapy("delete", "c1", check=True)


@pytest.mark.parametrize(
    ("edit", "status"),
    [
        (lambda spec: spec["process"].update(args=["/no/such/program"]), 127),
        (lambda spec: spec["mounts"].append({"destination": "/x", "type": "tmpfs", "options": ["nonsense"]}), 1),
    ],
    ids=["program", "option"],
)
def test_failed_create(
    katapy: Katapy, bundle: MakeBundle, tmp_path: Path, edit: Callable[[Any], None], status: int
) -> None:
    """Errors: after a create that failed everything is as if it had never been tried, even late, in the VM."""
    directory = bundle(["true"], edit=edit)
    before = _list_tree(tmp_path)
    done = katapy("create", "--bundle", directory, "--pid-file", tmp_path / "pid", "c1")
    assert done.returncode == status, done.stderr
    assert katapy("list", "-q").stdout == b""
    shutil.rmtree(katapy.root)
    assert _list_tree(tmp_path) == before


SIGNALS = {
    "HUP": "HUP", "SIGINT": "INT", "usr1": "USR1", "sigusr2": "USR2", "15": "TERM", "SIGRTMIN": "34", "37": "37",
    "64": "64", "WINCH": "WINCH",
}  # fmt: skip


def test_files_written_between_create_and_start(katapy: Katapy, bundle: MakeBundle, tmp_path: Path) -> None:
    """podman 5 writes /etc/hosts then: it was empty in the first second, as it had been when it was mounted."""
    hosts, output = tmp_path / "hosts", tmp_path / "output"
    hosts.touch()

    def edit(spec: dict[str, Any]) -> None:
        spec["mounts"].append({"destination": "/etc/hosts", "type": "bind", "source": str(hosts), "options": ["bind"]})

    directory = bundle(["sh", "-c", "cat /etc/hosts; echo end"], edit=edit)
    katapy.detach("create", "--bundle", directory, "c1", output=output)
    hosts.write_text("127.0.0.1 localhost\n")
    katapy("start", "c1", check=True)
    _await_status(katapy, "c1", "stopped")
    assert output.read_text() == "127.0.0.1 localhost\nend\n"
    katapy("delete", "c1", check=True)


def test_signals(katapy: Katapy, refused: Refused, bundle: MakeBundle, tmp_path: Path) -> None:
    """Kill: the signal that was asked for arrives, by number or by name in any spelling of runc's; TERM by default.

    Signal 0 asks whether there is somebody, and 65 is none.
    """
    traps = "".join(f"trap 'echo got-{name}.' {name}; " for name in [*SIGNALS.values(), "QUIT"])
    script = f"{traps} echo up; while :; do sleep 1000 & wait $!; kill $!; done"
    output = tmp_path / "output"
    katapy.detach("run", "--detach", "--bundle", bundle(["sh", "-c", script]), "c1", output=output)
    _await_text(output, "up\n")
    for argument, name in SIGNALS.items():
        katapy("kill", "c1", argument, check=True)
        _await_text(output, f"got-{name}.")
    katapy("kill", "c1", "0", check=True)
    for wrong in ("65", "-1", "NONSENSE", "SIG", ""):
        refused("kill", "--", "c1", wrong)
    assert output.read_text().count("got-") == len(SIGNALS)
    katapy("kill", "c1", check=True)
    deadline = time.monotonic() + DEADLINE
    while output.read_text().count("got-TERM.") < 2:
        assert time.monotonic() < deadline
    katapy("kill", "--all", "c1", "9", check=True)
    _await_status(katapy, "c1", "stopped")
    refused("kill", "c1", "0")
    katapy("delete", "c1", check=True)
