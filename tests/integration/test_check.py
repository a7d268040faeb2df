"""`katapy check` on hosts where no container could run: it says so, and what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from katapy.run import SETPRIV

KATAPY = Path(sys.executable).with_name("katapy")


def _check(*options: str | Path, prefix: tuple[str, ...] = ()) -> dict[str, tuple[bool | None, str]]:
    """Return what was found, by its name: whether it is good, and the text."""
    argv = [*prefix, KATAPY, *options, "check", "--format", "json"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.stderr == ""
    findings = {one["name"]: (one["ok"], one["detail"]) for one in json.loads(done.stdout)}
    assert done.returncode == (1 if any(ok is False for ok, _ in findings.values()) else 0)
    return findings


@pytest.mark.root
def test_a_mount_namespace_can_be_made() -> None:
    assert _check()["mounts"] == (True, "a mount namespace of its own")


@pytest.mark.root
def test_a_container_without_privileges_is_told() -> None:
    """All was well in one, and the first run failed."""
    findings = _check(prefix=(SETPRIV, "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", "--"))
    ok, detail = findings["mounts"]
    assert findings["user"] == (True, "root")
    assert not ok
    assert "CAP_SYS_ADMIN" in detail
    assert "privileged" in detail


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        ("#!/bin/sh\n", 0o644, "permission denied"),
        ("#!/bin/sh\n", 0o755, "has no version"),
        ("no program\n", 0o755, "exec format error"),
        (None, 0, "is missing; apt-get install qemu-system-x86"),
    ],
)
def test_a_qemu_that_cannot_be_run_is_named(tmp_path: Path, text: str | None, mode: int, words: str) -> None:
    """All but the last ended the whole check as an internal error."""
    qemu, config = tmp_path / "qemu", tmp_path / "katapy.toml"
    if text is not None:
        qemu.write_text(text)
        qemu.chmod(mode)
    config.write_text(f'[hypervisor]\nqemu = "{qemu}"\n')
    ok, detail = _check("--config", config)["qemu"]
    assert not ok
    assert str(qemu) in detail
    assert words in detail


@pytest.mark.root
@pytest.mark.parametrize("model", ["tcfilter", "macvtap"])
def test_a_network_is_tried(tmp_path: Path, model: str) -> None:
    config = tmp_path / "katapy.toml"
    config.write_text(f'[network]\nmodel = "{model}"\nvhost = false\n')
    assert _check("--config", config)["network"] == (True, f"{model}, packets are moved in QEMU")


@pytest.mark.root
def test_a_host_without_taps_is_told() -> None:
    """Containers run there all the same, without a network."""
    hide = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev/net && exec "$@"', "sh")
    ok, detail = _check(prefix=hide)["network"]
    assert ok
    assert detail.startswith("none, and pods that have one are refused: ")
    assert "cannot open /dev/net/tun: No such file or directory; modprobe tun" in detail


@pytest.mark.root
def test_a_port_forward_is_tried(tmp_path: Path) -> None:
    assert _check()["port-forward"] == (True, "the loopback of a pod's network namespace leads to its guest")
    config = tmp_path / "katapy.toml"
    for text in ('model = "none"', "forward_loopback = false"):
        config.write_text(f"[network]\n{text}\n")
        assert _check("--config", config)["port-forward"] == (True, f"none: network.{text.split()[0]} says so")


@pytest.mark.root
def test_a_host_that_refuses_bpf_is_told() -> None:
    """Containers run there all the same."""
    refused = (sys.executable, str(Path(__file__).with_name("without_bpf.py")))
    ok, detail = _check(prefix=refused)["port-forward"]
    assert ok
    assert detail.startswith("none, a pod's loopback on the host is not its guest's: ")
    assert detail.endswith("cannot make a BPF map of sockets: operation not permitted")


@pytest.mark.root
def test_engines_are_looked_at(tmp_path: Path) -> None:
    """Those that are there, and whether they have katapy; none has to be there, and what is wrong with one is told."""
    etc, programs = tmp_path / "etc", tmp_path / "bin"
    subprocess.run(["cp", "--archive", "/etc", etc], check=True)
    config = etc / "crio/crio.conf.d/vm.conf"
    config.parent.mkdir(parents=True)
    programs.mkdir()
    program = programs / "crio"
    program.write_text("#!/bin/sh\necho crio version 1.35.0\n")
    program.chmod(0o755)
    script = f'mount --bind {etc} /etc && mount --bind {programs} /usr/local/sbin && exec "$@"'
    here = ("unshare", "--mount", "sh", "-euc", script, "sh")
    assert _check(prefix=here)["crio"] == (None, "1.35.0, katapy is not set up: katapy install --crio")
    config.write_text('[crio.runtime.runtimes.vm]\nruntime_path = "/opt/bin/containerd-shim-katapy-v2"\n')
    assert _check(prefix=here)["crio"] == (True, "1.35.0, has katapy as vm")
    config.write_text("[crio\n")
    ok, detail = _check(prefix=here)["crio"]
    assert ok is None
    assert detail.startswith(
        "1.35.0, has a configuration that cannot be read: /etc/crio/crio.conf.d/vm.conf is not TOML: "
    )
    program.unlink()
    assert _check(prefix=here)["crio"] == (None, "not installed")
