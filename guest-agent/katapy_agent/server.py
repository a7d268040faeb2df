"""The gRPC service of agent.proto: turns messages into calls of the sandbox and errors into statuses, and no more.

Every method of agent.proto must have its namesake here, or the agent does not start.
"""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import traceback
from collections.abc import AsyncIterator, Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, NoReturn

from katapy_agent import agent_pb2 as pb
from katapy_agent import config, machine, sandbox
from katapy_agent.container import Container, Services
from katapy_agent.errors import InvalidArgument, KatapyError, Unavailable, rpc_code
from katapy_agent.events import Event, Events, Exit, SubscriberTooSlow
from katapy_agent.exchange import Exchange
from katapy_agent.launcher import Launcher
from katapy_agent.oom import FileWatch
from katapy_agent.process import Process
from katapy_agent.reaper import Reaper
from katapy_agent.rpc import Server, Status
from katapy_agent.stdio import Streams

if TYPE_CHECKING:  # as in sandbox
    from katapy_agent.network import Interface, Neighbor
    from katapy_agent.routes import Route

_DETAILS_MAX: Final = 2048
_RESOURCE_EXHAUSTED: Final = 8
_EMPTY: Final = pb.Empty()


class AgentService:
    """One method per RPC of agent.proto, under its name in snake case; agent.proto says what each does."""

    def __init__(self, pod: sandbox.Sandbox, events: Events) -> None:
        self._sandbox = pod
        self._events = events

    async def get_guest_details(self, _request: pb.Empty) -> pb.GuestDetails:
        return pb.GuestDetails(**dataclasses.asdict(machine.facts()))

    async def create_sandbox(self, request: pb.CreateSandboxRequest) -> pb.Empty:
        await self._sandbox.create(
            hostname=request.hostname,
            shared_tag=request.shared_tag,
            time_ns=request.time_ns,
            entropy=request.entropy,
            interfaces=[_interface(each) for each in request.interfaces],
            routes=_routes(request.routes),
            neighbors=_neighbors(request.neighbors),
        )
        return _EMPTY

    async def destroy_sandbox(self, _request: pb.Empty) -> pb.Empty:
        await self._sandbox.destroy()
        return _EMPTY

    async def update_interface(self, request: pb.UpdateInterfaceRequest) -> pb.Empty:
        await self._sandbox.update_interface(_interface(request.interface))
        return _EMPTY

    async def update_routes(self, request: pb.UpdateRoutesRequest) -> pb.Empty:
        await self._sandbox.update_routes(_routes(request.routes))
        return _EMPTY

    async def add_arp_neighbors(self, request: pb.AddARPNeighborsRequest) -> pb.Empty:
        await self._sandbox.add_neighbors(_neighbors(request.neighbors))
        return _EMPTY

    async def relay_resolver(self, request: pb.RelayResolverRequest) -> pb.Empty:
        await self._sandbox.relay_resolver(request.address, request.stream)
        return _EMPTY

    async def forward_connection(self, request: pb.ForwardConnectionRequest) -> pb.Empty:
        await self._sandbox.forward_connection(request.port, request.stream, ipv6=request.ipv6)
        return _EMPTY

    async def create_container(self, request: pb.CreateContainerRequest) -> pb.CreateContainerResponse:
        pid = await self._sandbox.create_container(
            request.container_id,
            request.spec,
            _streams(request.stdio),
            bundle=request.bundle,
            joined_id=request.joined_container_id,
            joined_types=tuple(request.joined_namespaces),
            memory={each.name: _memory_options(each) for each in request.memory},
            root_disk=request.root_disk,
        )
        return pb.CreateContainerResponse(pid=pid)

    async def start_container(self, request: pb.StartContainerRequest) -> pb.Empty:
        await self._container(request).start()
        return _EMPTY

    async def exec_process(self, request: pb.ExecProcessRequest) -> pb.ExecProcessResponse:
        sandbox.check_id(request.exec_id)
        process = config.parse_process(request.process)
        pid = await self._container(request).exec(request.exec_id, process, _streams(request.stdio))
        return pb.ExecProcessResponse(pid=pid)

    async def signal_process(self, request: pb.SignalProcessRequest) -> pb.Empty:
        if not request.all:
            self._process(request).signal(request.signal)
        elif request.exec_id:
            raise InvalidArgument("a signal to all processes names no process")
        else:
            self._container(request).signal_all(request.signal)
        return _EMPTY

    async def pause_container(self, request: pb.PauseContainerRequest) -> pb.Empty:
        await self._container(request).pause()
        return _EMPTY

    async def resume_container(self, request: pb.ResumeContainerRequest) -> pb.Empty:
        await self._container(request).resume()
        return _EMPTY

    async def update_container(self, request: pb.UpdateContainerRequest) -> pb.Empty:
        await self._container(request).update(config.parse_resources(request.resources))
        return _EMPTY

    async def wait_process(self, request: pb.WaitProcessRequest) -> pb.WaitProcessResponse:
        process = self._process(request)
        status = await process.wait()
        oom_killed = self._container(request).oom_killed()
        return pb.WaitProcessResponse(exit_status=status, oom_killed=oom_killed, signal=process.ended_by)

    async def remove_container(self, request: pb.RemoveContainerRequest) -> pb.Empty:
        await self._sandbox.remove_container(request.container_id)
        return _EMPTY

    async def tty_win_resize(self, request: pb.TtyWinResizeRequest) -> pb.Empty:
        self._process(request).stdio.resize(request.rows, request.columns)
        return _EMPTY

    async def close_stdin(self, request: pb.CloseStdinRequest) -> pb.Empty:
        self._process(request).stdio.close_stdin()
        return _EMPTY

    async def stats_container(self, request: pb.StatsContainerRequest) -> pb.StatsContainerResponse:
        return pb.StatsContainerResponse(**dataclasses.asdict(self._container(request).stats()))

    async def list_processes(self, request: pb.ListProcessesRequest) -> pb.ListProcessesResponse:
        listed = self._container(request).processes()
        return pb.ListProcessesResponse(
            pids=[facts.pid for facts, _ in listed],
            processes=[pb.ProcessInfo(**dataclasses.asdict(facts), exec_id=exec_id) for facts, exec_id in listed],
        )

    async def events(self, _request: pb.Empty) -> AsyncIterator[pb.Event]:
        async for event in self._events.subscribe():
            yield _event(event)

    def _container(self, request: Any) -> Container:
        return self._sandbox.container(request.container_id)

    def _process(self, request: Any) -> Process:
        return self._container(request).process(request.exec_id)


async def serve(
    *,
    launcher: Launcher,
    control: socket.socket,
    stdio: socket.socket,
    ready: Callable[[], object],
    warm: bool = False,
) -> NoReturn:
    """Serve the host until something that the agent cannot do without fails, which is raised.

    ``control`` and ``stdio`` are the listeners for gRPC and for streams. ``ready`` is called when the host may call;
    with ``warm``, when all that a container's start does has been done once.
    """
    reaper, exchange, events = Reaper(), Exchange(), Events()
    services = Services(launcher, reaper, exchange, events, FileWatch())
    service = AgentService(sandbox.Sandbox(services), events)
    server = Server(pb.DESCRIPTOR.services_by_name["Agent"], service, status_of)
    launcher_ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    reaper.watch(launcher.pid, launcher_ended.set_result)
    reaper.start()
    async with asyncio.TaskGroup() as parts:
        parts.create_task(server.serve(control), name="rpc")
        parts.create_task(exchange.serve(stdio), name="stdio")
        if warm:
            from katapy_agent.warmup import warm_up

            await warm_up(server, exchange)
        ready()
        status = await launcher_ended
        raise Unavailable(f"launcher ended with status {status}")


def status_of(error: Exception) -> Status:
    """Return the status with which a call fails; what is not a KatapyError is a bug, and goes to the console too."""
    if isinstance(error, SubscriberTooSlow):
        return Status(_RESOURCE_EXHAUSTED, "events were not read in time")
    if not isinstance(error, KatapyError):
        traceback.print_exception(error)
    name = type(error).__name__ if isinstance(error, KatapyError) else "Internal"
    message = str(error) if isinstance(error, KatapyError) else f"{type(error).__name__}: {error}"
    return Status(rpc_code(error), " ".join(message.split())[:_DETAILS_MAX], (("katapy-error", name),))


def _streams(stdio: pb.Stdio) -> Streams:
    return Streams(stdio.terminal, stdio.stdin, stdio.stdout, stdio.stderr, stdio.rows, stdio.columns)


def _memory_options(given: pb.SharedMemory) -> dict[str, str | None]:
    size: dict[str, str | None] = {"size": str(given.size_bytes)} if given.size_bytes else {}
    return {**size, "mode": f"{given.mode & 0o7777:04o}", "uid": str(given.uid), "gid": str(given.gid)}


def _interface(given: pb.Interface) -> Interface:
    from katapy_agent.network import Interface, InterfaceAddress

    addresses = tuple(
        InterfaceAddress(each.address, each.prefix_length, each.peer, each.broadcast, each.scope, each.no_prefix_route)
        for each in given.addresses
    )
    return Interface(
        device=given.device,
        name=given.name,
        hardware_address=given.hardware_address,
        mtu=given.mtu,
        up=given.up,
        no_arp=given.no_arp,
        disable_ipv6=given.disable_ipv6,
        addresses=addresses,
    )


def _routes(given: Iterable[pb.Route]) -> list[Route]:
    return [_route(each) for each in given]


def _route(given: pb.Route) -> Route:
    from katapy_agent.routes import NextHop, Route

    return Route(
        family=given.family,
        destination=given.destination,
        prefix_length=given.prefix_length,
        interface=given.interface,
        gateway=given.gateway,
        preferred_source=given.preferred_source,
        metric=given.metric,
        scope=given.scope,
        table=given.table,
        type=given.type,
        protocol=given.protocol,
        on_link=given.on_link,
        mtu=given.mtu,
        next_hops=tuple(NextHop(each.interface, each.gateway, each.weight, each.on_link) for each in given.next_hops),
    )


def _neighbors(given: Iterable[pb.Neighbor]) -> list[Neighbor]:
    if not given:
        return []
    from katapy_agent.network import Neighbor

    return [Neighbor(each.interface, each.address, each.hardware_address) for each in given]


def _event(event: Event) -> pb.Event:
    if isinstance(event, Exit):
        return pb.Event(exit=pb.ExitEvent(**dataclasses.asdict(event)))
    return pb.Event(oom=pb.OomEvent(**dataclasses.asdict(event)))
