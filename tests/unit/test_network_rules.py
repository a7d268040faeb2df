"""What a guest may send: every filter against whole frames, as the kernel's u32 classifier reads them."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st
from network_frames import (
    ALLOWED,
    FORBIDDEN,
    GATEWAY,
    NA,
    NS,
    OTHER_IP,
    OTHER_IP6,
    OWN,
    OWN_IP,
    OWN_IP6,
    SLAAC,
    arp,
    ip,
    ipv4,
    ipv6,
    mac,
    neighbour,
)

from katapy.interfaces import Address, Interface
from katapy.network import rules
from katapy.network.netlink import ETH_P_ALL, Filter

TARGET, SINK = 7, 9
INTERFACE = Interface(
    device="02:6b:61:74:00:00",
    name="eth0",
    hardware_address=OWN,
    mtu=1500,
    addresses=(Address(OWN_IP, 24), Address(OWN_IP6, 64)),
)
UNNUMBERED = INTERFACE._replace(addresses=())


def as_told(address: IPv4Address | IPv6Address) -> str:
    """Return an address as netlink's library writes it."""
    return socket.inet_ntop(socket.AF_INET if address.version == 4 else socket.AF_INET6, address.packed)


def protocol_of(frame: bytes) -> int:
    """As the kernel's eth_type_trans() does: of a tagged frame, the tag's."""
    (kind,) = struct.unpack_from(">H", frame, 12)
    if kind >= 0x0600:
        return int(kind)
    return 0x0001 if frame[14:16] == b"\xff\xff" else 0x0004


def matches(each: Filter, frame: bytes) -> bool | None:
    """Whether a u32 filter matches; None where the frame ends before one of its keys."""
    for key in each.keys:
        start = 14 + key.offset
        assert start >= 0
        if start + 4 > len(frame):
            return None
        if (int.from_bytes(frame[start : start + 4], "big") ^ key.value) & key.mask:
            return False
    return True


def target_of(filters: Sequence[Filter], frame: bytes) -> int | None:
    """Return the interface that a frame is handed to; None if it would reach the namespace's own stack."""
    assert [each.priority for each in filters] == sorted(each.priority for each in filters)
    for _, group in groupby(filters, lambda each: each.priority):
        tried = list(group)
        assert len({each.protocol for each in tried}) == 1
        if tried[0].protocol not in (protocol_of(frame), ETH_P_ALL):
            continue
        for each in tried:
            matched = matches(each, frame)
            if matched is None:
                break  # the kernel asks no other filter of this priority
            if matched:
                return each.target
    return None


def passes(frame: bytes, interface: Interface = INTERFACE, *, checked: bool = True, metadata: bool = False) -> bool:
    filters = rules.outgoing(interface, target=TARGET, sink=SINK, checked=checked, metadata=metadata)
    verdict = target_of(filters, frame)
    assert verdict in (TARGET, SINK)
    return verdict == TARGET


@pytest.mark.parametrize("name", ALLOWED)
def test_what_passes(name: str) -> None:
    assert passes(ALLOWED[name])


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_does_not_pass(name: str) -> None:
    assert not passes(FORBIDDEN[name])


@pytest.mark.parametrize("name", [*ALLOWED, *FORBIDDEN])
@pytest.mark.parametrize("interface", [INTERFACE, UNNUMBERED])
def test_unchecked_everything_passes(name: str, interface: Interface) -> None:
    assert passes({**ALLOWED, **FORBIDDEN}[name], interface, checked=False)


@pytest.mark.parametrize("frame", [ipv4(OWN_IP, "169.254.169.254"), ipv6(OWN_IP6, "fd00:ec2::254")])
def test_metadata_services_are_reached_only_where_that_is_wanted(frame: bytes) -> None:
    assert not passes(frame)
    assert not passes(frame, UNNUMBERED)
    assert passes(frame, metadata=True)


@pytest.mark.parametrize("name", [name for name in FORBIDDEN if "metadata" not in name])
def test_metadata_allows_nothing_else(name: str) -> None:
    assert not passes(FORBIDDEN[name], metadata=True)


@pytest.mark.parametrize(
    ("name", "length"), [(name, length) for name in ALLOWED for length in range(14, 34) if length < len(ALLOWED[name])]
)
def test_a_frame_cut_off_in_its_header_is_dropped(name: str, length: int) -> None:
    assert not passes(ALLOWED[name][:length])


@given(st.sampled_from(sorted(FORBIDDEN)), st.integers(14, 120))
def test_cutting_a_frame_off_never_lets_it_pass(name: str, length: int) -> None:
    """The kernel asks no further filter of a priority once a key lies behind the frame's end."""
    assert not passes(FORBIDDEN[name][:length])


@pytest.mark.parametrize("name", [name for name, frame in ALLOWED.items() if frame[12:14] == b"\x86\xdd"])
def test_without_ipv6_none_of_it_passes(name: str) -> None:
    off = INTERFACE._replace(disable_ipv6=True)
    assert not passes(ALLOWED[name], off)
    assert passes(ALLOWED["ipv4"], off)
    assert passes(ALLOWED["arp request"], off)


def test_an_interface_without_addresses_gets_one_that_only_its_guest_knows() -> None:
    """Its source is not known; its hardware address is, and what no network carries does not pass either."""
    for name in ("ipv4", "ipv4 of another", "dhcp", "arp request", "arp reply for another", "arp probe for another"):
        assert passes({**ALLOWED, **FORBIDDEN}[name], UNNUMBERED), name
    words = ("mac ", "loopback", "metadata", "hardware", "form", "ra ", "na ", "redirect", "vlan", "stp", "rarp")
    for name, frame in FORBIDDEN.items():
        if any(word in name for word in words):
            assert not passes(frame, UNNUMBERED), name
    assert not passes(ipv6(OTHER_IP6, "2001:4860::8888"), UNNUMBERED)
    assert passes(ipv6(SLAAC, "2001:4860::8888"), UNNUMBERED)


def test_an_address_of_ipv6_that_holds_one_of_ipv4() -> None:
    """It has a dot, and was taken for one of IPv4: a pod could not be connected."""
    address = f"::ffff:{OTHER_IP}"
    mapped = INTERFACE._replace(addresses=(Address(address, 128),))
    assert passes(ipv6(address, "2001:4860::8888"), mapped)
    assert passes(neighbour(NA, address, address), mapped)
    assert not passes(arp(1, OTHER_IP, GATEWAY), mapped)


def test_an_interface_with_addresses_of_ipv6_only_is_not_without_addresses() -> None:
    """It could send from every IPv4 address and answer every ARP request, the gateway's too."""
    only6 = INTERFACE._replace(addresses=(Address(OWN_IP6, 64),))
    assert not passes(ipv4(OTHER_IP, "8.8.8.8"), only6)
    assert not passes(arp(2, GATEWAY, OTHER_IP), only6)
    assert not passes(arp(1, "0.0.0.0", OTHER_IP), only6)
    assert passes(ALLOWED["dhcp"], only6)
    assert passes(ALLOWED["ipv6"], only6)


def test_every_address_passes() -> None:
    addresses = ["10.1.0.2", "10.2.0.2", "192.0.2.255", "2001:db8::2", "fd00::5", "fd00:0:0:1::5"]
    several = INTERFACE._replace(addresses=tuple(Address(each, 24) for each in addresses))
    for each in addresses:
        if ":" in each:
            assert passes(ipv6(each, OTHER_IP6), several)
            assert passes(neighbour(NA, each, each), several)
            assert passes(neighbour(NS, "::", each), several)
            assert not passes(neighbour(NA, each, next(a for a in addresses if ":" in a and a != each)), several)
        else:
            assert passes(ipv4(each, "8.8.8.8"), several)
            assert passes(arp(2, each, GATEWAY), several)
    assert not passes(ipv4("10.1.0.5", "8.8.8.8"), several)
    assert not passes(ipv6("2001:db8::5", OTHER_IP6), several)


def test_point_to_point_the_peers_address_is_not_ones_own() -> None:
    interface = INTERFACE._replace(addresses=(Address("10.1.0.2", 32, peer="10.1.0.9"),))
    assert passes(ipv4("10.1.0.2", "10.1.0.9"), interface)
    assert not passes(ipv4("10.1.0.9", "10.1.0.2"), interface)


def test_all_that_comes_in_is_handed_over() -> None:
    for frame in (*ALLOWED.values(), *FORBIDDEN.values()):
        assert target_of([rules.incoming(1, TARGET)], frame) == TARGET


MACS = st.binary(min_size=6, max_size=6)
KNOWN = st.sampled_from(sorted((*ALLOWED.values(), *FORBIDDEN.values())))
INTERFACES = st.builds(
    Interface,
    device=st.just(INTERFACE.device),
    name=st.just("eth0"),
    hardware_address=MACS.map(lambda raw: raw.hex(":")),
    mtu=st.just(1500),
    disable_ipv6=st.booleans(),
    addresses=st.lists(
        st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(lambda each: Address(as_told(each), 24)), max_size=4
    ).map(tuple),
)


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    """Frames of known kinds, some bytes of them changed, and frames of no kind."""
    frame = bytearray(draw(st.one_of(KNOWN, st.binary(min_size=14, max_size=100))))
    for position, value in draw(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 255)), max_size=4)):
        if position < len(frame):
            frame[position] = value
    return bytes(frame)


@given(INTERFACES, frames(), st.booleans())
def test_no_frame_passes_with_anothers_hardware_address(interface: Interface, frame: bytes, metadata: bool) -> None:
    if frame[6:12] != mac(interface.hardware_address):
        assert not passes(frame, interface, metadata=metadata)


@given(INTERFACES, frames())
def test_what_passes_bears_an_address_of_the_interface(interface: Interface, frame: bytes) -> None:
    frame = frame[:6] + mac(interface.hardware_address) + frame[12:]
    if not interface.addresses or not passes(frame, interface):
        return
    own = {ip(each.address) for each in interface.addresses}
    match protocol_of(frame):
        case 0x0800:
            assert frame[26:30] in own | {bytes(4)}
        case 0x0806:
            assert frame[22:28] == mac(interface.hardware_address)
            assert frame[28:32] in own or (frame[28:32] == bytes(4) and frame[38:42] in own)
        case 0x86DD:
            assert not interface.disable_ipv6
            identifier = rules._interface_identifier(interface.hardware_address)
            assert frame[22:38] in own | {bytes(16)} or frame[30:38] == identifier
        case _:
            pytest.fail("no other protocol passes")
