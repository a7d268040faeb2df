"""The sandbox: what the containers of one VM share, and the containers by their ids."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from katapy_agent import config, machine, storage
from katapy_agent.container import Container, Services, State
from katapy_agent.errors import AlreadyExists, InvalidArgument, InvalidState, NotFound, Unsupported
from katapy_agent.stdio import Streams

if TYPE_CHECKING:  # imported when there is a network: in a template they are there already
    from katapy_agent.network import Interface, Neighbor
    from katapy_agent.routes import Route

_ID: Final = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9_.+-]{1,128}")  # as the host has it, and runc
_CONTAINERS_MAX: Final = 256
# The network is the VM's, and shared by all.
_JOINABLE: Final = frozenset(("ipc", "uts", "pid"))


class Sandbox:
    """The one sandbox of this VM."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._containers: dict[str, Container] = {}
        self._created = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def create(
        self,
        *,
        hostname: str,
        shared_tag: str,
        time_ns: int = 0,
        entropy: bytes = b"",
        interfaces: Sequence[Interface] = (),
        routes: Sequence[Route] = (),
        neighbors: Sequence[Neighbor] = (),
    ) -> None:
        """Make the VM a pod's own; an empty argument leaves its thing alone. Once only: raises AlreadyExists.

        With interfaces the routes are exactly ``routes``, even if there are none.
        """
        if self._created:
            raise AlreadyExists("sandbox is already created")
        self._created = True
        try:
            if entropy:
                machine.reseed(entropy)
            if time_ns:
                machine.set_time(time_ns)
            if hostname:
                machine.set_hostname(hostname)
            # Both wait for devices that the host plugs in.
            parts: list[Awaitable[None]] = []
            if shared_tag:
                parts.append(asyncio.to_thread(storage.mount_shared, shared_tag))
            if interfaces or routes or neighbors:
                parts.append(asyncio.to_thread(_set_up_network, interfaces, routes, neighbors))
            await asyncio.gather(*parts)
        except BaseException:
            self._created = False
            raise

    async def destroy(self) -> None:
        """Remove all containers, write everything back and unmount what is shared. Idempotent.

        Does all it can before it raises the first failure.
        """
        self._created = False
        removals = [self.remove_container(container_id) for container_id in self._containers]
        failures = [each for each in await asyncio.gather(*removals, return_exceptions=True) if each]
        await asyncio.to_thread(storage.unmount_shared)
        for failure in failures:
            raise failure

    async def update_interface(self, interface: Interface) -> None:
        """Make a NIC the interface that is described, waiting for it."""
        from katapy_agent import network

        self._check_created()
        await asyncio.to_thread(network.update_interface, interface)

    async def update_routes(self, routes: Sequence[Route]) -> None:
        """Make the routes exactly these, but for those that the kernel has made or learnt by itself."""
        from katapy_agent.routes import update_routes

        self._check_created()
        await asyncio.to_thread(update_routes, routes)

    async def add_neighbors(self, neighbors: Sequence[Neighbor]) -> None:
        """Make these permanent neighbours."""
        from katapy_agent import network

        self._check_created()
        await asyncio.to_thread(network.add_neighbors, neighbors)

    async def relay_resolver(self, address: bytes, stream: str) -> None:
        """Listen for name queries at ``address``, and pass them over the host's ``stream``.

        Raises InvalidArgument, AlreadyExists where that is done already, and what `Exchange.claim` raises.
        """
        from katapy_agent.resolver import Resolver

        self._check_created()
        resolver = Resolver(address, await self._services.exchange.claim(stream))
        self._keep(asyncio.create_task(resolver.run(), name="relay name queries"))

    async def forward_connection(self, port: int, stream: str, *, ipv6: bool) -> None:
        """Connect to a port of the loopback, and relay between that and the host's ``stream``.

        Raises InvalidArgument, NotFound where nobody takes the connection, and what `Exchange.claim` raises.
        """
        from katapy_agent import forward

        self._check_created()
        host = await self._services.exchange.claim(stream)
        try:
            connection = await forward.connect(port, ipv6=ipv6)
        except BaseException:
            host.close()
            raise
        self._keep(asyncio.create_task(forward.relay(host, connection), name=f"forward to port {port}"))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def container(self, container_id: str) -> Container:
        """Return a container. Raises NotFound."""
        if container_id not in self._containers:
            raise NotFound(f"container {container_id!r} does not exist")
        return self._containers[container_id]

    async def create_container(
        self,
        container_id: str,
        spec: bytes,
        streams: Streams,
        *,
        bundle: str = "",
        joined_id: str = "",
        joined_types: Sequence[str] = (),
        memory: Mapping[str, Mapping[str, str | None]] | None = None,
        root_disk: str = "",
    ) -> int:
        """Build a container from its config.json and return the pid of its init, which waits to be started.

        It shares the namespaces ``joined_types`` (ipc, uts, pid) of the container ``joined_id``, which lives, and
        mounts from ``memory``: options of each tmpfs, by its name. ``root_disk`` is the serial number of the disk that
        is its root file system.
        """
        check_id(container_id)
        for name in memory or ():
            check_id(name)
        if unknown := set(joined_types) - _JOINABLE:
            raise Unsupported(f"a container cannot share a namespace of type {min(unknown)[:32]!r}")
        self._check_created()
        if container_id in self._containers:
            raise AlreadyExists(f"container {container_id!r} already exists")
        if len(self._containers) >= _CONTAINERS_MAX:
            raise InvalidState(f"sandbox already has {_CONTAINERS_MAX} containers")
        container = self._containers[container_id] = Container(container_id, self._services)
        try:
            parsed = config.parse_spec(spec)
            for name, options in (memory or {}).items():
                storage.mount_memory(name, options)
            if root_disk:
                read_only = parsed.root.readonly
                await asyncio.to_thread(storage.mount_root, container_id, root_disk, read_only=read_only)
            with ExitStack() as held:
                joined = held.enter_context(self.container(joined_id).join(joined_types)) if joined_types else None
                return await container.build(parsed, streams, bundle=bundle, joined=joined)
        except BaseException:
            try:
                # The binds that it has looked up, too: what fails may do so again and again while the VM lives.
                await asyncio.shield(asyncio.to_thread(storage.release, container_id))
            finally:
                del self._containers[container_id]
            raise

    async def remove_container(self, container_id: str) -> None:
        """Remove a container, killing what is left of it; one that does not exist is removed already."""
        container = self._containers.get(container_id)
        if container is None:
            return
        if container.state is State.CREATING:
            raise InvalidState(f"container {container_id} is creating")
        await container.remove()
        await asyncio.to_thread(storage.release, container_id)
        self._containers.pop(container_id, None)

    def _check_created(self) -> None:
        if not self._created:
            raise InvalidState("there is no sandbox yet")


def _set_up_network(interfaces: Sequence[Interface], routes: Sequence[Route], neighbors: Sequence[Neighbor]) -> None:
    from katapy_agent import network
    from katapy_agent.routes import update_routes

    network.check_interfaces(interfaces)
    for interface in interfaces:
        network.update_interface(interface)
    update_routes(routes)
    if neighbors:
        network.add_neighbors(neighbors)


def check_id(name: str) -> None:
    """Raise InvalidArgument unless ``name`` may be the id of a container or of a process in one."""
    if not _ID.fullmatch(name):
        raise InvalidArgument(f"not an id: {name[:140]!r}")
