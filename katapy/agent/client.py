"""gRPC client of the guest agent: one method per RPC. The only module that imports grpc.

Everything that comes back is the guest's word: bounded in size by gRPC's limits and in time by a deadline, checked
here or where it is used, never a path, a format or an argument.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, NamedTuple

import grpc
import grpc.aio
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from katapy.agent.network import interface_message, neighbour_message, route_message
from katapy.devices import SharedMemory
from katapy.errors import KatapyError, Unavailable, from_wire
from katapy.interfaces import Interface, Neighbour, Network, Route
from katapy.proto import agent_pb2

PORT: Final = 1024

_SERVICE: Final = agent_pb2.DESCRIPTOR.services_by_name["Agent"]
_OPTIONS: Final = [
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.max_send_message_length", 32 << 20),
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
]
_MESSAGE_LIMIT: Final = 4096
_ENTROPY_BYTES: Final = 512
_CLOSE_SECONDS: Final = 5.0
_SIGNAL_MAX: Final = 64


class ProcessEnd(NamedTuple):
    """How a process ended: its exit status, 128 + N where ``signal`` N ended it, 0 for none; whether memory ran out."""

    status: int
    signal: int
    oom_killed: bool


class AgentClient:
    """The agent of one VM. ``deadline`` is the seconds that an ordinary call may take."""

    def __init__(self, channel: grpc.aio.Channel, *, deadline: float) -> None:
        self._deadline = deadline
        self._calls: dict[str, Any] = {}
        for method in _SERVICE.methods:
            make = channel.unary_stream if method.server_streaming else channel.unary_unary
            self._calls[method.name] = make(
                f"/{_SERVICE.full_name}/{method.name}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=GetMessageClass(method.output_type).FromString,
            )

    async def check(self, *, deadline: float) -> None:
        """Have the agent give a sign of life. ``deadline`` in seconds. Raises Timeout or Unavailable."""
        await self._call("GetGuestDetails", agent_pb2.Empty(), deadline)

    async def create_sandbox(self, sandbox_id: str, *, hostname: str, shared_tag: str, network: Network) -> None:
        """Make the VM the pod's own: randomness and the wall clock before all else, then what is named here."""
        request = agent_pb2.CreateSandboxRequest(
            sandbox_id=sandbox_id,
            hostname=hostname,
            shared_tag=shared_tag,
            entropy=os.urandom(_ENTROPY_BYTES),
            time_ns=time.time_ns(),
            interfaces=[interface_message(each) for each in network.interfaces],
            routes=[route_message(each) for each in network.routes],
            neighbors=[neighbour_message(each) for each in network.neighbours],
        )
        await self._call("CreateSandbox", request)

    async def update_interface(self, interface: Interface) -> None:
        """Make one of the guest's NICs this interface, waiting for one that was just plugged in."""
        request = agent_pb2.UpdateInterfaceRequest(interface=interface_message(interface))
        await self._call("UpdateInterface", request)

    async def update_routes(self, routes: Sequence[Route]) -> None:
        """Make these the guest's routes."""
        await self._call("UpdateRoutes", agent_pb2.UpdateRoutesRequest(routes=map(route_message, routes)))

    async def add_neighbours(self, neighbours: Sequence[Neighbour]) -> None:
        """Add permanent neighbours."""
        request = agent_pb2.AddARPNeighborsRequest(neighbors=map(neighbour_message, neighbours))
        await self._call("AddARPNeighbors", request)

    async def relay_resolver(self, address: str, stream: str) -> None:
        """Have the guest pass name queries for ``address``, of its loopback, over the stream of this name."""
        request = agent_pb2.RelayResolverRequest(address=socket.inet_aton(address), stream=stream)
        await self._call("RelayResolver", request)

    async def forward_connection(self, port: int, stream: str, *, ipv6: bool) -> None:
        """Have the guest connect to a port of its loopback, and relay that over the stream of this name, in pieces.

        ``ipv6`` is whether ::1 was meant, which is tried first then. Raises NotFound where nobody takes the connection.
        """
        request = agent_pb2.ForwardConnectionRequest(port=port, stream=stream, ipv6=ipv6)
        await self._call("ForwardConnection", request)

    async def destroy_sandbox(self, *, deadline: float) -> None:
        """End all containers and flush what they wrote. ``deadline`` in seconds."""
        await self._call("DestroySandbox", agent_pb2.Empty(), deadline)

    async def create_container(
        self,
        container_id: str,
        spec: bytes,
        stdio: agent_pb2.Stdio,
        *,
        bundle: str,
        joined: tuple[str, Sequence[str]] = ("", ()),
        memory: Sequence[SharedMemory] = (),
        root_disk: str = "",
    ) -> int:
        """Build a container; its init waits for ``start_container``. Returns its pid in the guest.

        ``bundle`` is a directory of the host, of which the container's hooks are told.
        ``joined`` is a container of the pod and the types of its namespaces that the new one shares; ``memory`` is
        what it shares of the VM's. ``root_disk`` is the serial number of the disk that is its root file system.
        """
        request = agent_pb2.CreateContainerRequest(
            container_id=container_id,
            spec=spec,
            stdio=stdio,
            joined_container_id=joined[0],
            joined_namespaces=joined[1],
            bundle=bundle,
            memory=[agent_pb2.SharedMemory(**each._asdict()) for each in memory],
            root_disk=root_disk,
        )
        response: agent_pb2.CreateContainerResponse = await self._call("CreateContainer", request)
        return response.pid

    async def start_container(self, container_id: str, *, hooks: float = 0.0) -> None:
        """Let the container's init run. ``hooks`` is how many seconds the hooks before that may take."""
        request = agent_pb2.StartContainerRequest(container_id=container_id)
        await self._call("StartContainer", request, self._deadline + hooks)

    async def exec_process(self, container_id: str, exec_id: str, process: bytes, stdio: agent_pb2.Stdio) -> int:
        """Start one more process; ``process`` is the JSON object of runtime-spec. Returns its pid in the guest."""
        request = agent_pb2.ExecProcessRequest(container_id=container_id, exec_id=exec_id, process=process, stdio=stdio)
        response: agent_pb2.ExecProcessResponse = await self._call("ExecProcess", request)
        return response.pid

    async def signal(
        self, container_id: str, exec_id: str, number: int, *, everyone: bool = False, deadline: float | None = None
    ) -> None:
        """Send a signal to a process, or with ``everyone`` to each process of the container.

        ``deadline`` in seconds is the ordinary one by itself.
        """
        request = agent_pb2.SignalProcessRequest(
            container_id=container_id, exec_id=exec_id, signal=number, all=everyone
        )
        await self._call("SignalProcess", request, deadline or self._deadline)

    async def pause(self, container_id: str) -> None:
        """Freeze a container."""
        await self._call("PauseContainer", agent_pb2.PauseContainerRequest(container_id=container_id))

    async def resume(self, container_id: str) -> None:
        """Let a frozen container go on."""
        await self._call("ResumeContainer", agent_pb2.ResumeContainerRequest(container_id=container_id))

    async def update(self, container_id: str, resources: bytes) -> None:
        """Change limits of a container; ``resources`` is the JSON object of runtime-spec."""
        await self._call(
            "UpdateContainer", agent_pb2.UpdateContainerRequest(container_id=container_id, resources=resources)
        )

    async def stats(self, container_id: str, *, deadline: float) -> agent_pb2.StatsContainerResponse:
        """Return what a container uses. ``deadline`` in seconds."""
        response: agent_pb2.StatsContainerResponse = await self._call(
            "StatsContainer", agent_pb2.StatsContainerRequest(container_id=container_id), deadline
        )
        return response

    async def events(self) -> AsyncIterator[agent_pb2.Event]:
        """Give what happens in the guest from now on, until the connection ends. Raises Unavailable."""
        try:
            async for event in self._calls["Events"](agent_pb2.Empty(), timeout=None):
                yield event
        except grpc.aio.AioRpcError as error:
            raise _translate("Events", error) from None

    async def wait(self, container_id: str, exec_id: str) -> ProcessEnd:
        """Wait, without a deadline, for the end of a process."""
        request = agent_pb2.WaitProcessRequest(container_id=container_id, exec_id=exec_id)
        response: agent_pb2.WaitProcessResponse = await self._call("WaitProcess", request, None)
        return ProcessEnd(min(response.exit_status, 255), min(response.signal, _SIGNAL_MAX), response.oom_killed)

    async def remove_container(self, container_id: str, *, deadline: float) -> None:
        """Remove a container and whatever still runs in it. ``deadline`` in seconds."""
        await self._call("RemoveContainer", agent_pb2.RemoveContainerRequest(container_id=container_id), deadline)

    async def resize(self, container_id: str, exec_id: str, *, rows: int, columns: int) -> None:
        """Set the size of a process's terminal."""
        request = agent_pb2.TtyWinResizeRequest(container_id=container_id, exec_id=exec_id, rows=rows, columns=columns)
        await self._call("TtyWinResize", request)

    async def close_stdin(self, container_id: str, exec_id: str) -> None:
        """Close a process's standard input."""
        await self._call("CloseStdin", agent_pb2.CloseStdinRequest(container_id=container_id, exec_id=exec_id))

    async def processes(self, container_id: str) -> agent_pb2.ListProcessesResponse:
        """Return the processes of a container."""
        response: agent_pb2.ListProcessesResponse = await self._call(
            "ListProcesses", agent_pb2.ListProcessesRequest(container_id=container_id)
        )
        return response

    async def _call(self, method: str, request: Message, deadline: float | None = -1) -> Any:
        timeout = self._deadline if deadline == -1 else deadline
        try:
            return await self._calls[method](request, timeout=timeout)
        except grpc.aio.AioRpcError as error:
            raise _translate(method, error) from None
        except grpc.aio.UsageError as error:
            raise Unavailable(f"guest agent: {method}: the connection is closed") from error


def _translate(method: str, error: grpc.aio.AioRpcError) -> KatapyError:
    name = dict(error.trailing_metadata() or {}).get("katapy-error", "")
    text = (error.details() or "no message")[:_MESSAGE_LIMIT]
    if not name:
        text = f"guest agent: {method}: {text}"
    printable = "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    return from_wire(error.code().value[0], str(name), printable)


@asynccontextmanager
async def connect(target: str, *, deadline: float) -> AsyncIterator[AgentClient]:
    """Connect to the agent behind the relay's address ``target``; ``deadline`` in seconds, also for each later call.

    Raises Timeout or Unavailable.
    """
    channel = grpc.aio.insecure_channel(target, options=_OPTIONS)
    try:
        yield AgentClient(channel, deadline=deadline)
    finally:
        # An answer that is still awaited ends with CANCELLED; the deadline bounds a peer that does not let go.
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await channel.close(grace=None)
