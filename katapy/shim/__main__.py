"""The shim: one supervisor process per pod.

Started by ``katapy.preload``, told what for by ``katapy.client.launch`` (for the command line or an engine), with two
listening sockets in the sandbox directory: ``shim.sock`` serves containerd's Task API over ttrpc, ``attach.sock`` hands
standard streams to the processes that stand in for the container on the host. It owns the virtual machine and all
helpers; they die with it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from pathlib import Path
from typing import Final, NamedTuple

from katapy import log as logs
from katapy import preload, run
from katapy.cgroups.path import Driver
from katapy.config import Config
from katapy.errors import NotFound
from katapy.proto import shim_pb2, task_pb2
from katapy.sandbox.host import Host
from katapy.sandbox.record import Record
from katapy.sandbox.sandbox import Sandbox
from katapy.shim.attach import AttachServer
from katapy.shim.engine import Engine
from katapy.shim.events import Publisher
from katapy.shim.handler import AttachHandler
from katapy.shim.observe import ShimService
from katapy.shim.standin import StandIns
from katapy.shim.task import TaskService
from katapy.state import ProcessRef
from katapy.storage.shared_dir import enter_private_mounts
from katapy.timing import as_text, process_start
from katapy.timing import record as record_phases
from katapy.transport.ttrpc_server import handler_table, serve

_FILES_MAX: Final = 1 << 20
log = logging.getLogger("katapy.shim")

# What has been begun is done, also when the caller leaves; a Create whose caller has left is undone.
FINISH: Final = ("Start", "Kill", "Pause", "Resume", "Update", "Delete", "Shutdown")

TASK_V3: Final = "containerd.task.v3.Task"
TASK: Final = task_pb2.DESCRIPTOR.services_by_name["Task"]
SHIM: Final = shim_pb2.DESCRIPTOR.services_by_name["Shim"]


class _Options(NamedTuple):
    """What ``katapy.client.launch`` asks for; ``engine`` is an Engine as JSON, None for the command line."""

    root: str
    id: str
    config: str | None
    debug: bool
    foreground: bool
    systemd_cgroup: bool
    engine: dict[str, str] | None = None


def main() -> int:
    """Run until the pod is gone. Returns the exit status."""
    loaded = time.monotonic()
    os.closerange(preload.CONTROL_FD + 1, _FILES_MAX)
    os.chdir("/")
    arguments, fds = preload.await_arguments()
    if not fds:
        return 0
    options = _Options(**arguments)
    listening, attaching, log_fd = fds
    logs.setup(debug=options.debug)
    if options.engine is not None:
        # While standard error is that fifo still: one without a writer has ended, and CRI-O reads no more.
        logs.copy_to_fifo(options.engine["log"])
    for stream in (1, 2):
        os.dup2(log_fd, stream)
    os.close(log_fd)
    os.umask(0o077)
    # Before any thread exists: a mount namespace belongs to the thread that asks for it and to its children.
    host_mounts = enter_private_mounts()
    asyncio.run(_serve(options, (listening, attaching), host_mounts, loaded))
    return 0


async def _serve(options: _Options, sockets: tuple[int, int], host_mounts: int, loaded: float) -> None:
    timeline = record_phases()
    timeline.add("load the shim", process_start(), loaded)
    root = Path(options.root)
    try:
        record = Record(root, options.id)
    except NotFound:
        log.debug("sandbox %s was removed before it began", options.id)
        return
    driver = Driver.SYSTEMD if options.systemd_cgroup else Driver.CGROUPFS
    engine = Engine(**options.engine) if options.engine is not None else None
    # The command that starts a shim for an engine has ended by now, and its pid may be another's.
    creator = record.creator if engine is None else None
    host = Host(host_mounts, driver, creator.pid if creator else 0, root)
    sandbox = Sandbox(root, options.id, record, Config.load(Path(options.config) if options.config else None), host)
    publisher = Publisher(engine)
    stand_ins = StandIns(sandbox.directory, host_mounts, engine.namespace if engine else "")
    service = TaskService(sandbox, stand_ins, publisher)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, service.done.set)
    watches = []
    if engine is None:
        watching = _watch_creator(record.creator, sandbox, service, foreground=options.foreground)
        watches.append(asyncio.create_task(watching, name="watch the creator"))
    task = handler_table(TASK, service, finish=FINISH)
    try:
        async with (
            publisher,
            serve(
                socket.socket(fileno=sockets[0]),
                {
                    TASK.full_name: task,
                    TASK_V3: task,
                    SHIM.full_name: handler_table(SHIM, ShimService(sandbox, timeline)),
                },
            ),
            AttachServer(socket.socket(fileno=sockets[1]), AttachHandler(sandbox)),
        ):
            await service.done.wait()
            await sandbox.close()
            await service.close()
    finally:
        for watch in watches:
            watch.cancel()
        if engine is not None:
            Path(engine.link).unlink(missing_ok=True)
        sandbox.remove()
        for line in as_text(timeline.phases).splitlines():
            log.debug("%s", line)
        log.debug("sandbox %s is gone", sandbox.id)


async def _watch_creator(
    creator: ProcessRef | None, sandbox: Sandbox, service: TaskService, *, foreground: bool
) -> None:
    """End the shim with the command that started it, where nobody else would.

    That is when it died before it had a container, and at any time of a ``foreground`` run.
    """
    if creator is not None and (fd := creator.open()) is not None:
        try:
            await run.readable(fd)
        finally:
            os.close(fd)
    if foreground or sandbox.empty:
        service.done.set()
