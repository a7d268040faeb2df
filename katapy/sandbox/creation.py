"""How a process comes to be in the guest: first its streams are opened, then the agent is asked for it.

The sandbox says when, and watches what has been made.
"""

from __future__ import annotations

from katapy.agent.stdio import open_streams
from katapy.proto import agent_pb2
from katapy.sandbox.container import Container
from katapy.sandbox.machine import Machine
from katapy.sandbox.process import GuestProcess
from katapy.sandbox.share import Shared
from katapy.timing import phase


async def create_in_guest(
    machine: Machine, sandbox_id: str, container: Container, names: list[str], shared: Shared
) -> None:
    """Create a container of the pod ``sandbox_id``, whose first process has the streams ``names``.

    Raises KatapyError. The streams that are open then are closed with the process.
    """
    process, bundle = container.init, container.bundle
    stdio = await _open_streams(machine, process, names)
    # The network is the VM's, so every container of the pod has it already.
    types = [kind for kind in bundle.spec.joined_namespaces if kind != "network"]
    joined = (sandbox_id, types) if types else ("", types)
    process.guest_pid = await machine.agent.create_container(
        container.id,
        shared.spec,
        stdio,
        bundle=bundle.path,
        joined=joined,
        memory=shared.memory,
        root_disk=shared.root_disk,
    )


async def exec_in_guest(machine: Machine, process: GuestProcess, spec: bytes) -> None:
    """Run one more process in a container; ``spec`` is JSON, as in config.json. Raises KatapyError, and closes it."""
    stdio = await _open_streams(machine, process, process.stdio.names())
    try:
        process.guest_pid = await machine.agent.exec_process(process.container_id, process.exec_id, spec, stdio)
    except BaseException:
        process.close()
        raise


async def _open_streams(machine: Machine, process: GuestProcess, names: list[str]) -> agent_pb2.Stdio:
    with phase("open the streams"):
        process.streams, stdio = await open_streams(machine.connect, names, terminal=process.stdio.terminal)
    process.opened.set()
    return stdio
