"""What becomes of an exec whose command has gone."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, cast

import pytest

from katapy.config import Config
from katapy.oci.bundle import Bundle
from katapy.oci.default import default_spec
from katapy.oci.spec import parse_spec
from katapy.sandbox.container import Container
from katapy.sandbox.process import ATTACH, GuestProcess, StdioRequest
from katapy.sandbox.sandbox import Sandbox
from katapy.shim.handler import AttachHandler
from katapy.state import Status


async def test_an_exec_is_forgotten_when_it_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that was running when its command was killed."""
    killed: list[str] = []

    async def kill(_sandbox: Sandbox, _container: str, exec_id: str, number: int, *, everyone: bool) -> None:
        assert (number, everyone) == (9, False)
        killed.append(exec_id)

    monkeypatch.setattr(Sandbox, "kill", kill)
    sandbox = Sandbox(tmp_path, "c1", cast(Any, None), Config(), cast(Any, None))
    spec = parse_spec(json.dumps(default_spec()).encode(), bundle="/bundle")
    init = GuestProcess("c1", "", StdioRequest(terminal=False, stdout=ATTACH), status=Status.RUNNING)
    container = sandbox._containers["c1"] = Container(Bundle("/bundle", "/bundle/rootfs", spec), init, cast(Any, None))
    execs = {
        name: GuestProcess("c1", name, StdioRequest(terminal=False, stdout=stdout), status=Status.RUNNING)
        for name, stdout in {"ended": ATTACH, "running": ATTACH, "engine": "/fifo"}.items()
    }
    container.execs.update(execs)
    execs["ended"].finish(0, oom_killed=False)

    handler = AttachHandler(sandbox)
    await handler.detached("c1", "ended")
    await handler.detached("c1", "engine")
    assert set(container.execs) == {"running", "engine"}
    leaving = asyncio.create_task(handler.detached("c1", "running"))
    await asyncio.sleep(0)
    assert killed == ["engine", "running"]
    assert "running" in container.execs
    execs["running"].finish(137, oom_killed=False)
    await leaving
    assert set(container.execs) == {"engine"}
    # What is not known is done with.
    await handler.detached("c1", "running")
    await handler.detached("c2", "")
