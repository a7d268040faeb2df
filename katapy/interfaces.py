"""What a pod's network looks like: plain descriptions that ``network`` finds on the host and ``agent`` tells the guest.

IP addresses and hardware addresses are text, numbers are those of rtnetlink(7), lengths of prefixes are bits. All of it
crosses from a helper process as JSON, so every description is made of what JSON has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Self


class Address(NamedTuple):
    """An IP address of an interface. With ``peer`` it is point-to-point, and the prefix is the peer's."""

    address: str
    prefix_length: int
    peer: str = ""
    broadcast: str = ""
    scope: int = 0
    no_prefix_route: bool = False


class Interface(NamedTuple):
    """An interface as the workload sees it; ``mtu`` in bytes.

    ``device`` is the permanent hardware address of the VM's NIC, by which the guest finds it: only that differs
    between all NICs of a VM whatever the hardware addresses are that they have to show.
    """

    device: str
    name: str
    hardware_address: str
    mtu: int
    up: bool = True
    no_arp: bool = False
    disable_ipv6: bool = False
    addresses: tuple[Address, ...] = ()


class NextHop(NamedTuple):
    """One of several ways of a route; ``weight`` from 1."""

    interface: str
    gateway: str = ""
    weight: int = 1
    on_link: bool = False


class Route(NamedTuple):
    """A route; ``family`` is 4 or 6, an empty ``destination`` the default, ``mtu`` in bytes or 0."""

    family: int
    destination: str = ""
    prefix_length: int = 0
    interface: str = ""
    gateway: str = ""
    preferred_source: str = ""
    metric: int = 0
    scope: int = 0
    table: int = 254
    type: int = 1
    protocol: int = 0
    on_link: bool = False
    mtu: int = 0
    next_hops: tuple[NextHop, ...] = ()


class Neighbour(NamedTuple):
    """A permanent entry of the neighbour table: ARP's or IPv6's."""

    interface: str
    address: str
    hardware_address: str


class Network(NamedTuple):
    """All that the guest is told."""

    interfaces: tuple[Interface, ...] = ()
    routes: tuple[Route, ...] = ()
    neighbours: tuple[Neighbour, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return it as ``from_json`` takes it."""
        return {
            "interfaces": [
                {**each._asdict(), "addresses": [address._asdict() for address in each.addresses]}
                for each in self.interfaces
            ],
            "routes": [
                {**each._asdict(), "next_hops": [hop._asdict() for hop in each.next_hops]} for each in self.routes
            ],
            "neighbours": [each._asdict() for each in self.neighbours],
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Return what ``to_json`` was called on."""
        return cls(
            tuple(
                Interface(**{**each, "addresses": tuple(Address(**address) for address in each["addresses"])})
                for each in document["interfaces"]
            ),
            tuple(
                Route(**{**each, "next_hops": tuple(NextHop(**hop) for hop in each["next_hops"])})
                for each in document["routes"]
            ),
            tuple(Neighbour(**each) for each in document["neighbours"]),
        )
