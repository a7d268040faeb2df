"""What the agent takes for a network's description, and what it makes of netlink's bytes; the kernel has no part."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest
from guest_network_lab import address, hardware, packed
from hypothesis import given
from hypothesis import strategies as st
from katapy_agent import netlink, network, routes
from katapy_agent.errors import InvalidArgument, KatapyError
from katapy_agent.netlink import Message, attribute
from katapy_agent.network import Interface, InterfaceAddress, Link, Neighbor
from katapy_agent.routes import Form, Hop, NextHop, Route

MAC = hardware("02:00:00:00:00:01")
OTHER = hardware("02:00:00:00:00:02")
NONE = bytes(6)


@pytest.mark.parametrize("name", ["e", "eth0", "eth0.100", "a-b_c@d", "...", "veth1234567890a", "ä"])
def test_names_that_an_interface_can_have(name: str) -> None:
    assert Interface(MAC, name, MAC).name == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a b", "a\tb", "a\n", "a:1", "eth%d", "a\0", "a\u00a0b", "x" * 16, "ä" * 8, "lo"]
)
def test_names_that_no_interface_can_have(name: str) -> None:
    """A percent sign would be a pattern to the kernel: eth%d becomes eth0."""
    with pytest.raises(InvalidArgument):
        Interface(MAC, name, MAC)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Interface(b"", "eth0", MAC),
        lambda: Interface(MAC, "eth0", MAC + b"\0"),
        lambda: Interface(MAC, "eth0", NONE),
        lambda: Interface(MAC, "eth0", hardware("01:00:00:00:00:01")),
        lambda: Interface(MAC, "eth0", MAC, mtu=67),
        lambda: Interface(MAC, "eth0", MAC, mtu=65536),
        lambda: Interface(MAC, "eth0", MAC, addresses=(InterfaceAddress(bytes(4), 0),) * 257),
        lambda: InterfaceAddress(b"", 0),
        lambda: InterfaceAddress(bytes(5), 24),
        lambda: InterfaceAddress(bytes(4), 33),
        lambda: InterfaceAddress(bytes(16), 129),
        lambda: InterfaceAddress(bytes(4), -1),
        lambda: InterfaceAddress(bytes(4), 32, peer=bytes(16)),
        lambda: InterfaceAddress(bytes(4), 24, broadcast=bytes(16)),
        lambda: InterfaceAddress(bytes(16), 64, broadcast=bytes(16)),
        lambda: InterfaceAddress(bytes(4), 24, scope=256),
        lambda: Neighbor("", bytes(4), MAC),
        lambda: Neighbor("eth0", bytes(3), MAC),
        lambda: Neighbor("eth0", bytes(4), MAC[:5]),
        lambda: Route(0, interface="eth0"),
        lambda: Route(5, interface="eth0"),
        lambda: Route(4),
        lambda: Route(4, prefix_length=1, interface="eth0"),
        lambda: Route(4, bytes(16), 0, "eth0"),
        lambda: Route(6, bytes(4), 0, "eth0"),
        lambda: Route(4, packed("10.0.0.1"), 24, "eth0"),
        lambda: Route(4, packed("10.0.0.0"), 33, "eth0"),
        lambda: Route(4, interface="a b"),
        lambda: Route(4, interface="eth0", gateway=bytes(6)),
        lambda: Route(4, interface="eth0", preferred_source=bytes(16)),
        lambda: Route(4, interface="eth0", metric=1 << 32),
        lambda: Route(4, interface="eth0", table=1 << 32),
        lambda: Route(4, interface="eth0", type=256),
        lambda: Route(4, interface="eth0", mtu=1),
        lambda: Route(4, interface="eth0", next_hops=(NextHop("eth0"),)),
        lambda: Route(4, gateway=bytes(4), next_hops=(NextHop("eth0"),)),
        lambda: Route(4, next_hops=(NextHop("eth0"),) * 257),
        lambda: NextHop(""),
        lambda: NextHop("eth0", bytes(5)),
        lambda: NextHop("eth0", weight=0),
        lambda: NextHop("eth0", weight=257),
        lambda: routes.update_routes([Route(4, type=6)] * 4097),
        lambda: network.add_neighbors([Neighbor("eth0", bytes(4), MAC)] * 4097),
        lambda: network.check_interfaces([Interface(MAC, f"eth{number}", MAC) for number in range(65)]),
        lambda: network.check_interfaces([Interface(MAC, "eth0", MAC), Interface(OTHER, "eth0", OTHER)]),
        lambda: network.check_interfaces([Interface(MAC, "eth0", MAC), Interface(MAC, "eth1", OTHER)]),
    ],
)
def test_descriptions_that_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(InvalidArgument):
        make()


def link(ifindex: int, mac: bytes, permanent: bytes) -> Link:
    return Link(ifindex, 0, f"eth{ifindex}", mac, permanent, 1500, False)


def test_nic_is_found_by_its_permanent_address() -> None:
    """Not by the one that it has now, which may be another's: two NICs can have exchanged theirs."""
    exchanged = [link(2, OTHER, MAC), link(3, MAC, OTHER)]
    for device, ifindex in ((MAC, 2), (OTHER, 3)):
        found = network.find_link(exchanged, device)
        assert found is not None
        assert found.ifindex == ifindex
    assert network.find_link([link(2, MAC, OTHER)], MAC) is None


@pytest.mark.parametrize("permanent", [b"", NONE])
def test_nic_whose_driver_tells_no_permanent_address(permanent: bytes) -> None:
    """A bridge may have taken over the address of one of its ports, which has it for good."""
    assert network.find_link([link(2, MAC, permanent)], MAC) == link(2, MAC, permanent)
    assert network.find_link([link(2, MAC, permanent), link(3, MAC, MAC)], MAC) == link(3, MAC, MAC)


def test_link_message() -> None:
    ipv6 = attribute(socket.AF_INET6, attribute(2, bytes(26 * 4) + b"\1\0\0\0" + bytes(8)))
    given_ = attribute(3, b"eth0\0") + attribute(1, MAC) + attribute(54, OTHER) + attribute(4, 1400)
    body = struct.pack("=BxHiII", 0, 1, 7, 0x1043, 0) + given_
    assert network.parse_link(body) == Link(7, 0x1043, "eth0", MAC, OTHER, 1400, None)
    assert network.parse_link(body + attribute(26, ipv6)).ipv6_disabled is True


def address_body(family: int, *attributes: bytes, prefix_length: int = 24) -> bytes:
    return struct.pack("=BBBBI", family, prefix_length, 0x80, 0, 3) + b"".join(attributes)


def test_address_messages() -> None:
    ours, theirs = packed("10.0.0.2"), packed("10.0.0.1")
    found = network.parse_address(address_body(2, attribute(1, ours), attribute(2, ours), attribute(8, 0x280)))
    assert found is not None
    assert (found.ifindex, found.flags, found.protocol) == (3, 0x280, 0)
    assert found.address == address("10.0.0.2/24", no_prefix_route=True)
    found = network.parse_address(address_body(2, attribute(1, theirs), attribute(2, ours)))
    assert found is not None
    assert found.address == address("10.0.0.2/24", peer="10.0.0.1")
    assert network.parse_address(address_body(45, attribute(2, b"\1"))) is None  # MCTP's


@pytest.mark.parametrize(
    "body",
    [
        address_body(2),
        address_body(2, attribute(2, bytes(16))),
        address_body(10, attribute(1, bytes(4))),
        address_body(2, attribute(1, bytes(16)), attribute(2, bytes(4))),
        address_body(2, attribute(2, bytes(4)), attribute(4, bytes(3))),
        address_body(2, attribute(2, bytes(4)), prefix_length=33),
        address_body(2, attribute(2, bytes(4)))[:-1],
        address_body(2)[:-1],
    ],
)
def test_malformed_addresses(body: bytes) -> None:
    with pytest.raises(OSError, match="malformed") as error:
        network.parse_address(body)
    assert error.value.errno == errno.EBADMSG


def form(**changed: Any) -> Form:
    plain: dict[str, Any] = {
        "family": 2,
        "destination": packed("10.1.0.0"),
        "prefix_length": 16,
        "table": 254,
        "metric": 0,
        "type": 1,
        "protocol": 3,
        "scope": 0,
        "preferred_source": b"",
        "mtu": 0,
        "hops": (Hop(2, packed("10.0.0.1"), 1, False),),
    }
    return Form(**{**plain, **changed})


SIX = {"family": 10, "destination": packed("2001:db8::"), "prefix_length": 32, "metric": 1024}


@pytest.mark.parametrize(
    "route",
    [
        form(),
        form(destination=bytes(4), prefix_length=0, metric=77, table=1000, mtu=1280, scope=253),
        form(preferred_source=packed("10.0.0.2"), protocol=2),
        form(hops=(Hop(2, packed("10.0.0.1"), 1, True),)),
        form(hops=(Hop(2, packed("fe80::1"), 1, False),)),
        form(hops=(Hop(2, packed("10.0.0.1"), 3, False), Hop(3, packed("fe80::1"), 256, True), Hop(4, b"", 1, False))),
        form(type=6, hops=()),
        form(**SIX),
        form(**SIX, hops=(Hop(2, packed("fe80::1"), 1, True), Hop(2, packed("fe80::2"), 2, False))),
    ],
)
def test_route_is_the_same_after_its_message(route: Form) -> None:
    assert routes.parse_route(routes.encode(route)) == route


def test_routes_that_are_not_of_the_tables() -> None:
    assert routes.parse_route(struct.pack("=BBBBBBBBI", 2, 0, 0, 0, 254, 2, 0, 1, 0x200)) is None  # cached
    assert routes.parse_route(struct.pack("=BBBBBBBBI", 128, 0, 0, 0, 254, 2, 0, 1, 0)) is None  # of multicast routing


def test_ipv6_routes_to_nowhere_lead_to_lo() -> None:
    """That is how the kernel tells of them, and what is of lo is left alone: they would never go."""
    told = routes.encode(form(**SIX, type=6, hops=())) + attribute(4, 1)
    assert routes.parse_route(told) == form(**SIX, type=6, hops=())


HEADER = struct.Struct("=IHHII")


def message(kind: int, body: bytes, *, flags: int = 0, sequence: int = 1, size: int | None = None) -> bytes:
    return HEADER.pack(16 + len(body) if size is None else size, kind, flags, sequence, 0) + body


def test_messages_are_split() -> None:
    data = message(16, b"abc") + b"\0" + message(3, bytes(4), flags=2, sequence=9)
    assert netlink.parse_messages(data) == [Message(16, 0, 1, b"abc"), Message(3, 2, 9, bytes(4))]
    assert netlink.parse_messages(b"") == []


@pytest.mark.parametrize(
    "data",
    [b"\0", bytes(16), message(16, b"", size=15), message(16, b"", size=17), message(16, bytes(8))[:-1],
     message(16, b"", size=0xFFFFFFFF), message(16, b"") + bytes(15)],
)  # fmt: skip
def test_malformed_messages(data: bytes) -> None:
    with pytest.raises(OSError, match="malformed"):
        netlink.parse_messages(data)


@pytest.mark.parametrize("data", [b"\4", b"\3\0\0\0", b"\5\0\0\0", b"\xff\xff\0\0", b"\4\0\1\0\0"])
def test_malformed_attributes(data: bytes) -> None:
    with pytest.raises(OSError, match="malformed"):
        netlink.parse_attributes(data)


def test_attributes() -> None:
    assert attribute(3, b"eth0\0") == b"\x09\0\x03\0eth0\0\0\0\0"
    assert netlink.parse_attributes(attribute(3, b"x") + attribute(0x8004, 7)) == {3: b"x", 4: b"\7\0\0\0"}
    # The last one's padding may be missing.
    assert netlink.parse_attributes(b"\5\0\1\0x") == {1: b"x"}


def test_what_the_kernel_says_of_a_failure() -> None:
    echoed = message(16, b"abcde") + bytes(3)
    said = attribute(2, 5) + attribute(1, b"no such\xff\0")
    for flags, returned in ((0x200, echoed), (0x300, echoed[:16])):
        error = netlink.parse_error(Message(2, flags, 1, struct.pack("=i", -errno.EINVAL) + returned + said))
        assert error is not None
        assert (error.errno, error.strerror) == (errno.EINVAL, "Invalid argument (no such\ufffd)")
    error = netlink.parse_error(Message(3, 0x202, 1, struct.pack("=i", -errno.ENODEV) + attribute(1, b"gone\0")))
    assert error is not None
    assert error.strerror == "No such device (gone)"
    assert netlink.parse_error(Message(2, 0, 1, bytes(20))) is None
    for body in (b"", struct.pack("=i", -1) + b"\0"):
        with pytest.raises(OSError, match="malformed"):
            netlink.parse_error(Message(2, 0x200, 1, body))


@given(st.binary(max_size=200), st.integers(0, 0xFFFF))
def test_no_bytes_do_anything_but_be_refused(data: bytes, flags: int) -> None:
    parsers: tuple[Callable[[bytes], object], ...] = (
        netlink.parse_messages,
        netlink.parse_attributes,
        network.parse_link,
        network.parse_address,
        routes.parse_route,
        lambda body: netlink.parse_error(Message(2, flags, 1, body)),
        lambda body: routes.parse_route(struct.pack("=BBBBBBBBI", 2, 8, 0, 0, 254, 2, 0, 1, 0) + attribute(9, body)),
        lambda body: network.parse_link(struct.pack("=BxHiII", 0, 1, 7, 0, 0) + attribute(26, body)),
    )
    for parse in parsers:
        try:
            parse(data)
        except (OSError, KatapyError) as error:
            assert isinstance(error, OSError)  # noqa: PT017
