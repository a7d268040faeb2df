"""`make install` and `make uninstall`: a katapy that needs no checkout, and nothing of it afterwards.

Takes katapy's dependencies from pip's cache or the network.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2]


def _make(target: str, prefix: Path) -> None:
    # Not the make that may run these tests.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "DESTDIR"))}
    subprocess.run(["make", "--directory", SOURCE, target, f"PREFIX={prefix}"], env=env, check=True)


@pytest.fixture
def prefix(tmp_path: Path) -> Iterator[Path]:
    prefix = tmp_path / "prefix"
    _make("install", prefix)
    yield prefix
    _make("uninstall", prefix)
    assert [path for path in prefix.rglob("*") if not path.is_dir()] == []
    assert not (prefix / "lib/katapy").exists()


@pytest.mark.timeout(900)
def test_what_is_installed_works_and_goes_again(prefix: Path, tmp_path: Path) -> None:
    def run(*argv: str) -> str:
        return subprocess.run(argv, cwd=tmp_path, env={}, check=True, capture_output=True, text=True).stdout

    assert run(f"{prefix}/bin/katapy", "--version").startswith("katapy version ")
    run(f"{prefix}/bin/katapy", "spec")
    assert json.loads((tmp_path / "config.json").read_text())["ociVersion"]
    # What the guest image is made of comes along.
    code = "from katapy.image_build import find_sources; print(find_sources())"
    sources = Path(run(f"{prefix}/lib/katapy/bin/python", "-I", "-c", code).strip())
    assert sources.is_relative_to(prefix)
    assert (sources / "guest-agent/katapy_agent/init.py").is_file()
    assert (sources / "default-root/default_root.py").is_file()
    assert not list(sources.rglob("__pycache__"))
