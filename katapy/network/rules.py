"""What a guest may send: pure functions from an interface's addresses to the filters at its tap.

A frame is handed to the pod's network if it bears the interface's own addresses; everything else goes to a sink, an
interface that nobody reads, so that neither the host's own network stack nor another pod ever sees it. Offsets are
those of Ethernet frames seen from their network header. Sources: RFC 826 (ARP), RFC 5227 (probes), RFC 791, RFC 8200,
RFC 4861 (neighbour discovery), RFC 4862 (detection of duplicates), RFC 3590 (MLD without an address), RFC 4291
appendix A (interface identifiers).
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from typing import Final

from katapy.interfaces import Interface
from katapy.network.netlink import ETH_P_ALL, Filter, Key

_IPV4, _ARP, _IPV6 = 0x0800, 0x0806, 0x86DD
_UDP, _ICMPV6 = 17, 58
_HOP_BY_HOP: Final = 0
_DHCP_SERVER_PORT: Final = 67
_ROUTER_SOLICITATION, _ROUTER_ADVERTISEMENT, _REDIRECT = 133, 134, 137
_NEIGHBOUR_SOLICITATION, _NEIGHBOUR_ADVERTISEMENT = 135, 136
_LISTENER_REPORTS: Final = (131, 143)
# Before what they carry: hop-by-hop options, routing, fragment, destination options.
_EXTENSIONS: Final = (_HOP_BY_HOP, 43, 44, 60)
_HOP_LIMIT_MAX: Final = 255  # what neighbour discovery demands, and hardly anything else has
_METADATA: Final = ("169.254.169.254", "fd00:ec2::254")
_ONES: Final = 0xFFFF_FFFF
PRIORITIES: Final = 4  # the filters have those from 1 to this

Keys = tuple[Key, ...]


def outgoing(interface: Interface, *, target: int, sink: int, checked: bool, metadata: bool) -> list[Filter]:
    """Return the filters for what the guest sends through ``interface``, in their order.

    ``target`` and ``sink`` are indexes of interfaces. Without ``checked`` everything passes; with ``metadata`` the
    addresses of clouds' metadata services are no exception.
    """
    if not checked:
        return [Filter(1, ETH_P_ALL, (), target)]
    sent = _sent_by(interface.hardware_address)
    found = [Filter(1, _IPV4, keys, target if passes else sink) for keys, passes in _ipv4(interface, sent, metadata)]
    found += [Filter(2, _ARP, keys, target if passes else sink) for keys, passes in _arp(interface, sent)]
    if not interface.disable_ipv6:
        for keys, passes in _ipv6(interface, sent, metadata):
            found.append(Filter(3, _IPV6, keys, target if passes else sink))
    found.append(Filter(4, ETH_P_ALL, (), sink))
    return found


def incoming(priority: int, target: int) -> Filter:
    """Return the filter that hands everything that comes for a pod to its guest."""
    return Filter(priority, ETH_P_ALL, (), target)


def _ipv4(interface: Interface, sent: Keys, metadata: bool) -> Iterator[tuple[Keys, bool]]:
    for offset in (12, 16):
        yield (Key(127 << 24, 0xFF00_0000, offset),), False
    if not metadata:
        yield _words(_METADATA[0], 16), False
    if not interface.addresses:
        # Whoever serves addresses gives it one that only the guest gets to know.
        yield sent, True
    for address in _own(interface, socket.AF_INET):
        yield (*sent, *_words(address, 12)), True
    # A client of DHCP has no address yet. Without options: 5 words of header.
    asks = Key(0x4500_0000, 0xFF00_0000, 0), Key(_UDP << 16, 0x00FF_0000, 8), Key(_DHCP_SERVER_PORT, 0xFFFF, 20)
    yield (*sent, *asks, *_words("0.0.0.0", 12)), True
    yield (), False


def _arp(interface: Interface, sent: Keys) -> Iterator[tuple[Keys, bool]]:
    hardware = bytes.fromhex(interface.hardware_address.replace(":", ""))
    # Of Ethernet and IPv4, 6 and 4 bytes long: or the sender's addresses would be elsewhere.
    form = (*sent, Key(0x0001_0800, _ONES, 0), Key(0x0604_0000, 0xFFFF_0000, 4))
    if not interface.addresses:
        yield (*form, *_key_bytes(hardware, 8)), True
    for address in _own(interface, socket.AF_INET):
        yield (*form, *_key_bytes(hardware + socket.inet_pton(socket.AF_INET, address), 8)), True
        # A probe. One for an address that another host is about to take would keep it from that.
        probe = _key_bytes(hardware + socket.inet_pton(socket.AF_INET, "0.0.0.0"), 8)
        yield (*form, *probe, *_words(address, 24)), True
    yield (), False


def _ipv6(interface: Interface, sent: Keys, metadata: bool) -> Iterator[tuple[Keys, bool]]:
    for header in _EXTENSIONS:
        # What is to be looked at would hide behind it (RFC 7113).
        yield (Key(header << 8 | _HOP_LIMIT_MAX, 0xFFFF, 4),), False
    for kind in (_ROUTER_ADVERTISEMENT, _REDIRECT):
        yield _icmpv6(kind), False
    yield _words("::1", 24), False
    if not metadata:
        yield _words(_METADATA[1], 24), False
    own = [_words(address, 8) for address in _own(interface, socket.AF_INET6)]
    # Whatever the prefix, link-local or advertised by a router: this half can be nobody else's.
    own.append(_key_bytes(_interface_identifier(interface.hardware_address), 16))
    for keys in own:
        # A kernel announces an address from that address.
        yield (*sent, *_icmpv6(_NEIGHBOUR_ADVERTISEMENT), *keys, *_as_target(keys)), True
    yield _icmpv6(_NEIGHBOUR_ADVERTISEMENT), False
    for keys in own:
        yield (*sent, *keys), True
    yield from _ipv6_unspecified((*sent, *_words("::", 8)), own)
    yield (), False


def _ipv6_unspecified(sent: Keys, own: Sequence[Keys]) -> Iterator[tuple[Keys, bool]]:
    """What a kernel sends while it has no address yet, and nothing else."""
    for keys in own:
        # Is anybody else using it? Who asks that of another host's address keeps it from taking that.
        yield (*sent, *_icmpv6(_NEIGHBOUR_SOLICITATION), *_as_target(keys)), True
    yield (*sent, *_icmpv6(_ROUTER_SOLICITATION)), True
    # Behind hop-by-hop options of 8 bytes, the router alert.
    alert = Key(_HOP_BY_HOP << 8, 0xFF00, 4), Key(_ICMPV6 << 24, 0xFFFF_0000, 40)
    for kind in _LISTENER_REPORTS:
        yield (*sent, *alert, Key(kind << 24, 0xFF00_0000, 48)), True


def _as_target(keys: Keys) -> Keys:
    """Return the keys that compare with the address that a neighbour discovery message is about, not with its source.

    That is 8 bytes behind the header of 40, the source 8 bytes into it.
    """
    return tuple(key._replace(offset=key.offset + 40) for key in keys)


def _own(interface: Interface, family: socket.AddressFamily) -> list[str]:
    # One of IPv6 may be written with dots, too.
    return [each.address for each in interface.addresses if (":" in each.address) is (family is socket.AF_INET6)]


def _sent_by(hardware_address: str) -> Keys:
    """The frame's source: bytes -8 to -2."""
    return _key_bytes(bytes.fromhex(hardware_address.replace(":", "")), -8)


def _icmpv6(kind: int) -> Keys:
    return Key(_ICMPV6 << 8, 0xFF00, 4), Key(kind << 24, 0xFF00_0000, 40)


def _words(address: str, offset: int) -> Keys:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return _key_bytes(socket.inet_pton(family, address), offset)


def _key_bytes(data: bytes, offset: int) -> Keys:
    """Return the keys that compare ``data`` at ``offset``, a multiple of four, and nothing behind it."""
    keys = []
    for index in range(0, len(data), 4):
        word = data[index : index + 4]
        mask = _ONES << 8 * (4 - len(word)) & _ONES
        keys.append(Key(int.from_bytes(word.ljust(4, b"\0"), "big"), mask, offset + index))
    return tuple(keys)


def _interface_identifier(hardware_address: str) -> bytes:
    """Return the second half of the addresses that a kernel makes from its own hardware address (modified EUI-64)."""
    octets = bytes.fromhex(hardware_address.replace(":", ""))
    return bytes((octets[0] ^ 2,)) + octets[1:3] + b"\xff\xfe" + octets[3:]
