"""`katapy sandbox`: streams, exit statuses, the verdict in each of its forms, and the pool of `--serve`."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from harness import DEADLINE, Katapy, await_true
from oci_images import Layout, directory, member, symlink

from katapy import Sandbox
from katapy.errors import OutcomeUnknown

pytestmark = [pytest.mark.root, pytest.mark.vm]


def test_a_command(katapy: Katapy) -> None:
    """Streams are its own, and so is the exit status."""
    done = katapy("sandbox", "--", "sh", "-c", "cat; echo to stderr >&2; exit 3", stdin=b"from stdin\n")
    assert (done.returncode, done.stdout) == (3, b"from stdin\n")
    assert done.stderr.splitlines()[-1] == b"to stderr"


def test_the_default_root_has_python(katapy: Katapy) -> None:
    done = katapy("sandbox", "--", "python3", "-c", "print(6 * 7)", check=True)
    assert done.stdout == b"42\n"


def test_json_and_meta(katapy: Katapy, tmp_path: Path) -> None:
    """One object with all of it; a limit is named."""
    meta, case = tmp_path / "meta", tmp_path / "case"
    case.write_bytes(b"1 2\n")
    arguments = ("--stdin", case, "--meta", meta, "--wall-time", "8", "--json")
    done = katapy("sandbox", *arguments, "--", "sh", "-c", "read -r a b; echo $((a + b)); exec sleep 1000")
    assert done.returncode == 137
    found = json.loads(done.stdout)
    assert (found["stdout"], found["stderr"], found["truncated"]) == ("3\n", "", False)
    assert (found["killed_by"], found["trusted"], found["exit_code"], found["signal"]) == ("wall", True, None, None)
    assert found["wall_seconds"] >= 8
    lines = dict(line.split(":", 1) for line in meta.read_text().splitlines())
    assert (lines["status"], lines["killed"]) == ("TO", "1")
    assert float(lines["time-wall"]) >= 8


def test_a_limit_is_named_on_stderr(katapy: Katapy) -> None:
    done = katapy("sandbox", "--output", "1000", "--", "cat", "/dev/zero")
    assert done.returncode == 137
    assert done.stdout == bytes(1000)
    assert done.stderr.splitlines()[-1] == b"katapy: the command was ended: output"


def test_shared_paths(katapy: Katapy, tmp_path: Path) -> None:
    """What is shared read-only cannot be written to; what is written elsewhere is gone."""
    read, write = tmp_path / "a:b", tmp_path / "rw"
    for each in (read, write):
        each.mkdir()
    (read / "in").write_text("in\n")
    script = "cat /in/in > /out/copy; touch /in/x || echo refused; touch /etc/y && echo written"
    done = katapy("sandbox", "--ro", f"{read}:/in", "--rw", f"{write}:/out", "--", "sh", "-c", script, check=True)
    assert done.stdout == b"refused\nwritten\n"
    assert (write / "copy").read_text() == "in\n"
    assert [path.name for path in read.iterdir()] == ["in"]


def test_a_bundle_and_a_directory(katapy: Katapy, busybox: Path, tmp_path: Path) -> None:
    """A bundle's own process runs, with its environment; a directory is the root of whatever is run."""
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    katapy("spec", "--bundle", bundle, check=True)
    document = json.loads((bundle / "config.json").read_text())
    document["root"]["path"] = str(busybox)
    document["process"] |= {"args": ["sh", "-c", "echo $WORD in $PWD"], "cwd": "/etc", "terminal": False}
    document["process"]["env"].append("WORD=hello")
    (bundle / "config.json").write_text(json.dumps(document))
    assert katapy("sandbox", "--bundle", bundle, check=True).stdout == b"hello in /etc\n"
    before = sorted(busybox.rglob("*"))
    done = katapy("sandbox", "--rootfs", busybox, "--", "sh", "-c", "echo x > /x; ls /x", check=True)
    assert done.stdout == b"/x\n"
    assert sorted(busybox.rglob("*")) == before


def test_an_image(katapy: Katapy, tmp_path: Path) -> None:
    """Its command, environment, directory and user are the defaults; it is unpacked once, and nobody changes it."""
    layout = Layout(tmp_path / "layout")
    layout.add_image(
        [
            *(directory(name) for name in ("bin", "etc", "srv", "proc", "dev", "sys", "tmp")),
            member("bin/busybox", Path("/bin/busybox").read_bytes(), mode=0o755),
            *(symlink(f"bin/{name}", "busybox") for name in ("sh", "id", "cat", "touch")),
            member("etc/passwd", b"root:x:0:0::/:/bin/sh\napp:x:1000:1001::/:/bin/sh\n"),
        ],
        tag="v1",
        config={"config": {"Entrypoint": ["sh", "-c"], "Cmd": ["id -u; id -g; pwd; echo $A"], "WorkingDir": "/srv",
                           "Env": ["A=1", "PATH=/bin"], "User": "app"}},
    )  # fmt: skip
    config = tmp_path / "katapy.toml"
    config.write_text(f'[runtime]\ndata_dir = "{tmp_path}/data"\n')
    for name in ("image", "kernel", "templates"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).symlink_to(f"/var/lib/katapy/{name}")
    katapy.options = ("--config", str(config))
    for path in (layout.path, layout.archive(tmp_path / "archive.tar")):
        assert katapy("sandbox", "--image", f"{path}:v1", check=True).stdout == b"1000\n1001\n/srv\n1\n"
    assert len([each for each in (tmp_path / "data/roots").iterdir() if each.is_dir()]) == 1
    done = katapy("sandbox", "--image", f"{layout.path}:v2")
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"v2" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--memory", "much", "--", "true"), b"memory: "),
        (("--cpus", "0", "--", "true"), b"cpus: 0.0 is not a number from 0.05 to 64"),
        (("--disk", "1", "--", "true"), b"disk: 1 is not between"),
        (("--wall-time", "-1", "--", "true"), b"timeout: -1.0 is not a number of seconds above 0"),
        (("--ro", "/etc", "--", "true"), b"'/etc' is not HOST:GUEST"),
        (("--user", "root", "--", "true"), b"user: 'root' is not uid[:gid] in numbers"),
        (("--rootfs", "/nonexistent", "--", "true"), b"rootfs: /nonexistent is no directory"),
        (("--rootfs", "/", "--bundle", "/", "--", "true"), b"rootfs, bundle and image exclude one another"),
        (("--env", "A", "--", "true"), b"--env 'A' is not KEY=VALUE"),
        (("--net", "none-such", "--", "true"), b"/run/netns/none-such"),
        (("--serve", "1", "--", "true"), b"--serve and a command exclude one another"),
        (("--tty", "--", "true"), b"standard input is not a terminal"),
    ],
)
def test_bad_arguments(katapy: Katapy, arguments: tuple[str, ...], words: bytes) -> None:
    """One clear error, and nothing is started."""
    done = katapy("sandbox", *arguments)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(b"katapy: ")
    assert words in line


def test_no_such_command(katapy: Katapy) -> None:
    done = katapy("sandbox", "--", "no-such-program")
    assert done.returncode == 127
    assert b"executable file not found in $PATH" in done.stderr


def test_a_terminal(katapy: Katapy) -> None:
    """Keys go to the command, and what it prints is as on a terminal; the window's size is the caller's."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        ["/bin/sh", "-c", 'stty rows 33 columns 101; exec "$@"', "sh", *katapy.argv("sandbox", "-t", "--", "sh")],
        stdin=slave,
        stdout=slave,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        os.close(slave)
        os.write(master, b"tty; stty size; exit 5\r")
        seen = bytearray()
        while select.select([master], [], [], DEADLINE)[0]:
            try:
                seen += os.read(master, 4096)
            except OSError:
                break
        assert process.wait(DEADLINE) == 5
    os.close(master)
    assert b"/dev/pts/0" in seen
    assert b"33 101" in seen


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_command_ends_with_katapy(katapy: Katapy, number: int) -> None:
    """Whatever ends it, nothing is left: the fixture looks."""
    process = katapy.start("sandbox", "--", "sh", "-c", "echo here; exec sleep 1000", stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        process.send_signal(number)
        assert process.wait(DEADLINE) == (-9 if number == signal.SIGKILL else 128 + number)
    await_true(lambda: list(katapy.root.glob("*sandbox*")) == [])


@contextmanager
def serving(katapy: Katapy, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a pool while the context lasts."""
    with katapy.start("sandbox", "--serve", "1", *options, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert b"ready" in process.stdout.readline()
            yield process
        finally:
            process.terminate()
            process.wait(DEADLINE)


def test_a_pool(katapy: Katapy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sandbox of it is used once, by one that is like it; another takes its place.

    The environment names the configuration, which the command line and a caller of the SDK do not say alike.
    """
    if "KATAPY_CONFIG" not in os.environ:
        config = tmp_path / "katapy.toml"
        config.touch(0o600)
        monkeypatch.setenv("KATAPY_CONFIG", str(config))
    with serving(katapy, "--memory", "128M") as process:
        waiting = {path.name for path in katapy.root.glob("sandbox-*")}
        with Sandbox(state_dir=katapy.root, memory="128M", env={"WORD": "mine"}) as first:
            assert {first.id} == waiting
            assert first.run(["sh", "-c", "echo $WORD > /left; cat /left"]).stdout == "mine\n"
            # None is like that.
            with Sandbox(state_dir=katapy.root, memory="64M") as other:
                assert other.run(["ls", "/left"]).exit_code == 1
            first_id = first.id
        assert not (katapy.root / first_id).exists()
        done = katapy("sandbox", "--memory", "128M", "--", "ls", "/left")
        assert done.returncode == 1
        process.terminate()
        assert process.wait(DEADLINE) == 0
    assert list(katapy.root.glob("*sandbox*")) == []


def statuses(katapy: Katapy) -> list[str]:
    """Return the status of each sandbox, and of what runs in one; of what goes meanwhile it is empty."""
    answers = [katapy("state", path.name) for path in katapy.root.glob("sandbox-*")]
    return [json.loads(done.stdout)["status"] if done.returncode == 0 else "" for done in answers]


def test_a_pool_that_is_killed(katapy: Katapy) -> None:
    """Its sandboxes end with it, the ones in use too; a sandbox can be had without it."""
    with serving(katapy) as process, Sandbox(state_dir=katapy.root) as sandbox:
        running = sandbox.start(["sleep", "1000"])
        # Another one takes its place.
        two = ["running", "running"]
        await_true(lambda: statuses(katapy) == two)
        process.kill()
        process.wait(DEADLINE)
        # Its shim ends it when it sees that; what comes first is not ours to say.
        with suppress(OutcomeUnknown):
            assert running.wait(DEADLINE).exit_code is None
    with Sandbox(state_dir=katapy.root) as sandbox:
        assert sandbox.run(["echo", "alone"]).stdout == "alone\n"
    await_true(lambda: list(katapy.root.glob("*sandbox*")) == [])
    # A socket of the dead one is there, and in nobody's way.
    with serving(katapy):
        pass


def test_two_pools(katapy: Katapy) -> None:
    with serving(katapy):
        done = katapy("sandbox", "--serve", "1")
        assert done.returncode == 1
        assert b"another pool serves" in done.stderr
