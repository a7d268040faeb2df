"""A pod's network: found in its namespace, plugged into its VM, told to its guest, and kept so while the pod runs."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from typing import Final

from katapy.agent.stdio import open_stream
from katapy.config import Config
from katapy.devices import Nic
from katapy.errors import InvalidArgument, KatapyError, NotFound, Unsupported
from katapy.interfaces import Network
from katapy.network.pod import QUEUES_MAX, Change, Helper, PodNetwork, Settings, close_nic
from katapy.sandbox.container import Container
from katapy.sandbox.forward import forward
from katapy.sandbox.machine import Machine
from katapy.sandbox.resolver import find_resolver, open_resolv_conf, relay
from katapy.timing import phase

log = logging.getLogger(__name__)

# What cannot be plugged in by then is worth a container that goes without.
_SETTLE_SECONDS: Final = 10.0
# Kubernetes' own: what the CNI plugin "bandwidth" is told by, in bits a second.
_INGRESS: Final = "kubernetes.io/ingress-bandwidth"
_EGRESS: Final = "kubernetes.io/egress-bandwidth"
# Kubernetes' resource.Quantity: a number, then a power of 1000, of 1024 or of ten.
_QUANTITY: Final = re.compile(
    r"\+?(?=\.?[0-9])([0-9]{0,18})(?:\.([0-9]{0,18}))?(?:([numkMGTPE]|[KMGTPE]i)|[eE]([+-]?[0-9]{1,2}))?"
)
_POWERS: Final = {"n": -9, "u": -6, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_BINARY: Final = "KMGTPE"
_RATE_MIN, _RATE_MAX = 1000, 10**15  # as Kubernetes and that plugin have them


class SandboxNetwork:
    """The network of one pod."""

    def __init__(self, config: Config, container: Container, *, vcpus: int) -> None:
        """Begin what can be done before the namespace is ready. Raises InvalidArgument for a bandwidth that is none."""
        self._container = container
        self._helper: Helper | None = None
        self._pod: PodNetwork | None = None
        self._relay: asyncio.Task[None] | None = None
        self._forward: asyncio.Task[None] | None = None
        self._resolv_conf: int | None = None
        self._nics: Sequence[Nic] = ()
        self._settings = settings(config, container.bundle.spec.annotations, vcpus=vcpus)
        self._namespace = container.bundle.spec.linux.namespace("network")
        if self._namespace is None:
            log.warning("%s: a VM cannot share the host's network: it has loopback only", container.id)
        elif config.network.model != "none":
            self._helper = Helper()

    @property
    def network(self) -> Network:
        """What the guest is to be told."""
        return self._pod.network if self._pod is not None else Network()

    async def connect(self, ready: Awaitable[None]) -> Sequence[Nic]:
        """Wait until the namespace is ``ready``, connect what it has, and return the NICs, which stay this object's.

        Raises KatapyError.
        """
        await ready
        if self._helper is None:
            return ()
        # Before there is a guest that could put something else in its place.
        self._resolv_conf = open_resolv_conf(self._container.bundle.spec)
        namespace = self._open_namespace()
        try:
            if self._namespace is not None and self._namespace.path:
                self._container.record.network(self._namespace.path)
            self._pod = PodNetwork(namespace, self._settings)
        finally:
            os.close(namespace)
        helper, self._helper = self._helper, None
        with phase("connect the network"):
            self._nics = await self._pod.connect(helper)
        return self._nics

    def _open_namespace(self) -> int:
        """Return a descriptor of the namespace. Raises NotFound."""
        assert self._namespace is not None
        pid = self._container.init.host_pid
        path = self._namespace.path or (f"/proc/{pid}/ns/net" if pid else "")
        if not path:
            raise NotFound(f"{self._container.id} has no process on the host that its network could be found by")
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise NotFound(f"cannot open the network namespace {path}: {error.strerror}") from error
        if os.path.samestat(os.fstat(fd), os.stat("/proc/self/ns/net")):
            os.close(fd)
            raise Unsupported("cannot give a VM the host's own network: give the pod a network namespace, or none")
        return fd

    def plugged(self) -> None:
        """Let go of descriptors that the VM has now."""
        for nic in self._nics:
            close_nic(nic)
        self._nics = ()

    async def follow(self, machine: Machine) -> None:
        """Keep the VM's network like the namespace's, for as long as the machine runs."""
        pod = self._pod
        if pod is None:
            return
        before = pod.network
        async for change in pod.changes():
            try:
                await self._apply(machine, before, change)
                before = change.network
            except KatapyError as error:
                if machine.failed_with() is not None:
                    return
                log.warning("%s: cannot bring its network in line: %s", self._container.id, error)
            finally:
                for nic in change.added:
                    close_nic(nic)
            # docker's resolver comes with the first network that has one.
            await self.resolve(machine)

    async def settled(self) -> None:
        """Wait until the VM has what an engine has put into the namespace by now, as docker does before a start.

        A namespace that has a name was ready before the VM was.
        """
        if self._pod is not None and self._namespace is not None and not self._namespace.path:
            with suppress(TimeoutError):
                async with asyncio.timeout(_SETTLE_SECONDS):
                    await self._pod.settled()

    async def resolve(self, machine: Machine) -> None:
        """Relay name queries, where a resolver of the namespace's loopback is to be asked."""
        pod = self._pod
        if pod is None or pod.datagrams is None or self._relay is not None or self._resolv_conf is None:
            return
        address = find_resolver(self._resolv_conf)
        if not address:
            return
        try:
            name, stream = await open_stream(machine.connect)
            self._relay = asyncio.create_task(_relay(stream, pod.datagrams, address), name="relay name queries")
            await machine.guarded(machine.agent.relay_resolver(address, name))
        except KatapyError as error:
            log.warning("%s: cannot relay name queries to %s: %s", self._container.id, address, error)

    def forward(self, machine: Machine) -> None:
        """Relay connections to the namespace's loopback from now on, where the host can."""
        if self._pod is None or not self._pod.loopback:
            return

        async def dial(port: int, ipv6: bool) -> socket.socket:
            name, stream = await open_stream(machine.connect)
            try:
                await machine.guarded(machine.agent.forward_connection(port, name, ipv6=ipv6))
            except BaseException:
                stream.close()
                raise
            return stream

        self._forward = asyncio.create_task(forward(self._pod.loopback, dial), name="forward connections")

    async def _apply(self, machine: Machine, before: Network, change: Change) -> None:
        for device in change.removed:
            # It is cut off; what the guest makes of it is the guest's affair.
            with suppress(KatapyError):
                await machine.guarded(machine.parts.vm.unplug(device))
        await machine.guarded(machine.parts.vm.plug(change.added))
        for interface in change.network.interfaces:
            if interface not in before.interfaces:
                await machine.guarded(machine.agent.update_interface(interface))
        # An interface that went down, or lost an address, has lost routes that it is to have again.
        await machine.guarded(machine.agent.update_routes(change.network.routes))
        if change.network.neighbours:
            await machine.guarded(machine.agent.add_neighbours(change.network.neighbours))

    async def close(self) -> None:
        """Leave the namespace as it was found; after the VM has ended. Idempotent."""
        helper, self._helper = self._helper, None
        if helper is not None:
            await helper.close()
        self.plugged()
        for task in (self._relay, self._forward):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        if self._resolv_conf is not None:
            os.close(self._resolv_conf)
            self._resolv_conf = None
        if self._pod is not None:
            with phase("leave the network"):
                self._pod.close()


async def _relay(stream: socket.socket, datagrams: socket.socket, address: str) -> None:
    with stream:
        try:
            await relay(stream, datagrams, address)
        except OSError as error:
            log.warning("cannot relay name queries to %s: %s", address, error.strerror)


def settings(config: Config, annotations: Mapping[str, str], *, vcpus: int) -> Settings:
    """Return how a pod is connected. Raises InvalidArgument for an annotation that is no bandwidth.

    Of two limits the lower one holds: a pod cannot give itself more than the host's configuration does.
    """
    network = config.network
    return Settings(
        checked=not network.spoofing,
        metadata=network.metadata,
        model=network.model,
        ingress_rate=network.ingress_rate // 8,
        egress_rate=network.egress_rate // 8,
        asked_ingress=_bandwidth(annotations, _INGRESS) // 8,
        asked_egress=_bandwidth(annotations, _EGRESS) // 8,
        queues=min(vcpus, QUEUES_MAX),
        vhost=network.vhost,
        loopback=network.forward_loopback,
    )


def _bandwidth(annotations: Mapping[str, str], key: str) -> int:
    """Return an annotation's quantity in bits a second; 0 where there is none."""
    text = annotations.get(key)
    if text is None:
        return 0
    match = _QUANTITY.fullmatch(text)
    rate = _value(*match.groups(default="")) if match is not None else 0
    if not _RATE_MIN <= rate <= _RATE_MAX:
        raise InvalidArgument(
            f"annotation {key}: {text[:64]!r} is not a bandwidth between 1k and 1P bits a second, as 10M"
        )
    return rate


def _value(whole: str, fraction: str, suffix: str, exponent: str) -> int:
    """Return a quantity's value without what is behind the point."""
    number = int(whole + fraction)
    power = int(exponent or _POWERS.get(suffix, 0)) - len(fraction)
    if suffix.endswith("i"):
        number <<= 10 * (_BINARY.index(suffix[0]) + 1)
    return number * int(10**power) if power >= 0 else number // int(10**-power)
