"""rtnetlink, and the only module that knows pyroute2: its messages encode and decode, its types stay inside.

Source: rtnetlink(7), linux/rtnetlink.h, linux/if_link.h, linux/pkt_sched.h, linux/pkt_cls.h. The library's own
sockets are left out: with asyncio, databases and all they take three times as long to import as its messages do, and
this is imported while a container starts.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from katapy import lean
from katapy.errors import KatapyError, Unavailable, Unsupported
from katapy.interfaces import Address, Neighbour, NextHop, Route

lean.skip_pyroute2_package()

from pyroute2.netlink import nla, nlmsg  # noqa: E402
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg  # noqa: E402
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg  # noqa: E402
from pyroute2.netlink.rtnl.ndmsg import ndmsg  # noqa: E402
from pyroute2.netlink.rtnl.rtmsg import rtmsg  # noqa: E402
from pyroute2.netlink.rtnl.tcmsg import tcmsg  # noqa: E402

IFF_UP: Final = 0x1
IFF_NOARP: Final = 0x80
IFF_ALLMULTI: Final = 0x200
ETH_P_ALL: Final = 0x0003
ROOT: Final = 0xFFFF_FFFF
INGRESS: Final = 0xFFFF_FFF1
# Where filters are hung up: on what comes in, which two kinds of qdisc have, and, in the second, on what goes out.
_FILTER_PARENTS: Final = {"ingress": 0xFFFF_0000, "clsact": 0xFFFF_FFF2, "egress": 0xFFFF_FFF3}

_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLM_F_REQUEST, _NLM_F_MULTI, _NLM_F_ACK, _NLM_F_DUMP = 0x1, 0x2, 0x4, 0x300
_NLM_F_DUMP_INTR: Final = 0x10
_NLM_F_CREATE, _NLM_F_EXCL = 0x400, 0x200
_NLMSG: Final = struct.Struct("=IHHII")  # length, type, flags, sequence number, port
_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK = 16, 17, 18
_RTM_GETADDR, _RTM_GETROUTE, _RTM_GETNEIGH = 22, 26, 30
_RTM_NEWQDISC, _RTM_DELQDISC, _RTM_GETQDISC = 36, 37, 38
_RTM_NEWTFILTER, _RTM_DELTFILTER, _RTM_GETTFILTER = 44, 45, 46
_SOL_NETLINK: Final = 270
_NETLINK_EXT_ACK, _NETLINK_GET_STRICT_CHK = 11, 12
_NLM_F_CAPPED, _NLM_F_ACK_TLVS = 0x100, 0x200
_NLMSGERR_ATTR_MSG: Final = 1
_RECEIVE: Final = 1 << 18
_DUMP_ATTEMPTS: Final = 8
_GROUPS: Final = 0x1 | 0x4 | 0x10 | 0x40 | 0x100 | 0x400  # RTMGRP_ of links, neighbours, addresses and routes

_IFA_F_TEMPORARY, _IFA_F_PERMANENT, _IFA_F_NOPREFIXROUTE = 0x01, 0x80, 0x200
_NUD_PERMANENT: Final = 0x80
_RT_TABLE_LOCAL: Final = 255
_RT_SCOPE_LINK: Final = 253
_RTM_F_CLONED: Final = 0x200
_RTNH_F_ONLINK: Final = 4
_RTPROT_RA: Final = 9
# Those that say where packets go; the kernel makes the others (local, broadcast, anycast, multicast) by itself.
_RTN_CONFIGURED: Final = frozenset((1, 6, 7, 8, 9))  # unicast, blackhole, unreachable, prohibit, throw
_RTAX_MTU: Final = 2
_MIRRED_EGRESS_REDIRECT: Final = 1
_TC_ACT_STOLEN: Final = 4
_TC_U32_TERMINAL: Final = 1


@dataclass(frozen=True)
class Link:
    """An interface as the kernel tells of it; ``kind`` is empty for hardware, ``peer`` the index of a veth's other end.

    ``peer_elsewhere`` tells whether that one is in another namespace.
    """

    index: int
    name: str
    kind: str
    hardware_address: str
    hardware_type: int
    mtu: int
    flags: int
    carrier: bool
    queue: int
    peer: int
    peer_elsewhere: bool
    tap: bool


class Key(NamedTuple):
    """What a u32 filter compares: 32 bits at ``offset`` bytes from the network header, big-endian, under a mask."""

    value: int
    mask: int
    offset: int


class Filter(NamedTuple):
    """A u32 filter that hands a frame to the egress of an interface, or with 0 lets it pass, if every key matches.

    ``protocol`` is an EtherType; of the filters of one priority, which must have one protocol, the first counts.
    ``note`` is a number that the kernel keeps (a class, which nothing here goes by).
    """

    priority: int
    protocol: int
    keys: tuple[Key, ...]
    target: int
    note: int = 0


class Qdisc(NamedTuple):
    """A queueing discipline at a place of an interface."""

    kind: str
    handle: int
    parent: int


class _U32(nla):  # type: ignore[misc]
    """The options of a u32 filter: the library's own knows no offset below 0, where a frame's addresses are."""

    nla_map = (("TCA_U32_UNSPEC", "none"), ("TCA_U32_CLASSID", "uint32"), ("TCA_U32_HASH", "uint32"),
               ("TCA_U32_LINK", "uint32"), ("TCA_U32_DIVISOR", "uint32"), ("TCA_U32_SEL", "cdata"),
               ("TCA_U32_POLICE", "hex"), ("TCA_U32_ACT", "actions"))  # fmt: skip

    class actions(nla):  # type: ignore[misc]  # noqa: N801 - named by nla_map
        nla_map = (("TCA_ACT_PRIO_0", "none"), ("TCA_ACT_PRIO_1", "action"))

        class action(nla):  # type: ignore[misc]  # noqa: N801
            nla_map = (("TCA_ACT_UNSPEC", "none"), ("TCA_ACT_KIND", "asciiz"), ("TCA_ACT_OPTIONS", "mirred"))

            class mirred(nla):  # type: ignore[misc]  # noqa: N801
                nla_flags = 1 << 15  # NLA_F_NESTED
                nla_map = (("TCA_MIRRED_UNSPEC", "none"), ("TCA_MIRRED_TM", "cdata"), ("TCA_MIRRED_PARMS", "cdata"))


class _Tbf(nla):  # type: ignore[misc]
    """The options of a tbf: with the library's own, no rate of 4 GiB a second and none below 250 bytes fits."""

    nla_map = (("TCA_TBF_UNSPEC", "none"), ("TCA_TBF_PARMS", "cdata"), ("TCA_TBF_RTAB", "cdata"),
               ("TCA_TBF_PTAB", "cdata"), ("TCA_TBF_RATE64", "uint64"), ("TCA_TBF_PRATE64", "uint64"),
               ("TCA_TBF_BURST", "uint32"))  # fmt: skip


class _Filter(nlmsg):  # type: ignore[misc]
    """A message about a filter or a qdisc (struct tcmsg), of which only those made here have options that are read."""

    prefix = "TCA_"
    fields = tcmsg.fields
    nla_map = (("TCA_UNSPEC", "none"), ("TCA_KIND", "asciiz"), ("TCA_OPTIONS", "get_options"))

    @staticmethod
    def get_options(self: Any, *_arguments: Any, **_more: Any) -> Any:
        return {"u32": _U32, "tbf": _Tbf}.get(self.get_attr("TCA_KIND"), self.cdata)


_MIRRED: Final = struct.Struct("=IIiiiiI")  # struct tc_mirred: index, capab, action, refcnt, bindcnt, eaction, ifindex
_SELECTOR: Final = struct.Struct("=BBBxHHhhI")  # struct tc_u32_sel
_KEY: Final = struct.Struct("=4s4sii")  # struct tc_u32_key: mask, value, offset, offset mask
# struct tc_tbf_qopt: its rate's last member, a peak rate (none), limit, buffer, mtu (told otherwise, none)
_TBF: Final = struct.Struct("=8xI12xIII")
_U32_MAX: Final = 0xFFFF_FFFF


class Netlink:
    """A connection to the kernel about the network namespace that this thread is in."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        self._sequence = 0

    def fileno(self) -> int:
        """The descriptor."""
        return self._socket.fileno()

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    # -- what there is

    def links(self) -> list[Link]:
        """Return all interfaces."""
        return [_link(message) for message in self._dump(_RTM_GETLINK, ifinfmsg())]

    def addresses(self) -> dict[int, list[Address]]:
        """Return the addresses that somebody gave to interfaces, by their indexes; what the kernel learns is left out.

        IPv6's link-local ones, too: every kernel makes its own from the hardware address.
        """
        found: dict[int, list[Address]] = {}
        for message in self._dump(_RTM_GETADDR, _of_any_family(ifaddrmsg())):
            flags = message.get_attr("IFA_FLAGS") or message["flags"]
            if not flags & _IFA_F_PERMANENT:
                continue
            # Of IPv4, the same flag says that an address is not the first of its network.
            if message["family"] == socket.AF_INET6 and (
                flags & _IFA_F_TEMPORARY or message["scope"] == _RT_SCOPE_LINK
            ):
                continue
            other = message.get_attr("IFA_ADDRESS")
            local = message.get_attr("IFA_LOCAL") or other
            found.setdefault(message["index"], []).append(
                Address(
                    address=local,
                    prefix_length=message["prefixlen"],
                    peer=other if other != local else "",
                    broadcast=message.get_attr("IFA_BROADCAST") or "",
                    scope=message["scope"],
                    no_prefix_route=bool(flags & _IFA_F_NOPREFIXROUTE),
                )
            )
        return found

    def routes(self, names: dict[int, str]) -> list[Route]:
        """Return the routes over the interfaces ``names``, by index, and those that lead nowhere.

        What a kernel makes or learns by itself is left out: the local table, IPv6's link-local and multicast routes,
        routes that a router has advertised. Raises Unsupported for an encapsulation.
        """
        routes = [self._route(message, names) for message in self._dump(_RTM_GETROUTE, _of_any_family(rtmsg()))]
        return [route for route in routes if route is not None]

    def _route(self, message: Any, names: dict[int, str]) -> Route | None:
        family = {int(socket.AF_INET): 4, int(socket.AF_INET6): 6}.get(message["family"])
        table = message.get_attr("RTA_TABLE") or message["table"]
        if family is None or table == _RT_TABLE_LOCAL or message["type"] not in _RTN_CONFIGURED:
            return None
        if message["flags"] & _RTM_F_CLONED or message["proto"] == _RTPROT_RA:
            return None
        destination = message.get_attr("RTA_DST") or ""
        if family == 6 and _is_link_local_or_multicast(destination):
            return None
        interface = names.get(message.get_attr("RTA_OIF") or 0, "")
        hops = message.get_attr("RTA_MULTIPATH") or []
        if any(each.get_attr("RTA_ENCAP_TYPE") for each in (message, *hops)):
            where = interface or next((names[hop["oif"]] for hop in hops if hop["oif"] in names), "")
            raise Unsupported(f"cannot connect {where}: its route to {destination or 'default'} is encapsulated")
        next_hops = tuple(
            NextHop(names[hop["oif"]], _gateway(hop), hop["hops"] + 1, bool(hop["flags"] & _RTNH_F_ONLINK))
            for hop in hops
            if hop["oif"] in names
        )
        if message["type"] == 1 and not interface and not next_hops:
            return None
        metrics = message.get_attr("RTA_METRICS")
        return Route(
            family=family,
            destination=destination,
            prefix_length=message["dst_len"],
            interface="" if next_hops or message["type"] != 1 else interface,
            gateway="" if next_hops else _gateway(message),
            preferred_source=message.get_attr("RTA_PREFSRC") or "",
            metric=message.get_attr("RTA_PRIORITY") or 0,
            scope=message["scope"],
            table=table,
            type=message["type"],
            protocol=message["proto"],
            on_link=bool(message["flags"] & _RTNH_F_ONLINK),
            mtu=(metrics.get_attr("RTAX_MTU") or 0) if metrics is not None else 0,
            next_hops=next_hops,
        )

    def neighbours(self, names: dict[int, str]) -> list[Neighbour]:
        """Return the permanent neighbours on the interfaces ``names``, by index."""
        return [
            Neighbour(names[message["ifindex"]], message.get_attr("NDA_DST"), message.get_attr("NDA_LLADDR"))
            for message in self._dump(_RTM_GETNEIGH, _of_any_family(ndmsg()))
            if message["ifindex"] in names
            and message["state"] & _NUD_PERMANENT
            and message["family"] in (socket.AF_INET, socket.AF_INET6)
            and message.get_attr("NDA_DST")
            and message.get_attr("NDA_LLADDR")
            and not _is_link_local_or_multicast(message.get_attr("NDA_DST"))
        ]

    def qdiscs(self, index: int) -> list[Qdisc]:
        """Return the queueing disciplines of an interface."""
        message = tcmsg()
        message["index"] = index
        return [
            Qdisc(each.get_attr("TCA_KIND"), each["handle"], each["parent"])
            for each in self._dump(_RTM_GETQDISC, message)
            if each["index"] == index
        ]

    def redirects(self, index: int, qdisc: str) -> list[tuple[int, int, int]]:
        """Return the filters on what comes in at an interface that has ``qdisc``: priority, target and note.

        The target is 0 for a filter that does something else than handing frames over.
        """
        message = _Filter()
        message["index"], message["parent"] = index, _FILTER_PARENTS[qdisc]
        found = []
        for each in self._dump(_RTM_GETTFILTER, message):
            if (options := each.get_attr("TCA_OPTIONS")) is None:
                continue  # that there is a priority
            target = note = 0
            if each.get_attr("TCA_KIND") == "u32":
                if options.get_attr("TCA_U32_SEL") is None:
                    continue  # the table that its filters are in
                target = _target(options)
                note = options.get_attr("TCA_U32_CLASSID") or 0
            found.append((each["info"] >> 16, target, note))
        return found

    # -- what changes

    def watch(self) -> socket.socket:
        """Return a socket, non-blocking, that has something to read whenever the namespace's network has changed."""
        watching = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        watching.bind((0, _GROUPS))
        watching.setblocking(False)
        return watching

    def set_link(self, index: int, *, mtu: int = 0, flags: int = IFF_UP, queue: int | None = None) -> None:
        """Bring an interface up, set its MTU in bytes (0: as it is), and its queue's length in packets.

        ``flags`` are those that it is to have, others stay.
        """
        message = ifinfmsg()
        message["index"], message["change"], message["flags"] = index, flags, flags
        message["attrs"] = [("IFLA_MTU", mtu)] if mtu else []
        if queue is not None:
            message["attrs"] += [("IFLA_TXQLEN", queue)]
        self._request(_RTM_NEWLINK, message)

    def add_macvtap(self, name: str, lower: int) -> None:
        """Make a macvtap that takes over all of the interface ``lower`` (passthru)."""
        message = ifinfmsg()
        mode = {"attrs": [("IFLA_MACVTAP_MODE", "passthru")]}
        info = {"attrs": [("IFLA_INFO_KIND", "macvtap"), ("IFLA_INFO_DATA", mode)]}
        message["attrs"] = [("IFLA_IFNAME", name), ("IFLA_LINK", lower), ("IFLA_LINKINFO", info)]
        self._request(_RTM_NEWLINK, message, _NLM_F_CREATE | _NLM_F_EXCL)

    def add_ingress(self, index: int, kind: str = "ingress", *, filtered: Filter | None = None) -> None:
        """Make the place for filters on what comes in at an interface, with ``clsact`` on what goes out too.

        A first filter on what comes in is ``filtered``: whoever is killed leaves both or neither.
        """
        message = tcmsg()
        message["index"], message["handle"], message["parent"] = index, 0xFFFF_0000, INGRESS
        message["attrs"] = [("TCA_KIND", kind)]
        requests = [encode(_RTM_NEWQDISC, message, _NLM_F_CREATE | _NLM_F_EXCL)]
        if filtered is not None:
            requests.append(_add_filter(index, kind, filtered))
        self._exchange(*requests)

    def add_rate(self, index: int, handle: int, *, rate: int, burst: int, limit: int) -> None:
        """Limit what goes out at an interface: ``rate`` in bytes a second, ``burst`` and what waits in bytes (tbf)."""
        message = _Filter()
        message["index"], message["handle"], message["parent"] = index, handle, ROOT
        parameters = _TBF.pack(min(rate, _U32_MAX), min(limit, _U32_MAX), 0, 0)
        options = [
            ("TCA_TBF_PARMS", parameters),
            ("TCA_TBF_RATE64", rate),
            ("TCA_TBF_BURST", min(burst, _U32_MAX)),
        ]
        message["attrs"] = [("TCA_KIND", "tbf"), ("TCA_OPTIONS", {"attrs": options})]
        self._request(_RTM_NEWQDISC, message, _NLM_F_CREATE | _NLM_F_EXCL)

    def add_filter(self, index: int, qdisc: str, each: Filter) -> None:
        """Add a filter to an interface that has ``qdisc``, or at its ``egress``, behind those of its priority."""
        self._exchange(_add_filter(index, qdisc, each))

    def delete(self, encoded: bytes) -> None:
        """Do what ``delete_*`` has written; that there is nothing to delete is no error."""
        try:
            self._exchange(encoded)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV, errno.EINVAL):
                raise _failure("undo", error) from error

    # -- I/O

    def _request(self, kind: int, message: nlmsg, flags: int = 0) -> None:
        self._exchange(encode(kind, message, flags))

    def _exchange(self, *requests: bytes) -> None:
        """Send requests, which the kernel does in one call of ours, and wait for the acknowledgements.

        Raises OSError, the first one's; the kernel tries the others all the same.
        """
        self._sequence += 1
        data, missing = bytearray(), len(requests)
        for each in requests:
            start = len(data)
            data += each + bytes(-len(each) % 4)
            struct.pack_into("=I", data, start + 8, self._sequence)
        self._socket.send(data)
        failed: OSError | None = None
        for kind, flags, body in self._answers():
            if kind == _NLMSG_ERROR:
                try:
                    _raise(flags, body)
                except OSError as error:
                    failed = failed or error
                missing -= 1
                if not missing:
                    break
        if failed is not None:
            raise failed

    def _dump(self, kind: int, message: nlmsg) -> list[Any]:
        """Return all that the kernel answers. What changes meanwhile is read again, so often that it must rest once."""
        for _ in range(_DUMP_ATTEMPTS):
            self._sequence += 1
            data = bytearray(encode(kind, message, 0, dump=True))
            struct.pack_into("=I", data, 8, self._sequence)
            self._socket.send(data)
            found, consistent = [], True
            for answered, flags, body in self._answers():
                consistent = consistent and not flags & _NLM_F_DUMP_INTR
                if answered == _NLMSG_ERROR:
                    _raise(flags, body)
                if answered in (_NLMSG_ERROR, _NLMSG_DONE):
                    break
                decoded = type(message)(body)
                decoded.decode()
                found.append(decoded)
            if consistent:
                return found
        raise OSError(errno.EBUSY, "the network keeps changing")

    def _answers(self) -> Iterator[tuple[int, int, bytes]]:
        """Give the messages that answer the last request: their types, their flags, and they, header and all."""
        while True:
            data = self._socket.recv(_RECEIVE)
            while len(data) >= _NLMSG.size:
                length, kind, flags, sequence, _port = _NLMSG.unpack_from(data)
                if sequence == self._sequence:
                    yield kind, flags, data[:length]
                data = data[length + 3 & ~3 :]


def encode(kind: int, message: nlmsg, flags: int = 0, *, dump: bool = False) -> bytes:
    """Return a request as it is sent."""
    message["header"]["type"] = kind
    message["header"]["flags"] = _NLM_F_REQUEST | flags | (_NLM_F_DUMP if dump else _NLM_F_ACK)
    message.encode()
    return bytes(message.data)


def _add_filter(index: int, qdisc: str, each: Filter) -> bytes:
    message = _Filter()
    message["index"], message["parent"] = index, _FILTER_PARENTS[qdisc]
    message["info"] = each.priority << 16 | socket.htons(each.protocol)
    # Without keys it matches every frame, a key that compares no bit only one that has four bytes.
    selector = _SELECTOR.pack(_TC_U32_TERMINAL, 0, len(each.keys), 0, 0, 0, 0, 0)
    for key in each.keys:
        selector += _KEY.pack(key.mask.to_bytes(4, "big"), key.value.to_bytes(4, "big"), key.offset, 0)
    options: list[tuple[str, object]] = [("TCA_U32_CLASSID", each.note), ("TCA_U32_SEL", selector)]
    if each.target:
        parameters = _MIRRED.pack(0, 0, _TC_ACT_STOLEN, 0, 0, _MIRRED_EGRESS_REDIRECT, each.target)
        mirred = {"attrs": [("TCA_MIRRED_PARMS", parameters)]}
        action = {"attrs": [("TCA_ACT_KIND", "mirred"), ("TCA_ACT_OPTIONS", mirred)]}
        options.append(("TCA_U32_ACT", {"attrs": [("TCA_ACT_PRIO_1", action)]}))
    message["attrs"] = [("TCA_KIND", "u32"), ("TCA_OPTIONS", {"attrs": options})]
    return encode(_RTM_NEWTFILTER, message, _NLM_F_CREATE | _NLM_F_EXCL)


def delete_qdisc(index: int, qdisc: Qdisc) -> bytes:
    """Return the request that removes a queueing discipline, and the filters that are in it."""
    message = tcmsg()
    message["index"], message["handle"], message["parent"] = index, qdisc.handle, qdisc.parent
    return encode(_RTM_DELQDISC, message)


def delete_filters(index: int, qdisc: str, priority: int) -> bytes:
    """Return the request that removes all filters of one priority."""
    message = _Filter()
    message["index"], message["parent"] = index, _FILTER_PARENTS[qdisc]
    message["info"] = priority << 16
    return encode(_RTM_DELTFILTER, message)


def empty_queue(index: int) -> bytes:
    """Return the request that gives an interface a queue of no packets."""
    message = ifinfmsg()
    message["index"], message["attrs"] = index, [("IFLA_TXQLEN", 0)]
    return encode(_RTM_NEWLINK, message)


def delete_link(index: int) -> bytes:
    """Return the request that removes an interface."""
    message = ifinfmsg()
    message["index"] = index
    return encode(_RTM_DELLINK, message)


def _of_any_family(message: nlmsg) -> nlmsg:
    message["family"] = socket.AF_UNSPEC
    return message


def _raise(flags: int, body: bytes) -> None:
    """Raise what an answer says, with the kernel's own words where it has some (struct nlmsgerr)."""
    (code,) = struct.unpack_from("=i", body, _NLMSG.size)
    if code == 0:
        return
    words = ""
    if flags & _NLM_F_ACK_TLVS:
        (asked,) = struct.unpack_from("=I", body, _NLMSG.size + 4)
        position = _NLMSG.size + 4 + (_NLMSG.size if flags & _NLM_F_CAPPED else asked + 3 & ~3)
        while position + 4 <= len(body):
            length, kind = struct.unpack_from("=HH", body, position)
            if kind == _NLMSGERR_ATTR_MSG:
                words = body[position + 4 : position + length].rstrip(b"\0").decode(errors="replace")
            position += max(length + 3 & ~3, 4)
    text = os.strerror(-code)
    raise OSError(-code, f"{text} ({words})" if words else text)


def _failure(what: str, error: OSError) -> KatapyError:
    return Unavailable(f"cannot {what}: {error.strerror}")


def _link(message: Any) -> Link:
    info = message.get_attr("IFLA_LINKINFO")
    kind = (info.get_attr("IFLA_INFO_KIND") or "") if info is not None else ""
    data = info.get_attr("IFLA_INFO_DATA") if info is not None else None
    tap = kind == "tun" and (data is None or isinstance(data, str) or data.get_attr("IFLA_TUN_TYPE") == 2)
    return Link(
        index=message["index"],
        name=message.get_attr("IFLA_IFNAME") or "",
        kind=kind,
        hardware_address=message.get_attr("IFLA_ADDRESS") or "",
        hardware_type=message["ifi_type"],
        mtu=message.get_attr("IFLA_MTU") or 0,
        flags=message["flags"],
        carrier=bool(message.get_attr("IFLA_CARRIER")),
        queue=message.get_attr("IFLA_TXQLEN") or 0,
        peer=message.get_attr("IFLA_LINK") or 0,
        peer_elsewhere=message.get_attr("IFLA_LINK_NETNSID") is not None,
        tap=tap,
    )


def _gateway(message: Any) -> str:
    via = message.get_attr("RTA_VIA")
    return message.get_attr("RTA_GATEWAY") or (via["addr"] if via else "")


def _is_link_local_or_multicast(address: str) -> bool:
    if ":" not in address:
        return False
    first = socket.inet_pton(socket.AF_INET6, address)[:2]
    return first[0] == 0xFF or (first[0] == 0xFE and first[1] & 0xC0 == 0x80)


def _target(options: Any) -> int:
    actions = options.get_attr("TCA_U32_ACT")
    action = actions.get_attr("TCA_ACT_PRIO_1") if actions is not None else None
    if action is None or action.get_attr("TCA_ACT_KIND") != "mirred":
        return 0
    parameters = action.get_attr("TCA_ACT_OPTIONS").get_attr("TCA_MIRRED_PARMS")
    return int(_MIRRED.unpack_from(parameters)[6])


def names_of(links: Sequence[Link]) -> dict[int, str]:
    """Return the names of interfaces by their indexes."""
    return {link.index: link.name for link in links}
