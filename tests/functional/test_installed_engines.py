"""Engines that `katapy install` has configured: they run a container with katapy, and all else as before.

Docker's tests run on what it wrote, too: docker_daemon.py.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cri as cri_client
import grpc
import pytest
from containerd_daemon import CONTAINERD, IMAGE, SHIM
from cri import SLEEP, Cri, load_messages, start_plugin
from engine import CONMON_SECONDS, Engine
from harness import BOOT_ID, KATAPY, await_ends, descendants, make_busybox

# No runtime is in it: katapy is to come, and runc, which is there by default, is not to go.
CONTAINERD_CONFIG = """
version = 2
root = "{directory}/root"
state = "{directory}/state"
[grpc]
address = "{directory}/containerd.sock"
[debug]
level = "debug"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "localhost/pause:test"
restrict_oom_score_adj = true
disable_hugetlb_controller = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{directory}/cni"
"""
# That the program is found by what was written, and not in somebody's PATH.
WRAPPER = """#!/bin/sh
echo >> {mark}
exec {program} "$@"
"""


class Pods(NamedTuple):
    """A client of the daemon, and the file that appears when the shim that was named is called."""

    client: Cri
    called: Path


def install(*options: str | Path) -> str:
    """Run `katapy install` and return what it prints."""
    done = subprocess.run([KATAPY, "install", *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wrap(directory: Path) -> Path:
    """Put katapy's programs into a directory, and return the file that appears when the shim is called."""
    directory.mkdir()
    (directory / KATAPY.name).symlink_to(KATAPY)
    (directory / SHIM.name).write_text(WRAPPER.format(mark=directory / "called", program=SHIM))
    (directory / SHIM.name).chmod(0o755)
    return directory / "called"


@pytest.fixture(scope="module")
def pods(busybox: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pods]:
    """A daemon that has katapy by its installation, under the name of ``vm``."""
    if not CONTAINERD.exists():
        pytest.skip("containerd is not installed")
    directory = tmp_path_factory.mktemp("containerd")
    config, called = directory / "config.toml", wrap(directory / "programs")
    config.write_text(CONTAINERD_CONFIG)
    options = ("--containerd", "--config", config, "--name", "vm")
    assert "restart containerd" in install(*options, "--programs", called.parent)
    assert "nothing to do" in install(*options, "--programs", called.parent)
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="katapy-") as name,
        grpc.insecure_channel(f"unix://{name}/containerd.sock") as channel,
    ):
        patch.setattr(cri_client, "CONFIG", config.read_text())
        with start_plugin(Path(name), busybox):
            yield Pods(Cri(channel, load_messages(directory), IMAGE), called)
    install(*options, "--uninstall")
    assert config.read_text() == CONTAINERD_CONFIG


def test_containerd(pods: Pods, host: None, tmp_path: Path) -> None:
    """A pod by katapy's handler, and one by containerd's default, which stays runc."""
    boots = {handler: boot_id(pods.client, handler, tmp_path) for handler in ("vm", "")}
    assert boots[""] == BOOT_ID.read_text().strip() != boots["vm"]
    assert pods.called.exists()


def boot_id(client: Cri, handler: str, logs: Path) -> str:
    """Return that of the kernel that a pod of the handler runs on."""
    config = client.pod_config(f"p-{handler}", logs)
    sandbox = client.run_pod(config, handler)
    try:
        container = client.start(sandbox, config, "c1", *SLEEP)
        return client.execute(container, "cat", str(BOOT_ID))[1].strip()
    finally:
        client.pod("StopPodSandbox", sandbox)
        client.pod("RemovePodSandbox", sandbox)


@pytest.mark.skipif(not CONTAINERD.exists(), reason="containerd is not installed")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("version = 2\nroot = 3\n", "containerd refuses "),
        ('version = 2\nimports = ["more/*.toml"]\n', "a file that it imports has a section of the CRI plugin"),
    ],
)
def test_what_containerd_itself_would_not_take(tmp_path: Path, text: str, words: str) -> None:
    """Parsed as TOML it is without fault. Before version 2 the last file's section of a plugin is the only one."""
    config = tmp_path / "config.toml"
    config.write_text(text)
    (tmp_path / "more").mkdir()
    (tmp_path / "more/cni.toml").write_text('version = 2\n[plugins."io.containerd.grpc.v1.cri".cni]\nbin_dir = "/x"\n')
    done = subprocess.run([KATAPY, "install", "--containerd", "--config", config], capture_output=True, text=True)
    assert done.returncode == 1
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert config.read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml", "more"]


@pytest.mark.skipif(not CONTAINERD.exists(), reason="containerd is not installed")
@pytest.mark.parametrize("text", ["root = '/data'\n", "", None])
def test_containerd_reads_what_was_written(tmp_path: Path, text: str | None) -> None:
    """Also of the first version of its files, and where there was none."""
    config = tmp_path / "config.toml"
    if text is not None:
        config.write_text(text)
    install("--containerd", "--config", config)
    dump = subprocess.check_output([CONTAINERD, "--config", config, "config", "dump"], text=True)
    runtimes = tomllib.loads(dump)["plugins"]["io.containerd.grpc.v1.cri"]["containerd"]["runtimes"]
    assert set(runtimes) == {"katapy", "runc"}
    assert runtimes["katapy"]["runtime_type"] == str(SHIM)


@pytest.mark.skipif(not shutil.which("podman"), reason="podman is not installed")
def test_podman(host: None) -> None:
    """As on another host, whose /etc is then put in the place of this one's: podman reads nothing but that."""
    with tempfile.TemporaryDirectory(prefix="katapy-") as name:
        engine, root = Engine.make(Path(name) / "e"), Path(name) / "root"
        make_busybox(Path(engine.rootfs))
        named = f'katapy = ["{engine.directory}/katapy"]\n'
        etc = shutil.copytree("/etc/containers", root / "etc/containers")
        text = (engine.directory / "containers.conf").read_text()
        assert named in text
        (etc / "containers.conf").write_text(text.replace(named, ""))
        programs = root / engine.directory.relative_to("/")
        programs.mkdir(parents=True)
        for program in (KATAPY, SHIM):
            shutil.copy(program, programs)
        install("--podman", "--root", root, "--programs", engine.directory)
        place = 'mount --bind "$1" /etc/containers && shift && exec env --unset CONTAINERS_CONF podman "$@"'
        podman = ("unshare", "--mount", "sh", "-euc", place, "sh", etc)
        argv = engine.create("run", "--rm", "--rootfs", engine.rootfs, "cat", BOOT_ID)[1:]
        known = descendants()
        try:
            ran = engine(*podman, *argv).out.strip()
        finally:
            # conmon is in it for a while longer.
            await_ends(known, CONMON_SECONDS)
            engine.remove_cgroup()
        assert len(ran) == 36
        assert ran != BOOT_ID.read_text().strip()
        install("--podman", "--root", root, "--uninstall")
        assert "not found" in engine(*podman, *argv, check=False).err
