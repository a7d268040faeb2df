"""Bad input through the command line: one line that names what is wrong, the right status, nothing left behind."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import KATAPY, Katapy, MakeBundle


def _one_line(done: subprocess.CompletedProcess[bytes], expected: str, status: int = 1) -> None:
    error = done.stderr.decode()
    assert done.returncode == status, error
    assert expected in error
    assert error.startswith("katapy: ")
    assert error.count("\n") == 1, error
    assert len(error) < 2000


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"ociVersion": "1.2.0", ', "config.json"),
        (b'{"ociVersion": NaN}', "NaN"),
        (b'{"ociVersion": "1.0.0", "ociVersion": "1.2.0"}', "duplicate key"),
        (b'{"ociVersion": "\xff\xfe"}', "UTF-8"),
        ('{"ociVersion": "1.0.0"}'.encode("utf-16"), "UTF-8"),
        (b"[" * 200_000 + b"]" * 200_000, "nested"),
        (b" " * 100_000_000, "larger"),
        (b"[]", "object"),
        (b"", "config.json"),
    ],
)
def test_bad_json(katapy: Katapy, bundle: MakeBundle, content: bytes, expected: str) -> None:
    directory = bundle(["true"])
    (directory / "config.json").write_bytes(content)
    _one_line(katapy("run", "--bundle", directory, "c1"), expected)


def _set(*path: str | int, value: object) -> Callable[[dict[str, Any]], None]:
    def edit(spec: Any) -> None:
        for key in path[:-1]:
            spec = spec[key]
        spec[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (_set("ociVersion", value="2.0.0"), "ociVersion"),
        (_set("root", "path", value="nowhere"), "nowhere"),
        (_set("root", "path", value="../outside"), "root.path"),
        (_set("process", "args", value=[]), "process.args"),
        (_set("process", "args", value=["a", 1]), "process.args[1]"),
        (_set("process", "cwd", value="relative"), "process.cwd"),
        (_set("process", "user", "uid", value=True), "process.user.uid"),
        (_set("process", "apparmorProfile", value="strict"), "apparmorProfile"),
        (_set("mounts", value=[{"destination": "/x", "type": "nonsense", "source": "x"}]), "nonsense"),
        (_set("mounts", value=[{"destination": "a/../../b", "type": "tmpfs"}]), "destination"),
        (_set("linux", "sysctl", value={"kernel.core_pattern": "|/bin/sh"}), "kernel.core_pattern"),
        (_set("linux", "namespaces", value=[{"type": "galaxy"}]), "galaxy"),
        (_set("hooks", value={"poststop": [{"path": "bin/true"}]}), "hooks"),
    ],
)
def test_bad_configuration(katapy: Katapy, bundle: MakeBundle, edit: Any, expected: str) -> None:
    _one_line(katapy("run", "--bundle", bundle(["true"], edit=edit), "c1"), expected)


@pytest.mark.parametrize("name", ["a/b", "..", ".", "", "a\nb", "ab\n", "x" * 5000, "\uff41", "a b", "-"[:0] + "~x"])
def test_bad_id(katapy: Katapy, bundle: MakeBundle, name: str) -> None:
    _one_line(katapy("run", "--bundle", bundle(["true"]), "--", name), "container id")


def test_no_bundle(katapy: Katapy, tmp_path: Path) -> None:
    _one_line(katapy("run", "--bundle", tmp_path / "none", "c1"), "no such directory")
    (tmp_path / "empty").mkdir()
    _one_line(katapy("run", "--bundle", tmp_path / "empty", "c1"), "config.json: no such file")


def test_config_json_that_is_a_fifo(katapy: Katapy, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    _one_line(katapy("run", "--bundle", tmp_path, "c1"), "not a regular file")


def test_usage(katapy: Katapy) -> None:
    for args in (["run"], ["nonsense"], ["run", "--bu", "x", "c1"], ["kill"], ["--nonsense"]):
        done = katapy(*args)
        assert done.returncode == 2, args
        assert b"Usage:" in done.stderr


def test_wrong_signal(katapy: Katapy) -> None:
    _one_line(katapy("kill", "c1", "NONSENSE"), "NONSENSE")
    _one_line(katapy("kill", "c1", "9999"), "9999")


def test_not_root(bundle: MakeBundle) -> None:
    """Any user gets one clear line; the interpreter may be readable by root only here, so a first call loads all."""
    script = """
import os, shutil, sys
from katapy import cli
from katapy.errors import NotFound
try:
    cli.cli(["--help"], standalone_mode=False)
    cli.cli(["run", "--bundle", "/nonexistent", "c1"], standalone_mode=False)
except NotFound:
    os.setuid(65534)
    cli.main()
"""
    argv = [str(KATAPY.with_name("python")), "-c", script, "run", "--bundle", str(bundle(["true"])), "c1"]
    _one_line(subprocess.run(argv, capture_output=True, timeout=60), "must run as root")


def test_bad_kernel_file(katapy: Katapy, bundle: MakeBundle, tmp_path: Path) -> None:
    """A configuration that others can write is not believed, and one with a mistake is named with the key."""
    config = tmp_path / "katapy.toml"
    config.write_text('[hypervisor]\nkernal = "x"\n')
    config.chmod(0o600)
    _one_line(katapy("--config", config, "run", "--bundle", bundle(["true"]), "c1"), "kernal")
    config.write_text("")
    config.chmod(0o666)
    _one_line(katapy("--config", config, "run", "--bundle", bundle(["true"]), "c1"), "katapy.toml")
