"""`katapy image`: what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import click.testing
import pytest

from katapy import held
from katapy.assets import guest, store
from katapy.assets.guest import KernelKind
from katapy.assets.root import find_root, hold_root
from katapy.cli.image import image
from katapy.cli.table import age
from katapy.errors import NotFound


@pytest.fixture
def data(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    with store.lock(data), store.staging(data) as built:
        for name, file, facts in (("image", "root.erofs", {}), ("kernel", "vmlinux", {"version": "6.1.9-katapy"})):
            (built / name).mkdir()
            (built / name / file).write_bytes(b"x" * (3 << 19))
            (built / name / "facts.json").write_text(json.dumps(facts))
        store.install_image(data, built / "image", inputs="i")
        store.install_kernel(data, built / "kernel", kind=KernelKind.TUNED, inputs="k")
        (built / "root/rootfs/usr/bin").mkdir(parents=True)
        (built / "root/rootfs/usr/bin/python3").touch()
        (built / "root/facts.json").write_text("{}")
        store.install_root(data, built / "root", inputs="r")
    return data


def run(data: Path, *args: str) -> click.testing.Result:
    settings = SimpleNamespace(config=SimpleNamespace(runtime=SimpleNamespace(data_dir=data)))
    return click.testing.CliRunner().invoke(image, args, obj=settings)


def test_table(data: Path) -> None:
    digest = guest.find_image(data).digest
    lines = run(data, "ls").stdout.splitlines()
    heading, (*row, _, unit) = [line.split() for line in lines]
    assert heading == ["DIGEST", "SIZE", "KERNEL", "AGE"]
    assert (row, unit) == ([digest[:12], "1.5", "MiB", "6.1.9-katapy"], "seconds")


def test_table_without_kernel(data: Path) -> None:
    (data / "kernel").rename(data / "gone")
    assert run(data, "ls").stdout.splitlines()[1].split()[3] == "-"


def test_json(data: Path) -> None:
    answer = json.loads(run(data, "ls", "--format", "json").stdout)
    assert [(one["digest"], one["size"]) for one in answer["images"]] == [(guest.find_image(data).digest, 3 << 19)]
    assert [one["path"] for one in answer["roots"]] == [str(find_root(data).path)]
    assert [(one["version"], one["kind"]) for one in answer["kernels"]] == [("6.1.9-katapy", "tuned")]


def test_damage_is_told_and_the_rest_listed(data: Path) -> None:
    guest.find_image(data).path.write_bytes(b"short")
    done = run(data, "ls")
    assert done.exit_code == 0
    assert done.stdout.startswith("DIGEST")
    assert "is damaged" in done.stderr


@pytest.mark.parametrize("args", [(), ("abcd", "--all")])
def test_rm_wants_one_of_both(data: Path, args: tuple[str, ...]) -> None:
    assert run(data, "rm", *args).exit_code == 2
    assert guest.list_images(data)[0]


def test_rm(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    digest = guest.find_image(data).digest
    assert run(data, "rm", digest[:4]).stdout == f"{digest}\n"
    with pytest.raises(NotFound):
        guest.find_image(data)
    assert guest.find_kernel(data).version == "6.1.9-katapy"


def test_rm_takes_several(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manual said so, and the second was an unexpected argument."""
    monkeypatch.setattr("os.geteuid", lambda: 0)
    digests = [guest.find_image(data).digest, "0" * 64, "1" * 64]
    for digest in digests[1:]:
        (data / "image" / digest).mkdir()
    assert run(data, "rm", *digests[:2]).stdout.splitlines() == digests[:2]
    done = run(data, "rm", digests[2], "ffff")
    assert isinstance(done.exception, NotFound)
    assert done.stdout == f"{digests[2]}\n"
    assert not list((data / "image").iterdir())


@pytest.mark.parametrize("command", [["build"], ["rm", "--all"]])
def test_root_only(data: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    done = run(data, *command)
    assert "must run as root" in str(done.exception)
    assert guest.list_images(data)[0]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 seconds"), (119, "119 seconds"), (120, "2 minutes"), (7200, "2 hours"), (172800, "2 days")],
)
def test_age(monkeypatch: pytest.MonkeyPatch, seconds: int, text: str) -> None:
    monkeypatch.setattr("time.time", lambda: 1000.0 + seconds)
    assert age(1000.0) == text


def test_rm_all_takes_roots_too_that_nobody_uses(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    used, unused = data / "roots/1", data / "roots/2"
    for place in (used, unused):
        place.mkdir(parents=True)
    with hold_root(data) as root, held.hold(used):
        removed = run(data, "rm", "--all").stdout.splitlines()
        assert root.digest not in removed
        assert "2" in removed
        assert used.exists()
    assert run(data, "rm", "--all").stdout.splitlines() == [root.digest, "1"]
