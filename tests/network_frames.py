"""Ethernet frames, byte by byte: what a guest may send, and the attacks that must not leave it."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence

OWN, OTHER = "02:00:00:aa:bb:01", "02:00:00:aa:bb:02"
BROADCAST = "ff:ff:ff:ff:ff:ff"
OWN_IP, OTHER_IP, GATEWAY = "10.1.0.2", "10.1.0.3", "10.1.0.1"
OWN_IP6, OTHER_IP6 = "2001:db8::2", "2001:db8::3"
# Modified EUI-64: the bit of local administration turned, ff:fe in the middle.
OWN_LINK_LOCAL, OTHER_LINK_LOCAL = "fe80::ff:feaa:bb01", "fe80::ff:feaa:bb02"
SLAAC = "2001:db8:ffff:1:0:ff:feaa:bb01"
ALL_NODES, SOLICITED = "ff02::1", "ff02::1:ff00:2"
ICMP, TCP, UDP, ROUTING, FRAGMENT, ICMPV6, OPTIONS = 1, 6, 17, 43, 44, 58, 60
RS, RA, NS, NA, REDIRECT = 133, 134, 135, 136, 137
MLDV1, MLDV2 = 131, 143


def mac(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def ip(text: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


def ethernet(kind: int, payload: bytes, source: str = OWN, destination: str = BROADCAST) -> bytes:
    return mac(destination) + mac(source) + struct.pack(">H", kind) + payload


def arp(
    operation: int, sender_ip: str, target_ip: str, *, sender: str = OWN, source: str = OWN, form: bytes = b"\x06\x04"
) -> bytes:
    body = struct.pack(">HH2sH", 1, 0x0800, form, operation) + mac(sender) + ip(sender_ip) + mac(BROADCAST)
    return ethernet(0x0806, body + ip(target_ip), source)


def ipv4(
    source: str, destination: str, *, protocol: int = TCP, body: bytes = bytes(20), sender: str = OWN, options: int = 0
) -> bytes:
    header = struct.pack(">BBHHHBBH", 0x45 + options, 0, 20 + 4 * options + len(body), 0, 0, 64, protocol, 0)
    return ethernet(0x0800, header + ip(source) + ip(destination) + bytes(4 * options) + body, sender)


def udp(source: int, destination: int) -> bytes:
    return struct.pack(">HHHH", source, destination, 108, 0) + bytes(100)


def ipv6(
    source: str,
    destination: str,
    *,
    protocol: int = TCP,
    body: bytes = bytes(20),
    sender: str = OWN,
    hops: int = 64,
    headers: Sequence[int] = (),
) -> bytes:
    """An IPv6 packet with extension headers of 8 bytes each, in this order."""
    extensions = b"".join(bytes((following,)) + bytes(7) for following in (*headers[1:], protocol)[: len(headers)])
    first = headers[0] if headers else protocol
    fixed = struct.pack(">IHBB", 6 << 28, len(extensions) + len(body), first, hops)
    return ethernet(0x86DD, fixed + ip(source) + ip(destination) + extensions + body, sender)


def neighbour(
    kind: int,
    source: str,
    target: str,
    *,
    destination: str = ALL_NODES,
    sender: str = OWN,
    headers: Sequence[int] = (),
    hops: int = 255,
) -> bytes:
    """Neighbour discovery: a solicitation, an advertisement or a redirect about an address."""
    body = struct.pack(">BBHI", kind, 0, 0, 0) + ip(target) + b"\x02\x01" + mac(sender)
    return ipv6(source, destination, protocol=ICMPV6, body=body, sender=sender, hops=hops, headers=headers)


def listener_report(source: str, kind: int = MLDV2, hops: int = 1) -> bytes:
    body = struct.pack(">BBHHH", kind, 0, 0, 0, 1) + b"\x04\0\0\0" + ip(SOLICITED)
    return ipv6(source, "ff02::16", protocol=ICMPV6, body=body, hops=hops, headers=[0])


ALLOWED = {
    "ipv4": ipv4(OWN_IP, "8.8.8.8"),
    "ipv4 with options": ipv4(OWN_IP, "8.8.8.8", options=3),
    "ipv4 without payload": ipv4(OWN_IP, "8.8.8.8", body=b""),
    "ipv4 multicast": ipv4(OWN_IP, "224.0.0.251", protocol=UDP, body=udp(5353, 5353)),
    "ipv4 broadcast": ipv4(OWN_IP, "255.255.255.255", protocol=UDP, body=udp(68, 67)),
    "ipv4 fragment": ipv4(OWN_IP, "8.8.8.8", body=b"\xff" * 9),
    "dhcp": ipv4("0.0.0.0", "255.255.255.255", protocol=UDP, body=udp(68, 67)),
    "arp request": arp(1, OWN_IP, GATEWAY),
    "arp reply": arp(2, OWN_IP, GATEWAY),
    "arp announcement": arp(1, OWN_IP, OWN_IP),
    "arp announcement by reply": arp(2, OWN_IP, OWN_IP),
    "arp probe": arp(1, "0.0.0.0", OWN_IP),
    "ipv6": ipv6(OWN_IP6, "2001:4860::8888"),
    "ipv6 without payload": ipv6(OWN_IP6, "2001:4860::8888", body=b""),
    "ipv6 of link-local": ipv6(OWN_LINK_LOCAL, ALL_NODES),
    "ipv6 of slaac": ipv6(SLAAC, "2001:4860::8888"),
    "ping6": ipv6(OWN_IP6, OTHER_IP6, protocol=ICMPV6, body=b"\x80" + bytes(7)),
    "ping6 with options": ipv6(OWN_IP6, OTHER_IP6, protocol=ICMPV6, body=b"\x80" + bytes(7), headers=[0, OPTIONS]),
    "ipv6 fragment": ipv6(OWN_IP6, OTHER_IP6, protocol=UDP, body=udp(1, 2), headers=[FRAGMENT]),
    "ns": neighbour(NS, OWN_IP6, OTHER_IP6),
    "ns of link-local": neighbour(NS, OWN_LINK_LOCAL, OTHER_IP6),
    "dad": neighbour(NS, "::", OWN_IP6, destination=SOLICITED),
    "dad of link-local": neighbour(NS, "::", OWN_LINK_LOCAL),
    "dad of slaac": neighbour(NS, "::", SLAAC),
    "na": neighbour(NA, OWN_IP6, OWN_IP6),
    "na of link-local": neighbour(NA, OWN_LINK_LOCAL, OWN_LINK_LOCAL),
    "na of slaac": neighbour(NA, SLAAC, SLAAC),
    "rs": ipv6(OWN_LINK_LOCAL, "ff02::2", protocol=ICMPV6, body=bytes((RS,)) + bytes(7), hops=255),
    "rs without address": ipv6("::", "ff02::2", protocol=ICMPV6, body=bytes((RS,)) + bytes(7), hops=255),
    "mldv2": listener_report(OWN_LINK_LOCAL),
    "mldv2 without address": listener_report("::"),
    "mldv1 without address": listener_report("::", MLDV1),
    "dhcpv6": ipv6(OWN_LINK_LOCAL, "ff02::1:2", protocol=UDP, body=udp(546, 547)),
}

FORBIDDEN = {
    "mac of another, ipv4": ipv4(OWN_IP, "8.8.8.8", sender=OTHER),
    "mac of another, ipv6": ipv6(OWN_IP6, OTHER_IP6, sender=OTHER),
    "mac of another, arp": arp(1, OWN_IP, GATEWAY, source=OTHER),
    "mac of another, dhcp": ipv4("0.0.0.0", "255.255.255.255", protocol=UDP, body=udp(68, 67), sender=OTHER),
    "mac of another, dad": neighbour(NS, "::", OWN_IP6, sender=OTHER),
    "mac of another, na": neighbour(NA, OWN_IP6, OWN_IP6, sender=OTHER),
    "mac differs at its end": ipv4(OWN_IP, "8.8.8.8", sender=OWN[:-2] + "ff"),
    "ipv4 of another": ipv4(OTHER_IP, "8.8.8.8"),
    "ipv4 of another, with options": ipv4(OTHER_IP, "8.8.8.8", options=10),
    "ipv4 of another in options": ipv4(OTHER_IP, OWN_IP),
    "ipv4 to loopback": ipv4(OWN_IP, "127.0.0.1"),
    "ipv4 to the end of loopback": ipv4(OWN_IP, "127.255.255.254"),
    "ipv4 from loopback": ipv4("127.0.0.1", OTHER_IP),
    "ipv4 from nowhere": ipv4("0.0.0.0", OTHER_IP),
    "ipv4 from multicast": ipv4("224.0.0.1", OTHER_IP),
    "udp from nowhere": ipv4("0.0.0.0", "255.255.255.255", protocol=UDP, body=udp(68, 53)),
    "tcp to dhcp's port from nowhere": ipv4("0.0.0.0", OTHER_IP, protocol=TCP, body=udp(68, 67)),
    "dhcp with options before": ipv4("0.0.0.0", OTHER_IP, protocol=UDP, body=udp(53, 67), options=1),
    "metadata": ipv4(OWN_IP, "169.254.169.254"),
    "arp reply for another": arp(2, OTHER_IP, GATEWAY),
    "arp request of another": arp(1, OTHER_IP, GATEWAY),
    "arp announcement for another": arp(1, OTHER_IP, OTHER_IP),
    "arp with another's hardware": arp(2, OWN_IP, GATEWAY, sender=OTHER),
    "arp of the gateway": arp(2, GATEWAY, OTHER_IP),
    "arp probe for another": arp(1, "0.0.0.0", OTHER_IP),
    "arp of another form": arp(1, OWN_IP, GATEWAY, form=b"\x08\x04"),
    "ipv6 of another": ipv6(OTHER_IP6, "2001:4860::8888"),
    "ipv6 of another's link-local": ipv6(OTHER_LINK_LOCAL, ALL_NODES),
    "ipv6 from loopback": ipv6("::1", OTHER_IP6),
    "ipv6 to loopback": ipv6(OWN_IP6, "::1"),
    "ipv6 from an address of v4": ipv6("::ffff:10.1.0.2", OTHER_IP6),
    "tcp from ::": ipv6("::", OTHER_IP6),
    "udp from ::": ipv6("::", OTHER_IP6, protocol=UDP, body=udp(546, 547)),
    "ping from ::": ipv6("::", OTHER_IP6, protocol=ICMPV6, body=b"\x80" + bytes(27)),
    "udp behind options from ::": ipv6("::", OTHER_IP6, protocol=UDP, body=udp(143 << 8, 1), headers=[0]),
    "mld of another": listener_report(OTHER_LINK_LOCAL),
    "metadata by ipv6": ipv6(OWN_IP6, "fd00:ec2::254"),
    "dad of another": neighbour(NS, "::", OTHER_IP6),
    "dad of another's link-local": neighbour(NS, "::", OTHER_LINK_LOCAL),
    "ns of another": neighbour(NS, OTHER_IP6, OWN_IP6),
    "na of another": neighbour(NA, OWN_IP6, OTHER_IP6),
    "na of another from link-local": neighbour(NA, OWN_LINK_LOCAL, OTHER_IP6),
    "na of another's link-local": neighbour(NA, OWN_LINK_LOCAL, OTHER_LINK_LOCAL),
    "na from another": neighbour(NA, OTHER_IP6, OWN_IP6),
    "na from ::": neighbour(NA, "::", OWN_IP6),
    "ra": ipv6(OWN_LINK_LOCAL, ALL_NODES, protocol=ICMPV6, body=bytes((RA,)) + bytes(15), hops=255),
    "ra to one": ipv6(OWN_IP6, OTHER_IP6, protocol=ICMPV6, body=bytes((RA,)) + bytes(15), hops=255),
    "redirect": neighbour(REDIRECT, OWN_LINK_LOCAL, OTHER_IP6),
    **{
        f"{name} behind {header}": neighbour(kind, OWN_LINK_LOCAL, OTHER_IP6, headers=headers)
        for name, kind in (("ra", RA), ("na", NA), ("redirect", REDIRECT))
        for header, headers in (
            ("hop-by-hop options", [0]),
            ("routing", [ROUTING]),
            ("fragment", [FRAGMENT]),
            ("destination options", [OPTIONS]),
            ("two headers", [OPTIONS, FRAGMENT]),
        )
    },
    "stp": mac("01:80:c2:00:00:00") + mac(OWN) + struct.pack(">H", 38) + b"\x42\x42\x03" + bytes(43),
    "novell": mac(BROADCAST) + mac(OWN) + struct.pack(">H", 46) + b"\xff\xff" + bytes(44),
    "ip in snap": mac(BROADCAST) + mac(OWN) + struct.pack(">H", 48) + b"\xaa\xaa\x03\0\0\0\x08\0" + bytes(40),
    "lldp": ethernet(0x88CC, bytes(46), destination="01:80:c2:00:00:0e"),
    "vlan": ethernet(0x8100, b"\0\x05" + ipv4(OWN_IP, "8.8.8.8")[12:]),
    "priority tag": ethernet(0x8100, b"\xe0\0" + ipv4(OWN_IP, "8.8.8.8")[12:]),
    "service vlan": ethernet(0x88A8, b"\0\x05\x81\0\0\x06" + ipv4(OWN_IP, "8.8.8.8")[12:]),
    "vlan with spoofed arp": ethernet(0x8100, b"\0\x05" + arp(2, GATEWAY, OTHER_IP)[12:]),
    "pppoe": ethernet(0x8863, bytes(46)),
    "pppoe session": ethernet(0x8864, bytes(46)),
    "rarp": ethernet(0x8035, arp(3, OWN_IP, OWN_IP)[14:]),
    "slow protocols": ethernet(0x8809, bytes(46), destination="01:80:c2:00:00:02"),
    "only a header": ethernet(0x0800, b""),
    "only a header of ipv6": ethernet(0x86DD, b""),
    "only a header of arp": ethernet(0x0806, b""),
}
