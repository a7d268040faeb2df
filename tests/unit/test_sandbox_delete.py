"""A container that is deleted by two at once, or whose VM dies while it is created."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any, cast

import pytest

from katapy.config import Config
from katapy.errors import NotFound
from katapy.oci.bundle import Bundle
from katapy.oci.default import default_spec
from katapy.oci.spec import parse_spec
from katapy.sandbox.container import Container
from katapy.sandbox.process import GuestProcess, StdioRequest
from katapy.sandbox.record import Record
from katapy.sandbox.sandbox import Sandbox
from katapy.state import Status


def container(name: str) -> Container:
    spec = parse_spec(json.dumps(default_spec()).encode(), bundle="/bundle")
    bundle = Bundle("/bundle", "/bundle/rootfs", spec)
    made = Container(bundle, GuestProcess(name, "", StdioRequest(terminal=False)), cast(Any, None))
    made.init.status = Status.CREATED
    return made


async def test_two_deletes_of_one_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one removed it again, and whatever had its name by then."""
    removed = []

    async def forget(_sandbox: Sandbox, container: Container) -> None:
        removed.append(container)
        del sandbox._containers["c1"]

    monkeypatch.setattr(Sandbox, "_forget", forget)
    sandbox = Sandbox(tmp_path, "p1", cast(Any, None), Config(), cast(Any, None))
    first = sandbox._containers["c1"] = container("c1")
    async with first.lock:
        deletes = [asyncio.create_task(sandbox.delete("c1", "")) for _ in range(2)]
        await asyncio.sleep(0)
    results = await asyncio.gather(*deletes, return_exceptions=True)
    assert removed == [first]
    assert [type(result) for result in results if isinstance(result, Exception)] == [NotFound]


def test_a_vm_that_dies_while_a_container_is_created(tmp_path: Path) -> None:
    """It was said to be created for ever."""
    root = tmp_path / "run"
    root.mkdir(mode=0o700)
    spec = parse_spec(json.dumps(default_spec()).encode(), bundle="/bundle")
    record = Record.begin(root, Bundle("/bundle", "/bundle/rootfs", spec), "c1")
    record.stopped(137)
    record.created(b"{}", "tcg")
    assert (record.state.status, record.state.exit_status) == (Status.STOPPED, 137)
    assert os.listdir(root) == ["c1"]
