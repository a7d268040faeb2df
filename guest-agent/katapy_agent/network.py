"""Interfaces of the VM with their addresses, and neighbours; routes are `routes`'.

The descriptions are agent.proto's, checked once when they are made. IP addresses are 4 or 16 bytes, hardware addresses
6; numbers are those of rtnetlink(7).
"""

from __future__ import annotations

import errno
import socket
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple

from katapy_agent import netlink
from katapy_agent.errors import InvalidArgument, NotFound, Timeout, doing, from_os
from katapy_agent.netlink import attribute

INTERFACES_MAX: Final = 64
_ADDRESSES_MAX: Final = 256
_NEIGHBORS_MAX: Final = 4096
_NAME_MAX: Final = 15
_MTU_MIN: Final = 68
_MTU_MAX: Final = 65535
_PLUG_SECONDS: Final = 30.0
_CONF: Final = Path("/proc/sys/net/ipv6/conf")

_IFINFOMSG: Final = struct.Struct("=BxHiII")
_IFADDRMSG: Final = struct.Struct("=BBBBI")
_NDMSG: Final = struct.Struct("=BxxxiHBB")

_IFF_UP: Final = 0x1
_IFF_NOARP: Final = 0x80
_IFLA_ADDRESS: Final = 1
_IFLA_IFNAME: Final = 3
_IFLA_MTU: Final = 4
_IFLA_AF_SPEC: Final = 26
_IFLA_EXT_MASK: Final = 29
_IFLA_PERM_ADDRESS: Final = 54
_IFLA_INET6_CONF: Final = 2
_DEVCONF_DISABLE_IPV6: Final = 26
_RTEXT_FILTER_SKIP_STATS: Final = 8

_IFA_ADDRESS: Final = 1
_IFA_LOCAL: Final = 2
_IFA_BROADCAST: Final = 4
_IFA_FLAGS: Final = 8
_IFA_PROTO: Final = 11
_IFA_F_NODAD: Final = 0x02
_IFA_F_PERMANENT: Final = 0x80
_IFA_F_MANAGETEMPADDR: Final = 0x100
_IFA_F_NOPREFIXROUTE: Final = 0x200
_IFAPROT_KERNEL_LL: Final = 3
_LINK_LOCAL: Final = b"\xfe\x80" + bytes(6)

_NDA_DST: Final = 1
_NDA_LLADDR: Final = 2
_NUD_PERMANENT: Final = 0x80

_SIZES: Final = {int(socket.AF_INET): 4, int(socket.AF_INET6): 16}

# Who renames one interface may have to move another aside: one at a time.
_changing: Final = threading.Lock()


@dataclass(frozen=True)
class InterfaceAddress:
    """An address of an interface. Of a point-to-point one the prefix is the peer's."""

    address: bytes
    prefix_length: int
    peer: bytes = b""
    broadcast: bytes = b""
    scope: int = 0
    no_prefix_route: bool = False

    def __post_init__(self) -> None:
        check_address(self.address, "an address")
        check_range(self.prefix_length, 0, len(self.address) * 8, "a prefix length")
        check_range(self.scope, 0, 255, "a scope")
        if self.peer and len(self.peer) != len(self.address):
            raise InvalidArgument("a peer's address is not of the address's family")
        if self.broadcast and not len(self.broadcast) == len(self.address) == 4:
            raise InvalidArgument("a broadcast address is not one of IPv4")


@dataclass(frozen=True)
class Interface:
    """What the NIC whose permanent hardware address is ``device`` shall be.

    ``mtu`` is in bytes, 0 leaves it. The first address of each family is the one that the kernel prefers as a source.
    """

    device: bytes
    name: str
    hardware_address: bytes
    mtu: int = 0
    up: bool = True
    no_arp: bool = False
    disable_ipv6: bool = False
    addresses: tuple[InterfaceAddress, ...] = ()

    def __post_init__(self) -> None:
        check_hardware_address(self.device)
        check_hardware_address(self.hardware_address)
        check_name(self.name)
        if self.name == "lo":
            raise InvalidArgument("a NIC cannot be called lo")
        check_mtu(self.mtu)
        if len(self.addresses) > _ADDRESSES_MAX:
            raise InvalidArgument(f"{self.name} has more than {_ADDRESSES_MAX} addresses")


@dataclass(frozen=True)
class Neighbor:
    """The hardware address behind an IP address."""

    interface: str
    address: bytes
    hardware_address: bytes

    def __post_init__(self) -> None:
        check_name(self.interface)
        check_address(self.address, "a neighbour's address")
        if len(self.hardware_address) != 6:
            raise InvalidArgument("a neighbour's hardware address has not 6 bytes")


class Link(NamedTuple):
    """An interface as the kernel has it; ``ipv6_disabled`` is None where it has no IPv6 at all."""

    ifindex: int
    flags: int
    name: str
    address: bytes
    permanent: bytes
    mtu: int
    ipv6_disabled: bool | None


class Found(NamedTuple):
    """An address as the kernel has it, with its interface's index, and the body of the message that said so."""

    ifindex: int
    address: InterfaceAddress
    flags: int
    protocol: int
    body: bytes


def check_interfaces(interfaces: Sequence[Interface]) -> None:
    """Raise InvalidArgument where these cannot be side by side."""
    if len(interfaces) > INTERFACES_MAX:
        raise InvalidArgument(f"more than {INTERFACES_MAX} interfaces")
    for values, what in (({each.name for each in interfaces}, "name"), ({each.device for each in interfaces}, "NIC")):
        if len(values) != len(interfaces):
            raise InvalidArgument(f"two interfaces have the same {what}")


def update_interface(interface: Interface) -> None:
    """Make a NIC the interface that is described; wait for it where the host has not plugged it in yet.

    Addresses that are not described go, but for those that the kernel has made or learnt by itself. Where the kernel
    changes what is asked for only while the interface is down, its routes are lost. Raises KatapyError.
    """
    with doing(f"set up interface {interface.name}"), netlink.Socket() as kernel:
        if _apply(kernel, interface):
            return
        deadline = time.monotonic() + _PLUG_SECONDS
        with netlink.Socket(netlink.RTMGRP_LINK) as events:
            while not _apply(kernel, interface):
                if not events.wait(deadline - time.monotonic()):
                    missing = interface.device.hex(":")
                    raise Timeout(f"cannot set up interface {interface.name}: no NIC {missing} in {_PLUG_SECONDS:g} s")


def add_neighbors(neighbors: Sequence[Neighbor]) -> None:
    """Make these permanent neighbours, whether the kernel knows them or not. Raises KatapyError."""
    if len(neighbors) > _NEIGHBORS_MAX:
        raise InvalidArgument(f"more than {_NEIGHBORS_MAX} neighbours")
    indices = {name: index_of(name) for name in {each.interface for each in neighbors}}
    requests = [
        netlink.Request(
            netlink.RTM_NEWNEIGH,
            _NDMSG.pack(family_of(each.address), indices[each.interface], _NUD_PERMANENT, 0, 0)
            + attribute(_NDA_DST, each.address)
            + attribute(_NDA_LLADDR, each.hardware_address),
            netlink.NLM_F_CREATE | netlink.NLM_F_REPLACE,
        )
        for each in neighbors
    ]
    with doing("add neighbours"), netlink.Socket() as kernel:
        outcomes = kernel.request_all(requests)
    for neighbor, error in zip(neighbors, outcomes, strict=True):
        if error:
            raise from_os(f"add neighbour {text_of(neighbor.address)} to {neighbor.interface}", error) from error


def find_link(links: Sequence[Link], device: bytes) -> Link | None:
    """Return the link of the NIC with this permanent address; where a driver tells none, the current one counts."""
    for link in links:
        if link.permanent == device:
            return link
    return next((link for link in links if not any(link.permanent) and link.address == device), None)


def parse_link(body: bytes) -> Link:
    """Return what an RTM_NEWLINK message says. Raises OSError."""
    _family, _type, index, flags, _change = netlink.unpack(_IFINFOMSG, body)
    found = netlink.parse_attributes(body, _IFINFOMSG.size)
    name = found.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode(errors="surrogateescape")
    addresses = found.get(_IFLA_ADDRESS, b""), found.get(_IFLA_PERM_ADDRESS, b"")
    return Link(index, flags, name, *addresses, netlink.number(found, _IFLA_MTU), _parse_ipv6(found))


def _parse_ipv6(attributes: dict[int, bytes]) -> bool | None:
    families = netlink.parse_attributes(attributes.get(_IFLA_AF_SPEC, b""))
    ipv6 = netlink.parse_attributes(families.get(socket.AF_INET6, b""))
    values = ipv6.get(_IFLA_INET6_CONF, b"")
    place = _DEVCONF_DISABLE_IPV6 * 4
    return any(values[place : place + 4]) if len(values) >= place + 4 else None


def _apply(kernel: netlink.Socket, interface: Interface) -> bool:
    """Make the NIC what is described, if it is there; tell whether it is."""
    with _changing:
        question = _IFINFOMSG.pack(0, 0, 0, 0, 0) + attribute(_IFLA_EXT_MASK, _RTEXT_FILTER_SKIP_STATS)
        links = [parse_link(body) for body in kernel.dump(netlink.RTM_GETLINK, question)]
        link = find_link(links, interface.device)
        if link is None:
            return False
        for other in links:
            if other.name == interface.name and other.ifindex != link.ifindex:
                _change(kernel, other, attribute(_IFLA_IFNAME, b"moved%d\0" % other.ifindex), other.flags)
        # Before it goes up: then the kernel would begin to use IPv6 at once.
        if link.ipv6_disabled not in (None, interface.disable_ipv6):
            (_CONF / link.name / "disable_ipv6").write_text(f"{interface.disable_ipv6:d}\n")
        _change_link(kernel, link, interface)
        _change_addresses(kernel, link, interface)
    return True


def _change_link(kernel: netlink.Socket, link: Link, interface: Interface) -> None:
    attributes = b""
    if link.address != interface.hardware_address:
        attributes += attribute(_IFLA_ADDRESS, interface.hardware_address)
    if interface.mtu not in (0, link.mtu):
        attributes += attribute(_IFLA_MTU, interface.mtu)
    if link.name != interface.name:
        attributes += attribute(_IFLA_IFNAME, interface.name.encode() + b"\0")
    flags = _IFF_UP * interface.up | _IFF_NOARP * interface.no_arp
    if attributes or (link.flags ^ flags) & (_IFF_UP | _IFF_NOARP):
        _change(kernel, link, attributes, flags)


def _change(kernel: netlink.Socket, link: Link, attributes: bytes, flags: int) -> None:
    """Change attributes, and then IFF_UP and IFF_NOARP to what they are in ``flags``."""
    body = _IFINFOMSG.pack(0, 0, link.ifindex, flags, _IFF_UP | _IFF_NOARP) + attributes
    try:
        kernel.request(netlink.RTM_NEWLINK, body)
    except OSError as error:
        # Before Linux 6.2 the name changes only while it is down; with some drivers the hardware address, too.
        if error.errno != errno.EBUSY or not link.flags & _IFF_UP:
            raise
        kernel.request(netlink.RTM_NEWLINK, _IFINFOMSG.pack(0, 0, link.ifindex, 0, _IFF_UP))
        kernel.request(netlink.RTM_NEWLINK, body)


def _change_addresses(kernel: netlink.Socket, link: Link, interface: Interface) -> None:
    wanted = dict.fromkeys(_normal(each) for each in interface.addresses)
    made = {_LINK_LOCAL + _eui64(each) for each in (link.address, link.permanent, interface.hardware_address)}
    found = _addresses(kernel, link.ifindex)
    surplus = [each for each in found if each.address not in wanted and not _is_kernels_own(each, made)]
    if surplus:
        outcomes = kernel.request_all([netlink.Request(netlink.RTM_DELADDR, each.body) for each in surplus])
        for one, error in zip(surplus, outcomes, strict=True):
            if error and error.errno != errno.EADDRNOTAVAIL:
                raise from_os(f"remove address {text_of(one.address.address)} of {interface.name}", error) from error
        # With the first address of an IPv4 subnet its others go, too, those that are wanted among them.
        found = _addresses(kernel, link.ifindex)
    present = {each.address for each in found}
    missing = [each for each in wanted if each not in present]
    # Of IPv6 addresses the kernel prefers the one that came last.
    missing = [each for each in missing if len(each.address) == 4] + [
        each for each in reversed(missing) if len(each.address) == 16
    ]
    outcomes = kernel.request_all([_addition(link.ifindex, each) for each in missing])
    for address, error in zip(missing, outcomes, strict=True):
        if error:
            raise from_os(f"add address {text_of(address.address)} to {interface.name}", error) from error


def _addresses(kernel: netlink.Socket, index: int) -> list[Found]:
    bodies = kernel.dump(netlink.RTM_GETADDR, _IFADDRMSG.pack(0, 0, 0, 0, 0))
    return [found for found in map(parse_address, bodies) if found and found.ifindex == index]


def parse_address(body: bytes) -> Found | None:
    """Return the address of which an RTM_NEWADDR message tells; None if it is not one of IP. Raises OSError."""
    family, prefix_length, flags, scope, index = netlink.unpack(_IFADDRMSG, body)
    size = _SIZES.get(family)
    if size is None:
        return None
    attributes = netlink.parse_attributes(body, _IFADDRMSG.size)
    local = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS, b"")
    peer = attributes.get(_IFA_ADDRESS, local)
    broadcast = attributes.get(_IFA_BROADCAST, b"") if size == 4 else b""
    if {len(local), len(peer), len(broadcast) or size} != {size} or prefix_length > size * 8:
        raise OSError(errno.EBADMSG, "malformed address")
    flags = netlink.number(attributes, _IFA_FLAGS, flags)
    address = InterfaceAddress(local, prefix_length, peer, broadcast, scope, bool(flags & _IFA_F_NOPREFIXROUTE))
    return Found(index, _normal(address), flags, netlink.number(attributes, _IFA_PROTO), body)


def _normal(address: InterfaceAddress) -> InterfaceAddress:
    """Return an address such that two that are the same to the kernel are equal."""
    peer = address.peer if address.peer != address.address else b""
    # An IPv6 address has the scope that it has by its value.
    return replace(address, peer=peer, scope=address.scope if len(address.address) == 4 else 0)


def _is_kernels_own(found: Found, link_locals: set[bytes]) -> bool:
    if not found.flags & _IFA_F_PERMANENT or found.flags & _IFA_F_MANAGETEMPADDR:
        return True
    return found.protocol == _IFAPROT_KERNEL_LL or found.address.address in link_locals


def _eui64(mac: bytes) -> bytes:
    """Return the interface identifier that the kernel makes of a hardware address (RFC 4291, appendix A)."""
    return bytes((mac[0] ^ 2,)) + mac[1:3] + b"\xff\xfe" + mac[3:] if len(mac) == 6 else b""


def _addition(index: int, address: InterfaceAddress) -> netlink.Request:
    flags = _IFA_F_NOPREFIXROUTE * address.no_prefix_route
    if len(address.address) == 16:
        flags |= _IFA_F_NODAD  # the address was in use already, on the host
    body = _IFADDRMSG.pack(family_of(address.address), address.prefix_length, 0, address.scope, index)
    body += attribute(_IFA_LOCAL, address.address) + attribute(_IFA_ADDRESS, address.peer or address.address)
    if address.broadcast:
        body += attribute(_IFA_BROADCAST, address.broadcast)
    if flags:
        body += attribute(_IFA_FLAGS, flags)
    # Replaces the same one: a link-local may have come meanwhile.
    return netlink.Request(netlink.RTM_NEWADDR, body, netlink.NLM_F_CREATE | netlink.NLM_F_REPLACE)


def index_of(name: str) -> int:
    """Return the index of an interface. Raises NotFound."""
    try:
        return socket.if_nametoindex(name)
    except OSError as error:
        raise NotFound(f"there is no interface {name}") from error


def family_of(address: bytes) -> int:
    """Return the AF_* of an IP address."""
    return int(socket.AF_INET6 if len(address) == 16 else socket.AF_INET)


def text_of(address: bytes) -> str:
    """Return an IP address as people write it."""
    return socket.inet_ntop(family_of(address), address)


def check_name(name: str) -> None:
    """Raise InvalidArgument unless ``name`` can be an interface's (dev_valid_name() in net/core/dev.c)."""
    size = len(name.encode(errors="replace"))
    # The kernel takes a percent sign for a pattern.
    bad = not name.isprintable() or any(each in "/:%" or each.isspace() for each in name)
    if bad or not 0 < size <= _NAME_MAX or name in (".", ".."):
        raise InvalidArgument(f"not an interface's name: {name[:32]!r}")


def check_address(address: bytes, what: str) -> None:
    """Raise InvalidArgument unless these are the bytes of an IP address."""
    if len(address) not in (4, 16):
        raise InvalidArgument(f"{what} has {len(address)} bytes, not 4 or 16")


def check_hardware_address(address: bytes) -> None:
    """Raise InvalidArgument unless these are the bytes of an Ethernet address of one station."""
    if len(address) != 6 or address[0] & 1 or not any(address):
        raise InvalidArgument(f"not a hardware address: {address[:16].hex(':')!r}")


def check_mtu(mtu: int) -> None:
    """Raise InvalidArgument unless ``mtu`` is one, in bytes, or 0."""
    if mtu:
        check_range(mtu, _MTU_MIN, _MTU_MAX, "an MTU")


def check_range(value: int, low: int, high: int, what: str) -> None:
    """Raise InvalidArgument unless ``value`` is within these bounds."""
    if not low <= value <= high:
        raise InvalidArgument(f"{what} of {value} is not within {low} to {high}")
