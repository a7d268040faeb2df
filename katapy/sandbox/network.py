"""A pod's network: found in its namespace, plugged into its VM, told to its guest, and kept so while the pod runs."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import suppress
from typing import Final

from katapy.config import Config
from katapy.devices import Nic
from katapy.errors import InvalidArgument, KatapyError, NotFound, Unsupported
from katapy.interfaces import Network
from katapy.network.pod import QUEUES_MAX, Change, Helper, PodNetwork, Settings, close_nic
from katapy.sandbox.container import Container
from katapy.sandbox.machine import Machine
from katapy.timing import phase

log = logging.getLogger(__name__)

# Kubernetes' own: what the CNI plugin "bandwidth" is told by, in bits a second.
_INGRESS: Final = "kubernetes.io/ingress-bandwidth"
_EGRESS: Final = "kubernetes.io/egress-bandwidth"
_UNITS: Final = {
    **dict(zip(("", "k", "M", "G", "T", "P"), (1000**power for power in range(6)), strict=True)),
    **dict(zip(("Ki", "Mi", "Gi", "Ti", "Pi"), (1024**power for power in range(1, 6)), strict=True)),
}
_RATE_MIN: Final = 1000  # as that plugin's


class SandboxNetwork:
    """The network of one pod."""

    def __init__(self, config: Config, container: Container, *, vcpus: int) -> None:
        """Begin what can be done before the namespace is ready. Raises InvalidArgument for a bandwidth that is none."""
        self._container = container
        self._helper: Helper | None = None
        self._pod: PodNetwork | None = None
        self._nics: Sequence[Nic] = ()
        self._settings = settings(config, container.bundle.spec.annotations, vcpus=vcpus)
        self._namespace = container.bundle.spec.linux.namespace("network")
        if self._namespace is not None and config.network.model != "none":
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
        namespace = self._open_namespace()
        helper, self._helper = self._helper, None
        try:
            if self._namespace is not None and self._namespace.path:
                self._container.record.network(self._namespace.path)
            self._pod = PodNetwork(namespace, self._settings)
        finally:
            os.close(namespace)
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
        if self._pod is None:
            return
        before = self._pod.network
        async for change in self._pod.changes():
            try:
                await self._apply(machine, before, change)
            except KatapyError as error:
                if machine.failed_with() is not None:
                    return
                log.warning("%s: cannot bring its network in line: %s", self._container.id, error)
            finally:
                for nic in change.added:
                    close_nic(nic)
            before = change.network

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
        if self._pod is not None:
            with phase("leave the network"):
                self._pod.close()


def settings(config: Config, annotations: Mapping[str, str], *, vcpus: int) -> Settings:
    """Return how a pod is connected. Raises InvalidArgument for an annotation that is no bandwidth.

    Of two limits the lower one holds: a pod cannot give itself more than the host's configuration does.
    """
    network = config.network
    return Settings(
        checked=not network.spoofing,
        metadata=network.metadata,
        ingress_rate=_lower(network.ingress_rate, _bandwidth(annotations, _INGRESS)),
        egress_rate=_lower(network.egress_rate, _bandwidth(annotations, _EGRESS)),
        queues=min(vcpus, QUEUES_MAX),
        vhost=network.vhost,
    )


def _lower(*rates: int) -> int:
    """Return the lowest limit in bytes a second, 0 for none, of some in bits."""
    return min((rate // 8 for rate in rates if rate), default=0)


def _bandwidth(annotations: Mapping[str, str], key: str) -> int:
    """Return an annotation's quantity (Kubernetes' resource.Quantity) in bits a second; 0 where there is none."""
    text = annotations.get(key)
    if text is None:
        return 0
    match = re.fullmatch(r"([0-9]{1,15})(k|M|G|T|P|[KMGTP]i)?", text)
    rate: int = int(match[1]) * _UNITS[match[2] or ""] if match else 0
    if rate < _RATE_MIN:
        raise InvalidArgument(f"annotation {key}: {text[:64]!r} is not a bandwidth from 1k bits a second on, as 10M")
    return rate
