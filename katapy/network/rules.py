"""What a guest may send: pure functions from an interface's addresses to the filters at its tap.

A frame is handed to the pod's network if it bears the interface's own addresses; everything else goes to a sink, an
interface that nobody reads, so that neither the host's own network stack nor another pod ever sees it. Offsets are
those of Ethernet frames seen from their network header. Sources: RFC 826 (ARP), RFC 791, RFC 8200, RFC 4861 (neighbour
discovery), RFC 4291 appendix A (interface identifiers).
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Final

from katapy.interfaces import Interface
from katapy.network.netlink import ETH_P_ALL, Filter, Key

_IPV4, _ARP, _IPV6 = 0x0800, 0x0806, 0x86DD
_UDP, _ICMPV6 = 17, 58
_DHCP_SERVER_PORT: Final = 67
_ROUTER_ADVERTISEMENT, _NEIGHBOUR_ADVERTISEMENT, _REDIRECT = 134, 136, 137
# Before what they carry: hop-by-hop options, routing, fragment, destination options.
_EXTENSIONS: Final = (0, 43, 44, 60)
_HOP_LIMIT_MAX: Final = 255  # what neighbour discovery demands, and hardly anything else has
_METADATA: Final = ("169.254.169.254", "fd00:ec2::254")
_ONES: Final = 0xFFFF_FFFF

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
    own = _own(interface, socket.AF_INET)
    yield (Key(127 << 24, 0xFF00_0000, 16),), False
    if not metadata:
        yield _words(_METADATA[0], 16), False
    if not own:
        # Whoever serves addresses gives it one that only the guest gets to know.
        yield sent, True
    for address in own:
        yield (*sent, *_words(address, 12)), True
    # A client of DHCP has no address yet. Without options: 5 words of header.
    asks = Key(0x4500_0000, 0xFF00_0000, 0), Key(_UDP << 16, 0x00FF_0000, 8), Key(_DHCP_SERVER_PORT, 0xFFFF, 20)
    yield (*sent, *asks, *_words("0.0.0.0", 12)), True
    yield (), False


def _arp(interface: Interface, sent: Keys) -> Iterator[tuple[Keys, bool]]:
    hardware = bytes.fromhex(interface.hardware_address.replace(":", ""))
    for address in [*_own(interface, socket.AF_INET), "0.0.0.0"]:
        sender = hardware + socket.inet_pton(socket.AF_INET, address)
        yield (*sent, *_key_bytes(sender, 8)), True
    if not _own(interface, socket.AF_INET):
        yield (*sent, *_key_bytes(hardware, 8)), True
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
    identifier = _interface_identifier(interface.hardware_address)
    own.append(_key_bytes(identifier, 16))
    for keys in own:
        announced = tuple(key._replace(offset=key.offset + 40) for key in keys)
        yield (*sent, *_icmpv6(_NEIGHBOUR_ADVERTISEMENT), *announced), True
    yield _icmpv6(_NEIGHBOUR_ADVERTISEMENT), False
    for keys in own:
        yield (*sent, *keys), True
    # Is anybody else using the address that I am about to take?
    yield (*sent, *_words("::", 8)), True
    yield (), False


def _own(interface: Interface, family: socket.AddressFamily) -> list[str]:
    separator = ":" if family is socket.AF_INET6 else "."
    return [each.address for each in interface.addresses if separator in each.address]


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
