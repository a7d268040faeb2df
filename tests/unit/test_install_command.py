"""The command line of `katapy install`, on a host that is a directory: what it prints, and what it refuses."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from katapy.cli.install import install
from katapy.errors import AlreadyExists, NotFound, PermissionDenied

SOURCE = Path(__file__).parents[2]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with katapy in /usr/local/bin, and us as its root."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    programs = tmp_path / "usr/local/bin"
    programs.mkdir(parents=True)
    for name in ("katapy", "containerd-shim-katapy-v2"):
        (programs / name).touch(0o755)
    return tmp_path


def run(root: Path, *options: str | Path) -> Result:
    return CliRunner().invoke(install, [*map(str, options), "--root", str(root)])


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in (root / "etc").rglob("*") if path.is_file()}


def test_what_is_said(root: Path) -> None:
    """What was changed, where the old one is, and what has to be restarted."""
    config = root / "etc/docker/daemon.json"
    assert run(root, "--docker").output == f"docker: {config} written\ndocker: restart docker: service docker restart\n"
    assert run(root, "--docker").output == "docker: nothing to do: it has the runtime katapy\n"
    changed = f"docker: {config} changed, before: {config}.katapy-1.bak\n"
    assert run(root, "--docker", "--name", "vm").output.startswith(changed)
    run(root, "--docker", "--name", "vm", "--uninstall")
    assert run(root, "--docker", "--uninstall").output.startswith(f"docker: {config} removed, before: ")
    nothing = "docker: nothing to do: it has nothing of katapy that katapy install wrote\n"
    assert run(root, "--docker", "--uninstall").output == nothing


def test_a_plugin_that_is_disabled(root: Path) -> None:
    """As docker's package of containerd has it: what is written is right, and will not be read."""
    config = root / "etc/containerd/config.toml"
    config.parent.mkdir(parents=True)
    config.write_text('disabled_plugins = ["cri"]\n')
    done = run(root, "--containerd")
    assert done.exit_code == 0
    assert "katapy: warning: disabled_plugins in /etc/containerd/config.toml has the CRI plugin" in done.output
    config.write_text("disabled_plugins = ['io.containerd.snapshotter.v1.aufs']\n")
    assert "warning" not in run(root, "--containerd").output


def test_a_dry_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes nothing, for which one need not be root."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    done = run(root, "--containerd", "--crio", "--docker", "--podman", "--dry-run")
    assert done.exit_code == 0
    assert re.findall(rf"^\+\+\+ {root}/(\S+)$", done.output, re.MULTILINE) == [
        "etc/containerd/config.toml",
        "etc/crio/crio.conf.d/10-katapy.conf",
        "etc/docker/daemon.json",
        "etc/containers/containers.conf.d/katapy.conf",
    ]
    assert not (root / "etc").exists()
    assert isinstance(run(root, "--docker").exception, PermissionDenied)


def test_all_or_none(root: Path) -> None:
    """What is refused for one engine is found before any has been changed."""
    config = root / "etc/docker/daemon.json"
    config.parent.mkdir(parents=True)
    config.write_text('{"runtimes": {"katapy": {"path": "/usr/bin/other"}}}')
    assert isinstance(run(root, "--containerd", "--docker", "--podman").exception, AlreadyExists)
    assert files(root) == {"etc/docker/daemon.json"}


def test_another_file_and_other_programs(root: Path) -> None:
    (root / "opt/bin").mkdir(parents=True)
    for name in ("katapy", "containerd-shim-katapy-v2"):
        (root / "usr/local/bin" / name).rename(root / "opt/bin" / name)
    assert isinstance(run(root, "--podman").exception, NotFound)
    assert run(root, "--podman", "--programs", "/opt/bin", "--config", "/etc/own.conf").exit_code == 0
    assert files(root) == {"etc/own.conf"}
    assert '"/opt/bin/katapy"' in (root / "etc/own.conf").read_text()
    # Where they are does not matter to what takes them out.
    assert run(root, "--podman", "--config", "/etc/own.conf", "--uninstall").exit_code == 0
    assert files(root) == set()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "name an engine: --containerd, --crio, --docker, --podman"),
        (("--docker", "--podman", "--config", "/etc/x"), "--config is the file of one engine"),
        (("--docker", "--name", 'a"b'), "is not a name"),
        (("--docker", "--name", "-a"), "is not a name"),
        (("--docker", "--name", "a" * 64), "is not a name"),
        (("--docker", "--programs", '/a"b'), "is not a path that can be written down"),
        (("--docker", "--programs", "/a\nb"), "is not a path that can be written down"),
    ],
)
def test_wrong_usage(root: Path, options: tuple[str, ...], words: str) -> None:
    done = run(root, *options)
    assert done.exit_code == 2
    assert words in done.output
    assert not (root / "etc").exists()


def test_the_pages_commands() -> None:
    """Whatever they tell one to type is understood."""
    pages = [SOURCE / "README.md", *(SOURCE / "docs").glob("*.md")]
    typed = [found for page in pages for found in re.findall(r"katapy install (--[a-z]+)(?=[`\n ])", page.read_text())]
    assert {"--containerd", "--crio", "--docker", "--podman"} <= set(typed)
    for options in typed:
        install.make_context("install", [options])
