"""The decision between KVM and TCG: the cheap signs, the verdict on a timed guest, the memory of it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import click.testing
import pytest

from katapy.cli import cli
from katapy.errors import Unavailable
from katapy.hypervisor.accel import (
    Acceleration,
    Kind,
    find_obstacle,
    judge,
    parse_answer,
    recall,
    remember,
    require,
)

BOOT = "3a1c0e52-2f5e-4a7e-9a35-0d8f4f6c1b11"
KVM = Acceleration(Kind.KVM, "/dev/kvm works: a test guest took 0.3 ms")
TCG = Acceleration(Kind.TCG, "the CPU shows no hardware virtualization (neither svm nor vmx)")
AMD = "processor\t: 0\nflags\t\t: fpu vme svm lm\nbugs\t\t: none\n"


@dataclass(frozen=True)
class Wanted:
    accel: str = "auto"
    require_kvm: bool = False


@pytest.mark.parametrize(
    ("machine", "cpuinfo", "device", "words"),
    [
        ("aarch64", AMD, "/dev/null", "x86-64 only"),
        ("x86_64", "flags\t\t: fpu vme lm\n", "/dev/null", "neither svm nor vmx"),
        ("x86_64", "", "/dev/null", "neither svm nor vmx"),
        # A word that only contains the flag's name, and the flag in another line, are no flag.
        ("x86_64", "flags\t\t: svm_lock\nvmx flags\t: vmx vnmi\n", "/dev/null", "neither svm nor vmx"),
        ("x86_64", AMD, "/nonexistent/kvm", "cannot be opened: no such file"),
        ("x86_64", AMD, "/dev/null", "not a KVM device"),
    ],
)
def test_each_obstacle_is_named(machine: str, cpuinfo: str, device: str, words: str) -> None:
    assert words in (find_obstacle(machine, cpuinfo, Path(device)) or "")


@pytest.mark.parametrize(
    ("seconds", "kind"), [(0.0004, Kind.KVM), (0.019, Kind.KVM), (0.113, Kind.TCG), (None, Kind.TCG)]
)
def test_a_paravirtual_kvm_is_told_by_its_speed(seconds: float | None, kind: Kind) -> None:
    assert judge(seconds).kind is kind


def test_the_probes_answer_is_a_number_or_an_error() -> None:
    assert parse_answer("0.000312") == pytest.approx(0.000312)
    with pytest.raises(Unavailable, match=r"^device or resource busy$"):
        parse_answer("error: device or resource busy")
    with pytest.raises(Unavailable, match="no answer"):
        parse_answer("")


def test_a_verdict_is_remembered_for_this_boot_only(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    assert recall(directory, BOOT) is None
    remember(directory, BOOT, KVM)
    assert recall(directory, BOOT) == KVM
    assert recall(directory, "another boot") is None
    assert [entry.name for entry in directory.iterdir()] == ["~acceleration.json"]


def test_a_remembered_verdict_is_no_container(tmp_path: Path) -> None:
    """It had the name of one: on every host with KVM `katapy list` said that its state could not be opened."""
    remember(tmp_path, BOOT, KVM)
    done = click.testing.CliRunner().invoke(cli, ["--root", str(tmp_path), "list"])
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.split() == ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"7",
        b"[" * 4000,
        json.dumps({"boot_id": BOOT}).encode(),
        json.dumps({"boot_id": BOOT, "kind": "xen", "reason": "x"}).encode(),
        json.dumps({"boot_id": BOOT, "kind": "kvm", "reason": 7}).encode(),
        json.dumps({"boot_id": BOOT, "kind": "kvm", "reason": "x" * 5000}).encode(),
    ],
)
def test_a_corrupt_cache_counts_as_none(tmp_path: Path, text: bytes) -> None:
    remember(tmp_path, BOOT, KVM)
    (tmp_path / "~acceleration.json").write_bytes(text)
    assert recall(tmp_path, BOOT) is None


def test_a_cache_that_others_may_write_counts_as_none(tmp_path: Path) -> None:
    remember(tmp_path, BOOT, KVM)
    (tmp_path / "~acceleration.json").chmod(0o666)
    assert recall(tmp_path, BOOT) is None
    (tmp_path / "~acceleration.json").chmod(0o600)
    tmp_path.chmod(0o777)
    assert recall(tmp_path, BOOT) is None


def test_a_cache_that_is_a_link_or_a_fifo_counts_as_none(tmp_path: Path) -> None:
    remember(tmp_path, BOOT, KVM)
    cache = tmp_path / "~acceleration.json"
    cache.rename(tmp_path / "elsewhere")
    cache.symlink_to("elsewhere")
    assert recall(tmp_path, BOOT) is None
    cache.unlink()
    os.mkfifo(cache, 0o600)
    assert recall(tmp_path, BOOT) is None


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    remember(tmp_path / "file" / "run", BOOT, KVM)
    assert recall(tmp_path / "file" / "run", BOOT) is None


def test_what_the_configuration_wants_is_honoured() -> None:
    assert require(KVM, Wanted()) == KVM
    assert require(TCG, Wanted()) == TCG
    assert require(KVM, Wanted(accel="tcg")).kind is Kind.TCG
    assert require(KVM, Wanted(accel="kvm", require_kvm=True)) == KVM


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        (TCG, Wanted(accel="kvm")),
        (TCG, Wanted(require_kvm=True)),
        (KVM, Wanted(accel="tcg", require_kvm=True)),
    ],
)
def test_no_silent_fall_back_to_emulation(found: Acceleration, wanted: Wanted) -> None:
    with pytest.raises(Unavailable, match="cannot use KVM"):
        require(found, wanted)
