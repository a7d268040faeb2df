"""The routes of the VM, of IPv4 and IPv6 and of all tables but `local`, which is the kernel's.

What is given and what is there are both brought into one form, in which equal means the same to the kernel; the
difference is what is removed and added.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from katapy_agent import netlink, network
from katapy_agent.errors import InvalidArgument, doing, from_os
from katapy_agent.netlink import attribute
from katapy_agent.network import check_address, check_mtu, check_name, check_range, text_of

_ROUTES_MAX: Final = 4096
_HOPS_MAX: Final = 256

_RTMSG: Final = struct.Struct("=BBBBBBBBI")
_RTNEXTHOP: Final = struct.Struct("=HBBi")

_RTA_DST: Final = 1
_RTA_IIF: Final = 3
_RTA_OIF: Final = 4
_RTA_GATEWAY: Final = 5
_RTA_PRIORITY: Final = 6
_RTA_PREFSRC: Final = 7
_RTA_METRICS: Final = 8
_RTA_MULTIPATH: Final = 9
_RTA_TABLE: Final = 15
_RTA_VIA: Final = 18
_RTA_ENCAP: Final = 22
_RTAX_MTU: Final = 2

_RTM_F_CLONED: Final = 0x200
_RTNH_F_ONLINK: Final = 4
_RT_TABLE_MAIN: Final = 254
_RT_TABLE_LOCAL: Final = 255
_RTPROT_BOOT: Final = 3
_RTPROT_RA: Final = 9
_RTN_UNICAST: Final = 1
# blackhole, unreachable, prohibit, throw: they lead nowhere. IPv6 says that they lead to lo.
_NOWHERE: Final = frozenset((6, 7, 8, 9))
_IP6_RT_PRIO_USER: Final = 1024  # what a metric of 0 means to IPv6
_LOOPBACK: Final = 1  # the index of lo in every network namespace
_FAMILIES: Final = {4: int(socket.AF_INET), 6: int(socket.AF_INET6)}


@dataclass(frozen=True)
class NextHop:
    """One of the ways of a route that has several."""

    interface: str
    gateway: bytes = b""
    weight: int = 1
    on_link: bool = False

    def __post_init__(self) -> None:
        check_name(self.interface)
        check_range(self.weight, 1, 256, "a weight")
        if self.gateway:
            check_address(self.gateway, "a gateway")


@dataclass(frozen=True)
class Route:
    """A route; ``family`` is 4 or 6, no destination is the default, no MTU (in bytes) the interface's.

    A table of 0 is the main one, a type of 0 unicast, a protocol of 0 boot.
    """

    family: int
    destination: bytes = b""
    prefix_length: int = 0
    interface: str = ""
    gateway: bytes = b""
    preferred_source: bytes = b""
    metric: int = 0
    scope: int = 0
    table: int = _RT_TABLE_MAIN
    type: int = _RTN_UNICAST
    protocol: int = _RTPROT_BOOT
    on_link: bool = False
    mtu: int = 0
    next_hops: tuple[NextHop, ...] = ()

    def __post_init__(self) -> None:
        if self.family not in _FAMILIES:
            raise InvalidArgument(f"a route's family of {self.family} is not 4 or 6")
        self._check_destination()
        for value, what in ((self.metric, "a metric"), (self.table, "a table")):
            check_range(value, 0, 0xFFFFFFFF, what)
        for value, what in ((self.scope, "a scope"), (self.type, "a type"), (self.protocol, "a protocol")):
            check_range(value, 0, 255, what)
        check_mtu(self.mtu)
        self._check_way()

    def _check_destination(self) -> None:
        size = 4 if self.family == 4 else 16
        if len(self.destination) not in (0, size) or len(self.preferred_source) not in (0, size):
            raise InvalidArgument("a route's address is not of its family")
        check_range(self.prefix_length, 0, len(self.destination) * 8, "a prefix length")
        if int.from_bytes(self.destination, "big") & (1 << len(self.destination) * 8 - self.prefix_length) - 1:
            raise InvalidArgument(f"{text_of(self.destination)}/{self.prefix_length} is not a network's address")

    def _check_way(self) -> None:
        if self.interface:
            check_name(self.interface)
        if self.gateway:
            check_address(self.gateway, "a gateway")
        if len(self.next_hops) > _HOPS_MAX:
            raise InvalidArgument(f"a route has more than {_HOPS_MAX} next hops")
        if self.next_hops and (self.interface or self.gateway):
            raise InvalidArgument("a route with next hops has an interface or a gateway as well")
        if not (self.interface or self.next_hops or self.type in _NOWHERE):
            raise InvalidArgument("a route that leads somewhere has no interface")


class Hop(NamedTuple):
    """A way, by the index of its interface."""

    ifindex: int
    gateway: bytes
    weight: int
    on_link: bool


class Form(NamedTuple):
    """A route such that two that are the same to the kernel are equal."""

    family: int
    destination: bytes
    prefix_length: int
    table: int
    metric: int
    type: int
    protocol: int
    scope: int
    preferred_source: bytes
    mtu: int
    hops: tuple[Hop, ...]
    # More than a Route can say: a type of service, a source, an encapsulation.
    special: bool = False


def update_routes(routes: Sequence[Route]) -> None:
    """Make the routes exactly these, but for those that the kernel has made or learnt by itself.

    Those are: table local, all of lo, types that lead to an address instead of a network (local, broadcast, anycast,
    multicast), IPv6's link-local and multicast networks, and what routers advertise. The same among ``routes`` are
    skipped. Raises KatapyError.
    """
    if len(routes) > _ROUTES_MAX:
        raise InvalidArgument(f"more than {_ROUTES_MAX} routes")
    names = {hop.interface for route in routes for hop in route.next_hops} | {route.interface for route in routes}
    indices = {name: network.index_of(name) for name in names - {""}}
    wanted = dict.fromkeys(form for form in (_form(route, indices) for route in routes) if not _is_kernels_own(form))
    with doing("update routes"), netlink.Socket() as kernel:
        present = set()
        surplus = []
        for body in kernel.dump(netlink.RTM_GETROUTE, _RTMSG.pack(*bytes(9))):
            form = parse_route(body)
            if form is None or _is_kernels_own(form):
                continue
            if form in wanted and form not in present:
                present.add(form)
            else:
                surplus.append((form, body))
        _remove(kernel, surplus)
        # The kernel refuses a gateway that it has no route to.
        _add(kernel, sorted((form for form in wanted if form not in present), key=_has_gateway))


def _remove(kernel: netlink.Socket, surplus: Sequence[tuple[Form, bytes]]) -> None:
    outcomes = kernel.request_all([netlink.Request(netlink.RTM_DELROUTE, body) for _, body in surplus])
    for (form, _), error in zip(surplus, outcomes, strict=True):
        if error and error.errno != errno.ESRCH:
            raise from_os(f"remove {_text(form)}", error) from error


def _add(kernel: netlink.Socket, forms: Sequence[Form]) -> None:
    flags = netlink.NLM_F_CREATE | netlink.NLM_F_APPEND
    outcomes = kernel.request_all([netlink.Request(netlink.RTM_NEWROUTE, encode(form), flags) for form in forms])
    for form, error in zip(forms, outcomes, strict=True):
        if error:
            raise from_os(f"add {_text(form)}", error) from error


def _form(route: Route, indices: Mapping[str, int]) -> Form:
    type_ = route.type or _RTN_UNICAST
    if route.next_hops:
        given = [(each.interface, each.gateway, each.weight, each.on_link) for each in route.next_hops]
    else:
        given = [(route.interface, route.gateway, 1, route.on_link)] if route.interface else []
    hops = [Hop(indices[name], gateway, weight, on_link) for name, gateway, weight, on_link in given]
    return _normal(
        Form(
            family=_FAMILIES[route.family],
            destination=route.destination,
            prefix_length=route.prefix_length,
            table=route.table or _RT_TABLE_MAIN,
            metric=route.metric,
            type=type_,
            protocol=route.protocol or _RTPROT_BOOT,
            scope=route.scope,
            preferred_source=route.preferred_source,
            mtu=route.mtu,
            hops=tuple(hops),
        )
    )


def _normal(form: Form) -> Form:
    hops = () if form.type in _NOWHERE else form.hops
    hops = (hops[0]._replace(weight=1),) if len(hops) == 1 else tuple(sorted(hops))
    if form.family == socket.AF_INET:
        destination = form.destination or bytes(4)
        return form._replace(destination=destination, hops=hops)
    # IPv6 has no scopes of routes.
    destination = form.destination or bytes(16)
    return form._replace(destination=destination, hops=hops, scope=0, metric=form.metric or _IP6_RT_PRIO_USER)


def _is_kernels_own(form: Form) -> bool:
    if form.table == _RT_TABLE_LOCAL or form.type not in {_RTN_UNICAST, *_NOWHERE}:
        return True
    if any(hop.ifindex == _LOOPBACK for hop in form.hops):
        return True
    if form.family == socket.AF_INET:
        return False
    first, second = form.destination[:2]
    link_local = form.prefix_length >= 10 and first == 0xFE and second & 0xC0 == 0x80
    return link_local or (form.prefix_length >= 8 and first == 0xFF) or form.protocol == _RTPROT_RA


def _has_gateway(form: Form) -> bool:
    return any(hop.gateway for hop in form.hops)


def parse_route(body: bytes) -> Form | None:
    """Return the route of which an RTM_NEWROUTE message tells; None if it is none of the tables'. Raises OSError."""
    family, prefix_length, source_length, tos, table, protocol, scope, type_, flags = netlink.unpack(_RTMSG, body)
    if family not in (socket.AF_INET, socket.AF_INET6) or flags & _RTM_F_CLONED:
        return None
    found = netlink.parse_attributes(body, _RTMSG.size)
    if len(found.get(_RTA_DST, b"")) not in (0, 4 if family == socket.AF_INET else 16):
        raise OSError(errno.EBADMSG, "malformed route")
    if _RTA_MULTIPATH in found:
        hops = _parse_hops(found[_RTA_MULTIPATH])
    elif index := netlink.number(found, _RTA_OIF):
        hops = (Hop(index, _gateway(found), 1, bool(flags & _RTNH_F_ONLINK)),)
    else:
        hops = ()
    return _normal(
        Form(
            family=family,
            destination=found.get(_RTA_DST, b""),
            prefix_length=prefix_length,
            table=netlink.number(found, _RTA_TABLE, table),
            metric=netlink.number(found, _RTA_PRIORITY),
            type=type_,
            protocol=protocol,
            scope=scope,
            preferred_source=found.get(_RTA_PREFSRC, b""),
            mtu=netlink.number(netlink.parse_attributes(found.get(_RTA_METRICS, b"")), _RTAX_MTU),
            hops=hops,
            special=bool(tos or source_length or _RTA_IIF in found or _RTA_ENCAP in found),
        )
    )


def _parse_hops(data: bytes) -> tuple[Hop, ...]:
    hops = []
    offset = 0
    while offset < len(data):
        size, flags, more, index = netlink.unpack(_RTNEXTHOP, data[offset:])
        if not _RTNEXTHOP.size <= size <= len(data) - offset:
            raise OSError(errno.EBADMSG, "malformed next hop")
        found = netlink.parse_attributes(data[offset : offset + size], _RTNEXTHOP.size)
        hops.append(Hop(index, _gateway(found), more + 1, bool(flags & _RTNH_F_ONLINK)))
        offset += size + 3 & ~3
    return tuple(hops)


def _gateway(attributes: Mapping[int, bytes]) -> bytes:
    # RTA_VIA begins with the family, of 16 bits.
    return attributes.get(_RTA_GATEWAY) or attributes.get(_RTA_VIA, b"")[2:]


def encode(form: Form) -> bytes:
    """Return the body of the message that adds a route."""
    family = form.family
    several = len(form.hops) > 1
    flags = _RTNH_F_ONLINK if form.hops and not several and form.hops[0].on_link else 0
    # The header's table has 8 bits, and does not count.
    header = (family, form.prefix_length, 0, 0, 0, form.protocol, form.scope, form.type, flags)
    body = _RTMSG.pack(*header) + attribute(_RTA_TABLE, form.table)
    if form.prefix_length:
        body += attribute(_RTA_DST, form.destination)
    if form.metric:
        body += attribute(_RTA_PRIORITY, form.metric)
    if form.preferred_source:
        body += attribute(_RTA_PREFSRC, form.preferred_source)
    if form.mtu:
        body += attribute(_RTA_METRICS, attribute(_RTAX_MTU, form.mtu))
    if several:
        body += attribute(_RTA_MULTIPATH, b"".join(_encode_hop(family, hop) for hop in form.hops))
    elif form.hops:
        body += attribute(_RTA_OIF, form.hops[0].ifindex) + _encode_gateway(family, form.hops[0].gateway)
    return body


def _encode_hop(family: int, hop: Hop) -> bytes:
    gateway = _encode_gateway(family, hop.gateway)
    size = _RTNEXTHOP.size + len(gateway)
    return _RTNEXTHOP.pack(size, _RTNH_F_ONLINK * hop.on_link, hop.weight - 1, hop.ifindex) + gateway


def _encode_gateway(family: int, gateway: bytes) -> bytes:
    if not gateway:
        return b""
    own = network.family_of(gateway)
    return attribute(_RTA_GATEWAY, gateway) if own == family else attribute(_RTA_VIA, struct.pack("=H", own) + gateway)


def _text(form: Form) -> str:
    ways = (f"via {text_of(hop.gateway)}" if hop.gateway else f"of interface {hop.ifindex}" for hop in form.hops)
    return " ".join(("route", f"{text_of(form.destination)}/{form.prefix_length}", *ways, f"in table {form.table}"))
