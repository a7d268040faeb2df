"""VMs that are restored from a template: each is its own, and whatever is wrong with a template is made good."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import DEADLINE, Katapy, MakeBundle

from katapy.config import Config

MakeKatapy = Callable[..., Katapy]
FIRST = "make the template"
RESTORED = "plug in the pod's devices"
BOOTED = "boot the guest"


@pytest.fixture
def katapy_with(katapy: Katapy, tmp_path: Path) -> MakeKatapy:
    """Give a command line whose templates are its own: ``katapy_with('templates_max = 1')``."""
    config = Config.load()

    def make(*settings: str) -> Katapy:
        data_dir = tmp_path / "data"
        if not data_dir.exists():
            data_dir.mkdir()
            for name in ("image", "kernel"):
                (data_dir / name).symlink_to(config.runtime.data_dir / name)
        file = tmp_path / "katapy.toml"
        hypervisor = ["[hypervisor]", f'vsock = "{config.hypervisor.vsock}"', *settings]
        runtime = ["[runtime]", f'data_dir = "{data_dir}"', f"boot_timeout = {config.runtime.boot_timeout:g}"]
        file.write_text("\n".join([*hypervisor, *runtime]))
        file.chmod(0o600)
        return Katapy(katapy.root, options=("--config", str(file)))

    return make


def run(katapy: Katapy, bundle: Path, name: str = "c1") -> tuple[str, list[str], str]:
    """Run a container; return what it printed, the phases of its start and what the command said on stderr."""
    report = bundle / f"timing-{name}.json"
    done = katapy("run", "--timing-json", report, "-b", bundle, name, check=True)
    phases = [phase["name"] for phase in json.loads(report.read_text())["phases"]]
    return done.stdout.decode(), phases, done.stderr.decode()


def only(katapy: Katapy) -> dict[str, Any]:
    """Return the only template that there is."""
    (found,) = json.loads(katapy("template", "ls", "--format", "json", check=True).stdout)
    return dict(found)


def test_the_first_start_makes_it_and_the_second_is_restored(katapy_with: MakeKatapy, bundle: MakeBundle) -> None:
    katapy = katapy_with()
    hello = bundle(["echo", "hello"])
    output, phases, _ = run(katapy, hello)
    assert (output, FIRST in phases, RESTORED in phases) == ("hello\n", True, True)
    made = only(katapy)
    output, phases, _ = run(katapy, hello, "c2")
    assert (output, FIRST in phases, RESTORED in phases, BOOTED in phases) == ("hello\n", False, True, False)
    assert only(katapy)["created"] == made["created"]


def test_a_vm_can_be_booted_instead(katapy_with: MakeKatapy, bundle: MakeBundle) -> None:
    katapy = katapy_with("template = false")
    output, phases, _ = run(katapy, bundle(["echo", "hello"]))
    assert (output, BOOTED in phases, RESTORED in phases) == ("hello\n", True, False)
    assert json.loads(katapy("template", "ls", "--format", "json", check=True).stdout) == []


def test_another_shape_is_another_template_and_makes_room(katapy_with: MakeKatapy, bundle: MakeBundle) -> None:
    katapy = katapy_with("templates_max = 1")

    def limited(spec: dict[str, Any]) -> None:
        spec["linux"]["resources"]["memory"] = {"limit": 64 << 20}

    _, phases, _ = run(katapy, bundle(["true"]))
    first = only(katapy)
    output, other_phases, _ = run(katapy, bundle(["free", "-m"], edit=limited))
    assert FIRST in phases
    assert FIRST in other_phases
    assert only(katapy)["key"] != first["key"]
    assert only(katapy)["memory"] == 192 << 20
    assert int(output.split("Mem:")[1].split()[0]) < 192


@pytest.mark.parametrize("name", ["ram", "state"])
def test_a_damaged_template_is_made_anew(katapy_with: MakeKatapy, bundle: MakeBundle, name: str) -> None:
    katapy = katapy_with()
    hello = bundle(["echo", "hello"])
    run(katapy, hello)
    made = only(katapy)
    file = Path(made["path"]) / name
    with file.open("r+b") as damaged:
        damaged.seek(file.stat().st_size // 2)
        byte = damaged.read(1)
        damaged.seek(-1, os.SEEK_CUR)
        damaged.write(bytes([byte[0] ^ 1]))
    told = katapy("template", "verify")
    assert told.returncode == 1
    assert f"is damaged: {name} is not what was saved".encode() in told.stderr
    output, phases, _ = run(katapy, hello)
    assert (output, FIRST in phases, RESTORED in phases) == ("hello\n", True, True)
    assert katapy("template", "verify", check=True).stdout == f"{made['key'][:12]} intact\n".encode()


def test_where_a_restore_fails_the_vm_is_booted(katapy_with: MakeKatapy, bundle: MakeBundle) -> None:
    """A state that QEMU refuses, which nobody can have damaged: its hash is right."""
    katapy = katapy_with()
    hello = bundle(["echo", "hello"])
    run(katapy, hello)
    directory = Path(only(katapy)["path"])
    (directory / "state").write_bytes(b"no state of any device" * 1000)
    facts = json.loads((directory / "template.json").read_text())
    facts["sha256"]["state"] = hashlib.sha256((directory / "state").read_bytes()).hexdigest()
    (directory / "template.json").write_text(json.dumps(facts))
    output, phases, said = run(katapy, hello)
    assert (output, FIRST in phases, BOOTED in phases) == ("hello\n", False, True)
    assert "its template is of no use, booting" in said


def test_two_that_need_it_at_once_make_it_once(katapy_with: MakeKatapy, bundle: MakeBundle, tmp_path: Path) -> None:
    katapy = katapy_with()
    hello = bundle(["echo", "hello"])
    reports = [tmp_path / f"timing{number}" for number in range(3)]
    runs = [
        katapy.start("run", "--timing-json", report, "-b", hello, report.name, stdout=subprocess.PIPE)
        for report in reports
    ]
    for each in runs:
        assert each.communicate(timeout=DEADLINE)[0] == b"hello\n"
    phases = [[phase["name"] for phase in json.loads(report.read_text())["phases"]] for report in reports]
    assert sorted(each.count(FIRST) for each in phases) == [0, 0, 1]
    assert all(RESTORED in each for each in phases)


def test_who_waits_for_a_template_can_be_ended(katapy_with: MakeKatapy, bundle: MakeBundle, tmp_path: Path) -> None:
    """The lock of another maker is waited for in a thread that nothing can interrupt; it must hold up nobody's end."""
    katapy = katapy_with()
    hello = bundle(["echo", "hello"])
    run(katapy, hello)
    key = only(katapy)["key"]
    katapy("template", "rm", "--all", check=True)
    lock = tmp_path / "data/templates" / f"{key}.lock"
    with subprocess.Popen(["flock", "--exclusive", "--no-fork", lock, "sleep", "1000"]) as holder:
        while subprocess.run(["flock", "--nonblock", lock, "true"]).returncode == 0:
            pass
        waiting = katapy.start("run", "-b", hello, "c2", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while katapy("list", "-q").stdout != b"c2\n":
            pass
        katapy("delete", "--force", "c2", check=True, timeout=20)
        waiting.wait(DEADLINE)
        holder.kill()
    output, phases, _ = run(katapy, hello)
    assert (output, FIRST in phases) == ("hello\n", True)


def test_a_maker_that_is_killed_leaves_nothing_in_the_way(katapy_with: MakeKatapy, bundle: MakeBundle) -> None:
    katapy = katapy_with()
    hello = bundle(["echo", "hello"])
    place = Path(str(katapy.options[1])).parent / "data/templates"
    with katapy.start("run", "-b", hello, "c1", stderr=subprocess.DEVNULL) as maker:
        while not list(place.glob(".new-*/console.log")):
            assert maker.poll() is None
        maker.kill()
    katapy("delete", "--force", "c1", check=True)
    output, phases, _ = run(katapy, hello, "c2")
    assert (output, FIRST in phases) == ("hello\n", True)
    assert [path.name for path in place.glob(".*")] == []


@pytest.mark.parametrize("count", [4, pytest.param(20, marks=pytest.mark.soak)])
def test_those_of_one_template_are_nobodys_twin(katapy: Katapy, bundle: MakeBundle, count: int) -> None:
    """Restored from the same memory, and yet each has its own randomness, ids and name, and all have the right time."""

    def with_python(spec: dict[str, Any]) -> None:
        spec["mounts"] += [
            {"destination": name, "type": "bind", "source": name, "options": ["bind", "ro"]}
            for name in ("/usr", "/lib", "/lib64")
        ]

    script = """
import os, random, time, uuid
boot_id = open("/proc/sys/kernel/random/boot_id").read().strip()
print(os.getrandom(16).hex(), uuid.uuid4().hex, random.random(), boot_id,
      open("/proc/sys/kernel/random/uuid").read().strip(), open("/dev/urandom", "rb").read(8).hex())
print(time.time(), time.monotonic(), os.uname().nodename)
"""
    seen: list[list[str]] = []
    for number in range(count):
        name = f"twin{number}"

        def edit(spec: dict[str, Any], name: str = name) -> None:
            with_python(spec)
            spec["hostname"] = name

        before = time.time()
        output = katapy("run", "-b", bundle(["/usr/bin/python3", "-c", script], edit=edit), name, check=True).stdout
        random_line, time_line = output.decode().splitlines()
        now, monotonic, hostname = time_line.split()
        assert before - 1 <= float(now) <= time.time() + 1
        assert 0 < float(monotonic) < 600
        assert hostname == name
        seen.append(random_line.split())
    for values in zip(*seen, strict=True):
        assert len(set(values)) == count
    assert len({value for line in seen for value in line}) == count * 6
