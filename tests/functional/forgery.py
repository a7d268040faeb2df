"""Frames that a hostile guest sends in another's name, and whose name any frame is in."""

from __future__ import annotations

import socket
import struct


def checksum(data: bytes) -> bytes:
    """Return the Internet's checksum (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return (~(total + (total >> 16)) & 0xFFFF).to_bytes(2, "big")


def hardware(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def ethernet(source: str, kind: int, body: bytes, target: str = "ff:ff:ff:ff:ff:ff") -> bytes:
    return hardware(target) + hardware(source) + kind.to_bytes(2, "big") + body


def arp(operation: int, sender: str, address: str, asked: str) -> bytes:
    known = hardware(sender) + socket.inet_aton(address)
    return struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation) + known + hardware(sender) + socket.inet_aton(asked)


def ipv4(source: str, target: str, body: bytes = b"") -> bytes:
    """Return a UDP datagram to the discard port in an IPv4 packet."""
    datagram = struct.pack("!HHHH", 9, 9, 8 + len(body), 0) + body
    head: bytes = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(datagram), 0, 0, 64, 17, 0)
    ends = socket.inet_aton(source) + socket.inet_aton(target)
    return head[:10] + checksum(head + ends) + ends + datagram


def ipv6(source: str, target: str, following: int, body: bytes, hops: int = 255) -> bytes:
    ends = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, target)
    return struct.pack("!IHBB", 6 << 28, len(body), following, hops) + ends + body


def advertisement(source: str, claimed: str, at: str) -> bytes:
    """Return a neighbour advertisement for all nodes: solicited by nobody, overriding (RFC 4861, section 4.4)."""
    body = struct.pack("!BBHI", 136, 0, 0, 1 << 29) + socket.inet_pton(socket.AF_INET6, claimed)
    body += b"\2\1" + hardware(at)
    ends = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, "ff02::1")
    total = checksum(ends + struct.pack("!II", len(body), 58) + body)
    return ipv6(source, "ff02::1", 58, body[:2] + total + body[4:])


def forgeries(
    own: tuple[str, str, str], victim: tuple[str, str], gateways: tuple[str, str], host: str
) -> dict[str, bytes]:
    """Return frames that say what is not so.

    ``own`` are the sender's hardware address, IPv4 and IPv6, ``victim`` and ``gateways`` have an address of each
    family, ``host`` is the hardware address of who is to take them.
    """
    mac, four, six = own
    other = "02:00:5e:00:00:99"
    udp_body = struct.pack("!HHHH", 9, 9, 8, 0)
    claim = advertisement(six, victim[1], mac)
    router = ipv6("fe80::99", "ff02::1", 58, struct.pack("!BBHBBHII", 134, 0, 0, 64, 0, 1800, 0, 0))
    found: dict[str, bytes] = {
        "arp answer": ethernet(mac, 0x0806, arp(2, mac, victim[0], victim[0])),
        "arp request": ethernet(mac, 0x0806, arp(1, mac, victim[0], gateways[0])),
        "arp of another card": ethernet(mac, 0x0806, arp(2, other, four, four)),
        "arp from another card": ethernet(other, 0x0806, arp(2, mac, four, four)),
        "tagged arp": ethernet(mac, 0x8100, b"\0\7\x08\x06" + arp(2, mac, victim[0], victim[0])),
        "untagged arp": ethernet(mac, 0x8100, b"\0\0\x08\x06" + arp(2, mac, victim[0], victim[0])),
        "twice tagged arp": ethernet(mac, 0x88A8, b"\0\7\x81\0\0\7\x08\x06" + arp(2, mac, victim[0], victim[0])),
        "source": ethernet(mac, 0x0800, ipv4(victim[0], gateways[0]), host),
        "card": ethernet(other, 0x0800, ipv4(four, gateways[0]), host),
        "loopback": ethernet(mac, 0x0800, ipv4(four, "127.0.0.1"), host),
        "metadata": ethernet(mac, 0x0800, ipv4(four, "169.254.169.254"), host),
        "from loopback": ethernet(mac, 0x0800, ipv4("127.0.0.1", gateways[0]), host),
        "source of IPv6": ethernet(mac, 0x86DD, ipv6(victim[1], gateways[1], 17, udp_body), host),
        "card of IPv6": ethernet(other, 0x86DD, ipv6(six, gateways[1], 17, udp_body), host),
        "loopback of IPv6": ethernet(mac, 0x86DD, ipv6(six, "::1", 17, udp_body), host),
        "metadata of IPv6": ethernet(mac, 0x86DD, ipv6(six, "fd00:ec2::254", 17, udp_body), host),
        "advertisement": ethernet(mac, 0x86DD, claim),
        "advertisement behind options": ethernet(
            mac, 0x86DD, ipv6(six, "ff02::1", 0, b"\x3a\0\1\4\0\0\0\0" + claim[40:])
        ),
        "router": ethernet(mac, 0x86DD, router),
        "spanning tree": ethernet(mac, 38, b"\x42\x42\3" + bytes(35), "01:80:c2:00:00:00"),
        "unknown protocol": ethernet(mac, 0x88B5, bytes(46)),
    }
    # What comes last is looked for: no header says how long a frame is.
    return {name: frame.ljust(60, b"\0") + f"[{name}]".encode() for name, frame in found.items()}


def claims(frame: bytes) -> set[str]:
    """Return the addresses that a frame says are its sender's."""
    kind, body = int.from_bytes(frame[12:14], "big"), frame[14:]
    found = {frame[6:12].hex(":")}
    if kind == 0x0800:
        found.add(socket.inet_ntoa(body[12:16]))
    elif kind == 0x0806:
        found |= {body[8:14].hex(":"), socket.inet_ntoa(body[14:18])}
    elif kind == 0x86DD:
        found.add(socket.inet_ntop(socket.AF_INET6, body[8:24]))
        if body[6] == 58 and body[40] == 136:
            found.add(socket.inet_ntop(socket.AF_INET6, body[48:64]))
    return found
