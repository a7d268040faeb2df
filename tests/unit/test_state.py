"""The state directory: ids, who wins, what a file must hold, the lock, and what removal does not touch."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katapy.errors import AlreadyExists, Internal, InvalidArgument, NotFound, PermissionDenied, Unavailable
from katapy.state import (
    ProcessRef,
    State,
    StateDir,
    Status,
    check_id,
    current_status,
    list_states,
    now,
    scratch,
    state_json,
)


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "run")


def state(id: str = "c1", **changes: Any) -> State:  # noqa: A002
    base = State(
        id=id,
        bundle="/b",
        rootfs="/b/rootfs",
        sandbox=id,
        status=Status.CREATING,
        created=now(),
        oci_version="1.2.0",
        owner=0,
    )
    return base._replace(**changes)


@pytest.mark.parametrize("text", ["c1", "a" * 76, "_+.-", "-", "...", "A.b-c_d+e", "0123456789abcdef" * 4])
def test_ids(text: str) -> None:
    assert check_id(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (".", "'.'"),
        ("..", "'..'"),
        ("a/b", "'a/b'"),
        ("../x", "'../x'"),
        ("abc\n", "'abc\\n'"),
        ("\uff41\uff42", "'\\uff41\\uff42'"),
        ("\u0661", "'\\u0661'"),
        ("a\0", "'a\\x00'"),
        ("a b", "'a b'"),
        ("~a", "'~a'"),
        ("\udcff", "'\\udcff'"),
        ("x" * 77, f"'{'x' * 60}'... (77 characters)"),
        ("x" * 5000, f"'{'x' * 60}'... (5000 characters)"),
    ],
)
def test_no_ids(text: str, shown: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"^container id {re.escape(shown)}: "):
        check_id(text)


@given(st.text(max_size=100))
def test_an_id_is_one_plain_path_component_or_refused(text: str) -> None:
    plain = bool(text) and text not in (".", "..") and len(text) <= 76
    if plain and all(character.isascii() and (character.isalnum() or character in "_+.-") for character in text):
        assert check_id(text) == text
    else:
        with pytest.raises(InvalidArgument, match=r"^container id [ -~]+$"):
            check_id(text)


def test_saved_and_loaded(root: str) -> None:
    me = ProcessRef.of("shim", os.getpid())
    full = state(
        status=Status.STOPPED,
        pid=7,
        annotations={"k": "é"},
        shim=me,
        helpers=(me._replace(name="qemu"), me),
        exit_status=137,
    )
    with StateDir.create(root, state()) as directory:
        assert directory.load().status is Status.CREATING
        directory.save(full)
    with StateDir.open(root, "c1") as directory:
        assert directory.load() == full
    assert os.listdir(f"{root}/c1") == ["state.json"]


def test_modes_are_private_whatever_the_umask_is(root: str) -> None:
    old = os.umask(0)
    try:
        StateDir.create(root, state()).close()
    finally:
        os.umask(old)
    modes = [os.stat(path).st_mode & 0o777 for path in (root, f"{root}/c1", f"{root}/c1/state.json")]
    assert modes == [0o700, 0o700, 0o600]


def test_one_of_many_simultaneous_creates_wins(root: str) -> None:
    barrier = threading.Barrier(8)

    def create(number: int) -> int | None:
        barrier.wait()
        try:
            StateDir.create(root, state(pid=number)).close()
        except AlreadyExists as error:
            return None if str(error) == "container with id exists: c1" else -1
        return number

    with ThreadPoolExecutor(8) as pool:
        winners = [number for number in pool.map(create, range(8)) if number is not None]
    assert len(winners) == 1
    with StateDir.open(root, "c1") as directory:
        assert directory.load().pid == winners[0]
    assert os.listdir(root) == ["c1"]


def test_creates_and_removals_at_once_never_mix(root: str) -> None:
    """Removal once emptied the directory in place, and a new container slipped into it before its rmdir."""

    def work(number: int) -> None:
        created = 0
        while created < 15:
            with suppress(AlreadyExists), StateDir.create(root, state(owner=number)) as directory, directory.lock():
                created += 1
                assert directory.load().owner == number
                directory.remove()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(1, 5))) == [None] * 4
    assert os.listdir(root) == []


def test_a_process_that_ends() -> None:
    with subprocess.Popen(["sleep", "1000"]) as process:
        found = ProcessRef.of("sleep", process.pid)
        assert not found.ending()
        assert found._replace(start_time=found.start_time + 1).ending()
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert found.ending()
    assert found.ending()


@pytest.mark.parametrize(
    ("flags", "pending", "expected"),
    [("4194304", "0", False), ("4194308", "0", True), ("4194304", "256", True), ("4194304", "16640", True),
     ("4194304", "16384", False)],
)  # fmt: skip
def test_a_process_that_was_killed_ends(
    monkeypatch: pytest.MonkeyPatch, flags: str, pending: str, expected: bool
) -> None:
    """Before the kernel says so by its state: by PF_EXITING, or a SIGKILL that its thread has not taken yet."""
    fields = ["S", *["0"] * 5, flags, *["0"] * 12, "77", *["0"] * 8, pending, *["0"] * 20]
    stat = f"5 (a) b) {' '.join(fields)}".encode()
    monkeypatch.setattr("builtins.open", lambda *_: io.BytesIO(stat))
    assert ProcessRef("shim", 5, 77).alive()
    assert ProcessRef("shim", 5, 77).ending() == expected


def test_a_file_in_the_way(root: str) -> None:
    os.makedirs(root, 0o700)
    Path(root, "c1").touch()
    with pytest.raises(AlreadyExists):
        StateDir.create(root, state())
    with pytest.raises(Unavailable, match=r"^cannot open the state of c1: not a directory$"):
        StateDir.open(root, "c1")
    assert list_states(root)[0] == []


def test_a_directory_without_a_state_is_no_container_and_can_be_taken(root: str) -> None:
    os.makedirs(f"{root}/c1", 0o700)
    with StateDir.open(root, "c1") as directory, pytest.raises(NotFound, match=r'^container "c1" does not exist$'):
        directory.load()
    assert list_states(root) == ([], [])
    StateDir.create(root, state()).close()


def test_a_create_that_fails_leaves_nothing(root: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^not UTF-8: .*udcff'$"):
        StateDir.create(root, state(bundle="\udcff"))
    assert os.listdir(root) == []


def test_what_killed_commands_have_left_goes_in_the_end(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory that was never given its name, or has lost it, is nobody's: it stayed for ever."""
    StateDir.create(root, state("c1")).close()
    left = Path(root, f"~{'0' * 15}a")
    (left / "shared").mkdir(parents=True)
    (left / "state.json").write_text("{}")
    (Path(root) / "~emulated").touch()
    StateDir.create(root, state("c2")).close()
    assert left.exists()  # it may be in the making
    monkeypatch.setattr("katapy.state._UNFINISHED_SECONDS", -1.0)
    StateDir.create(root, state("c3")).close()
    assert sorted(os.listdir(root)) == ["c1", "c2", "c3", "~emulated"]


def test_scratch_is_gone_with_its_context(root: str) -> None:
    with scratch(root) as directory:
        (Path(directory) / "config.json").write_text("{}")
        assert list_states(root) == ([], [])
    assert os.listdir(root) == []


def test_scratch_of_a_killed_process_goes_in_the_end(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = os.fork()
    if maker == 0:
        try:
            with scratch(root) as directory:
                (Path(directory) / "config.json").write_text("{}")
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitpid(maker, 0)[1] == signal.SIGKILL
    assert len(os.listdir(root)) == 1
    monkeypatch.setattr("katapy.state._UNFINISHED_SECONDS", -1.0)
    StateDir.create(root, state("c1")).close()
    assert os.listdir(root) == ["c1"]


def test_no_such_container(root: str) -> None:
    with pytest.raises(NotFound, match=r'^container "c1" does not exist$'):
        StateDir.open(root, "c1")
    assert list_states(root) == ([], [])
    with pytest.raises(InvalidArgument):
        StateDir.open(root, "../c1")


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_root_that_others_may_write_is_refused(root: str, mode: int) -> None:
    os.mkdir(root)
    os.chmod(root, mode)
    with pytest.raises(PermissionDenied, match="must belong to uid"):
        StateDir.create(root, state())


def test_links_are_not_followed(root: str, tmp_path: Path) -> None:
    StateDir.create(root, state()).close()
    os.symlink("c1", f"{root}/c2")
    with pytest.raises(Unavailable):
        StateDir.open(root, "c2")
    (tmp_path / "target").write_text("{}")
    os.unlink(f"{root}/c1/state.json")
    os.symlink(tmp_path / "target", f"{root}/c1/state.json")
    with StateDir.open(root, "c1") as directory, pytest.raises(Internal, match="too many levels of symbolic links"):
        directory.load()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"version": 2}, "not version 1"),
        ({"extra": 1}, "other members than version 1 has"),
        ({"id": "c2"}, "is that of another container"),
        ({"sandbox": "../c2"}, "container id '../c2': "),
        ({"sandbox": 1}, "sandbox: expected a string"),
        ({"status": "gone"}, "status: 'gone' is unknown"),
        ({"pid": -1}, "pid: expected an integer between 0 and 4194304"),
        ({"pid": True}, "pid: expected an integer"),
        ({"exit_status": 256}, "exit_status: expected an integer between 0 and 255"),
        ({"annotations": {"a": 1}}, "annotations: expected an object of strings"),
        ({"shim": {"pid": 1}}, "a process: expected name, pid and start_time"),
        ({"helpers": {}}, "helpers: expected an array"),
    ],
)
def test_a_damaged_state_is_refused(root: str, changes: dict[str, Any], problem: str) -> None:
    with StateDir.create(root, state()) as directory:
        file = Path(directory.path, "state.json")
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        with pytest.raises(Internal, match=rf"^the state of c1 is damaged: (state\.json: )?{re.escape(problem)}"):
            directory.load()


def test_list_goes_on_after_a_damaged_state(root: str) -> None:
    StateDir.create(root, state("young", created="2024-01-02T00:00:00Z")).close()
    StateDir.create(root, state("old", created="2024-01-01T00:00:00Z")).close()
    StateDir.create(root, state("bad")).close()
    Path(root, "bad", "state.json").write_text("{")
    states, errors = list_states(root)
    assert [found.id for found in states] == ["old", "young"]
    assert [str(error) for error in errors] == [
        "the state of bad is damaged: state.json: line 1, column 2: expecting property name enclosed in double quotes"
    ]


def test_a_process_is_told_from_a_later_one_with_its_pid() -> None:
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    reference = ProcessRef.of("child", child.pid)
    assert reference.alive()
    assert not reference._replace(start_time=reference.start_time - 1).alive()
    assert child.stdin is not None
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not reference.alive()  # a zombie
    child.wait()
    assert not reference.alive()
    with pytest.raises(NotFound, match=r"^child: no process \d+$"):
        ProcessRef.of("child", child.pid)


def test_the_name_of_a_process_cannot_forge_its_start(monkeypatch: pytest.MonkeyPatch) -> None:
    name = Path("/proc/self/task", str(threading.get_native_id()), "comm")
    before = ProcessRef.of("me", os.getpid())
    old = name.read_text()
    name.write_text("x) Z 1 (")
    try:
        assert ProcessRef.of("me", os.getpid()) == before
        assert before.alive()
    finally:
        name.write_text(old)


def test_a_dead_shim_means_stopped() -> None:
    me = ProcessRef.of("shim", os.getpid())
    running = state(status=Status.RUNNING, pid=9, shim=me, annotations={"a": "b"})
    assert current_status(running) is Status.RUNNING
    assert state_json(running) == {
        "ociVersion": "1.2.0",
        "id": "c1",
        "pid": 9,
        "status": "running",
        "bundle": "/b",
        "rootfs": "/b/rootfs",
        "created": running.created,
        "annotations": {"a": "b"},
    }
    orphan = running._replace(shim=me._replace(start_time=0))
    assert current_status(orphan) is Status.STOPPED
    assert (state_json(orphan)["status"], state_json(orphan)["pid"]) == ("stopped", 0)


def test_now_is_rfc3339_in_utc() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", now())


def test_the_lock_serialises_and_tells_that_the_container_went(root: str) -> None:
    first = StateDir.create(root, state())
    second = StateDir.open(root, "c1")
    order: list[str] = []
    started = threading.Event()

    def wait_for_it() -> None:
        started.set()
        with pytest.raises(NotFound, match=r'^container "c1" does not exist$'), second.lock():
            order.append("wrong")
        order.append("second")

    thread = threading.Thread(target=wait_for_it)
    with first.lock():
        thread.start()
        started.wait()
        order.append("first")
        first.remove()
    thread.join(10)
    second.close()
    assert order == ["first", "second"]


def test_the_lock_excludes_and_ends_with_its_block(root: str) -> None:
    with StateDir.create(root, state()) as first, StateDir.open(root, "c1") as second:
        with first.lock(), pytest.raises(BlockingIOError):
            fcntl.flock(second.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with second.lock():
            pass


def test_a_new_container_of_the_same_name_is_another(root: str) -> None:
    old = StateDir.create(root, state())
    with StateDir.open(root, "c1") as remover, remover.lock():
        remover.remove()
    StateDir.create(root, state()).close()
    with pytest.raises(NotFound), old.lock():
        pass
    old.close()


def test_remove_takes_a_deep_tree_and_follows_nothing(root: str, tmp_path: Path) -> None:
    """A guest may leave a tree deeper than Python's stack and PATH_MAX, and links to what is not its own."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").touch()
    directory = StateDir.create(root, state())
    os.symlink(precious, f"{directory.path}/link")
    fd = os.open(directory.path, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("deeper-and-deeper", dir_fd=fd)
        inner = os.open("deeper-and-deeper", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.symlink(precious, "link", dir_fd=fd)
    os.close(os.open("state.json", os.O_CREAT, dir_fd=fd))
    os.close(fd)
    with directory.lock():
        directory.remove()
    assert os.listdir(root) == []
    assert (precious / "file").exists()


def test_a_removal_that_fails_keeps_the_state(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = StateDir.create(root, state())
    Path(directory.path, "stuck").touch()
    unlink = os.unlink

    def refuse(path: str, *, dir_fd: int | None = None) -> None:
        if path == "stuck":
            raise OSError(16, "Device or resource busy")
        unlink(path, dir_fd=dir_fd)

    with monkeypatch.context() as patched, directory.lock():
        patched.setattr(os, "unlink", refuse)
        with pytest.raises(Unavailable, match=r"^cannot remove the state of c1: device or resource busy$"):
            directory.remove()
    with directory:
        assert directory.load().id == "c1"


def test_its_imports_are_light() -> None:
    """`katapy state` starts often: what costs more than it is worth there must not creep in."""
    code = "import sys, katapy.state; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": os.getcwd()}
    ).stdout.split()
    heavy = {"asyncio", "dataclasses", "inspect", "logging", "pathlib", "shutil", "subprocess", "tempfile", "ctypes"}
    assert heavy.isdisjoint(loaded)
