"""`katapy state` and `list` are quick: what they import; and their short way says what the command line says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import click.testing
import pytest

from katapy.cli import Settings, cli
from katapy.entry import quick_answer
from katapy.state import State, StateDir, Status

# Each costs milliseconds, and none is needed to read a file.
HEAVY = {
    *("asyncio", "click", "concurrent", "ctypes", "dataclasses", "google.protobuf", "grpc", "inspect", "logging"),
    *("pathlib", "qemu", "socket", "ssl", "subprocess", "tempfile", "threading", "tomllib", "urllib"),
    *("katapy.cli", "katapy.client", "katapy.config", "katapy.oci", "katapy.run", "katapy.shim", "katapy.sandbox"),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("c1", "c2"):
        state = State(name, "/b", "/b/rootfs", name, Status.CREATED, f"2026-01-02T03:04:05.{name[1]:>09}Z", "1.2.0", 0)
        StateDir.create(str(tmp_path / "root"), state).close()
    return tmp_path / "root"


def answer(*arguments: str) -> str | None:
    return quick_answer(arguments)


def command_line(*arguments: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(cli, arguments)


@pytest.mark.parametrize("arguments", [["state", "c1"], ["list"], ["list", "--format", "json"], ["list", "-q"]])
def test_what_is_not_imported(root: Path, arguments: list[str]) -> None:
    script = "import sys; from katapy.entry import main; main(); sys.stderr.write('\\n'.join(sys.modules))"
    options = ["--root", str(root), "--log", str(root / "log"), "--log-format", "json", "--systemd-cgroup"]
    argv = [sys.executable, "-c", script, *options, *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    assert "c1" in done.stdout
    assert HEAVY & set(done.stderr.splitlines()) == set()
    assert (root / "log").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["state", "c1"],
        ["list"],
        ["list", "-q"],
        ["list", "--quiet"],
        ["list", "-f", "table"],
        ["list", "-f", "json"],
        ["list", "--format", "table"],
        ["list", "--format", "json"],
    ],
)
@pytest.mark.parametrize(
    "options",
    [[], ["--systemd-cgroup"], ["--rootless", "false", "--log-format=json"], ["--config", "of-no-matter"]],
)
def test_the_short_way_says_the_same(root: Path, arguments: list[str], options: list[str]) -> None:
    for own in (["--root", str(root)], [f"--root={root}"]):
        text = answer(*own, *options, *arguments)
        assert text
        assert text == command_line(*own, *options, *arguments).stdout


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--help"],
        ["state"],
        ["state", "--help"],
        ["state", "c1", "c2"],
        ["state", "nonesuch"],
        ["state", "--", "c1"],
        ["state", "../root/c1"],
        ["state", "a\0b"],
        ["list", "c1"],
        ["list", "--format"],
        ["list", "--format", "yaml"],
        ["list", "-qf", "json"],
        ["kill", "c1"],
        ["--debug", "state", "c1"],
        ["--rootless", "true", "state", "c1"],
        ["--log-format", "xml", "state", "c1"],
        ["--log", "/nonesuch/log", "state", "c1"],
        ["--nonsense", "state", "c1"],
        ["--systemd-cgroup=1", "state", "c1"],
        ["--root"],
        ["--root=", "state", "c1"],
    ],
)
def test_all_else_is_the_command_lines(root: Path, arguments: list[str]) -> None:
    assert answer("--root", str(root), *arguments) is None


def test_damage_is_told_by_the_command_line(root: Path) -> None:
    (root / "c2/state.json").write_text("{")
    assert answer("--root", str(root), "list") is None
    done = command_line("--root", str(root), "list", "-q")
    assert done.stdout == "c1\n"
    assert "state of c2 is damaged" in done.stderr


def test_a_reader_that_has_left(root: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    argv = [str(Path(sys.executable).with_name("katapy")), "--root", str(root), "list"]
    done = subprocess.run(argv, stdout=writing, stderr=subprocess.PIPE, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("given", [True, False])
def test_systemd_cgroup_is_kept_for_the_verbs(root: Path, given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def state_text(*_: str) -> str:
        seen.append(click.get_current_context().find_object(Settings).systemd_cgroup)  # type: ignore[union-attr]
        return ""

    monkeypatch.setattr("katapy.cli.inspect.state_text", state_text)
    command_line(*(["--systemd-cgroup"] if given else []), "state", "c1")
    assert seen == [given]


@pytest.mark.parametrize(
    ("words", "offered"),
    [("katapy fea", "features"), ("katapy --sys", "--systemd-cgroup"), ("katapy --ro", "--rootless")],
)
def test_completion(words: str, offered: str) -> None:
    environment = {**os.environ, "_KATAPY_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": "1"}
    argv = [str(Path(sys.executable).with_name("katapy"))]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)
    assert f"plain,{offered}" in done.stdout.splitlines()
