"""The network that the agent makes, in a namespace of its own and with pairs of interfaces for the NICs of a VM."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import pytest
from guest_network_lab import Pod, address, hardware, interface, open_pod, packed
from katapy_agent import agent_pb2 as pb
from katapy_agent import netlink, network, sandbox, storage
from katapy_agent.errors import AlreadyExists, InvalidArgument, InvalidState, KatapyError, NotFound, Timeout
from katapy_agent.events import Events
from katapy_agent.network import Neighbor, add_neighbors, update_interface
from katapy_agent.routes import NextHop, Route, update_routes
from katapy_agent.server import AgentService

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

FIRST, SECOND = "02:00:00:00:00:01", "02:00:00:00:00:02"
SECONDS = 20.0


@pytest.fixture
def pod() -> Iterator[Pod]:
    with open_pod() as made:
        yield made


@pytest.fixture
def changes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The kinds of request, but for dumps, that are made from now on."""
    made: list[int] = []
    real = netlink.Socket.request_all

    def record(kernel: netlink.Socket, requests: Sequence[netlink.Request]) -> list[OSError | None]:
        made.extend(each.kind for each in requests)
        return real(kernel, requests)

    monkeypatch.setattr(netlink.Socket, "request_all", record)
    return made


def route(family: int, destination: str = "", via: str = "", dev: str = "eth0", **more: Any) -> Route:
    network_, _, length = destination.partition("/")
    source = packed(more.pop("src", ""))
    return Route(family, packed(network_), int(length or 0), dev, packed(via), source, **more)


def set_up(pod: Pod, *addresses: network.InterfaceAddress) -> None:
    """Plug in eth0 and give it addresses."""
    update_interface(interface(pod.plug("veth0", FIRST), *addresses))


# Interfaces


def test_new_nic(pod: Pod, changes: list[int]) -> None:
    """The usual one takes a request for the interface and one for each address."""
    mac = pod.plug("veth0", FIRST)
    wanted = interface(mac, address("10.88.0.2/16", broadcast="10.88.255.255"), mtu=1400)
    update_interface(wanted)
    assert changes == [netlink.RTM_NEWLINK, netlink.RTM_NEWADDR]
    found = pod.link("eth0")
    assert (found["address"], found["mtu"]) == (FIRST, 1400)
    assert {"UP", "LOWER_UP"} <= set(found["flags"])
    assert "NOARP" not in found["flags"]
    assert pod.addresses("eth0") == ["10.88.0.2/16 brd 10.88.255.255"]
    assert pod.names() == {"eth0"}
    assert pod.routes() == {"10.88.0.0/16 dev eth0 proto kernel scope link src 10.88.0.2"}


def test_same_again_changes_nothing(pod: Pod, changes: list[int]) -> None:
    addresses = (
        address("10.0.0.2/24", broadcast="10.0.0.255"),
        address("10.0.0.3/24"),
        address("192.0.2.1/32", peer="192.0.2.9", scope=253),
        address("2001:db8::2/64"),
        address("2001:db8::3/128", peer="2001:db8::9", no_prefix_route=True),
    )
    wanted = interface(pod.plug("veth0", FIRST), *addresses, mtu=1300, no_arp=True, disable_ipv6=False)
    update_interface(wanted)
    before = pod.link("eth0")
    changes.clear()
    update_interface(wanted)
    assert changes == []
    assert {**pod.link("eth0"), "addr_info": []} == {**before, "addr_info": []}


def test_hardware_address_and_flags(pod: Pod) -> None:
    mac = pod.plug("veth0", FIRST)
    update_interface(interface(mac, hardware_address=hardware(SECOND), no_arp=True))
    found = pod.link("eth0")
    assert found["address"] == SECOND
    assert {"UP", "NOARP"} <= set(found["flags"])
    update_interface(interface(hardware(SECOND), up=False))
    assert not {"UP", "NOARP"} & set(pod.link("eth0")["flags"])


def test_mtu_of_zero_is_left(pod: Pod) -> None:
    mac = pod.plug("veth0", FIRST)
    update_interface(interface(mac, mtu=9000))
    update_interface(interface(mac))
    assert pod.link("eth0")["mtu"] == 9000


def test_interface_that_is_down_has_its_addresses(pod: Pod) -> None:
    mac = pod.plug("veth0", FIRST)
    update_interface(interface(mac, address("10.0.0.2/24"), address("2001:db8::2/64"), up=False))
    assert "UP" not in pod.link("eth0")["flags"]
    update_interface(interface(mac, address("10.0.0.2/24"), address("2001:db8::2/64")))
    assert pod.addresses("eth0") == ["10.0.0.2/24", "2001:db8::2/64 nodad"]


def test_exchanged_names(pod: Pod) -> None:
    """The host plugs NICs in as it likes, and their names come from the order in which the guest saw them."""
    first, second = pod.plug("eth0", FIRST), pod.plug("eth1", SECOND)
    update_interface(interface(first, address("10.0.0.1/24"), name="eth1"))
    assert pod.link("eth1")["address"] == FIRST
    update_interface(interface(second, address("10.0.1.1/24"), name="eth0"))
    assert pod.link("eth0")["address"] == SECOND
    assert pod.names() == {"eth0", "eth1"}


@pytest.fixture
def old_kernel(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that does not rename what is up, as those before 6.2."""
    real = netlink.Socket.request

    def refuse(kernel: netlink.Socket, kind: int, body: bytes, flags: int = 0) -> None:
        if kind == netlink.RTM_NEWLINK and 3 in netlink.parse_attributes(body, 16):
            name = socket.if_indextoname(struct.unpack_from("=i", body, 4)[0])
            if "UP" in pod.link(name)["flags"]:
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        real(kernel, kind, body, flags)

    monkeypatch.setattr(netlink.Socket, "request", refuse)


@pytest.mark.usefixtures("old_kernel")
def test_renaming_what_is_up(pod: Pod) -> None:
    """It goes down for that, and with it its IPv6 addresses: they are there again afterwards."""
    first, second = pod.plug("veth0", FIRST), pod.plug("veth1", SECOND)
    addresses = (address("10.0.0.2/24"), address("2001:db8::2/64"))
    update_interface(interface(first, *addresses))
    update_interface(interface(second, *addresses, name="eth1"))
    update_interface(interface(first, *addresses, name="eth1"))
    (moved,) = pod.names() - {"eth1"}
    assert "UP" in pod.link(moved)["flags"]
    update_interface(interface(second, *addresses, name="eth0"))
    for name, mac in (("eth0", SECOND), ("eth1", FIRST)):
        assert pod.link(name)["address"] == mac
        assert "UP" in pod.link(name)["flags"]
        assert pod.addresses(name) == ["10.0.0.2/24", "2001:db8::2/64 nodad"]
    assert pod.names() == {"eth0", "eth1"}


def test_addresses_are_those_given(pod: Pod) -> None:
    mac = pod.plug("veth0", FIRST)
    sets: tuple[tuple[tuple[network.InterfaceAddress, ...], list[str]], ...] = (
        ((), []),
        (
            (address("10.0.0.2/24"), address("10.0.0.3/24"), address("10.0.1.2/24", broadcast="10.0.1.255")),
            ["10.0.0.2/24", "10.0.1.2/24 brd 10.0.1.255", "10.0.0.3/24"],
        ),
        # The first of the subnet goes, and the kernel lets the second go with it.
        (
            (address("10.0.0.3/24"), address("10.0.1.2/24"), address("2001:db8::2/64"), address("2001:db8::3/64")),
            ["10.0.1.2/24", "10.0.0.3/24", "2001:db8::2/64 nodad", "2001:db8::3/64 nodad"],
        ),
        (
            (address("10.0.0.3/25"), address("2001:db8::3/128", no_prefix_route=True)),
            ["10.0.0.3/25", "2001:db8::3/128 nodad noprefixroute"],
        ),
        ((address("10.7.0.2/24"), address("10.7.0.3/24")), ["10.7.0.2/24", "10.7.0.3/24"]),
        # Both go, the second with the first.
        ((address("192.0.2.2/32", peer="192.0.2.1"),), ["192.0.2.2 peer 192.0.2.1/32"]),
        ((address("192.0.2.2/32", scope=253),), ["192.0.2.2/32 scope link"]),
        ((), []),
    )
    for given, expected in sets:
        update_interface(interface(mac, *given))
        assert sorted(pod.addresses("eth0")) == sorted(expected)


def test_first_address_is_preferred(pod: Pod) -> None:
    texts = ("10.0.0.9/24", "10.0.0.3/24", "2001:db8::9/64", "2001:db8::3/64")
    set_up(pod, *(address(each) for each in texts))
    assert pod.ip("route", "get", "10.0.0.77").split()[4] == "10.0.0.9"
    # IPv6 prefers the one that it lists first, all else being equal.
    assert pod.addresses("eth0") == ["10.0.0.9/24", "10.0.0.3/24", "2001:db8::9/64 nodad", "2001:db8::3/64 nodad"]


def test_no_prefix_route(pod: Pod) -> None:
    set_up(pod, address("10.0.0.2/24", no_prefix_route=True), address("2001:db8::2/64", no_prefix_route=True))
    assert pod.addresses("eth0") == ["10.0.0.2/24 noprefixroute", "2001:db8::2/64 nodad noprefixroute"]
    assert pod.routes() == set()


def test_addresses_that_the_kernel_has_by_itself_stay(pod: Pod) -> None:
    """Its link-local, and what has a lifetime; not a link-local that somebody has given it."""
    set_up(pod)
    link_local = "fe80::ff:fe00:1"
    pod.ip("address", "add", "fe80::77/64", "dev", "eth0")
    pod.ip("address", "add", "2001:db8::5/64", "dev", "eth0", "valid_lft", "1000", "preferred_lft", "500")
    pod.ip("address", "add", "2001:db8::6/64", "dev", "eth0", "mngtmpaddr")
    pod.ip("address", "add", "10.0.0.5/24", "dev", "eth0", "valid_lft", "1000", "preferred_lft", "500")
    update_interface(interface(hardware(FIRST)))
    left = {each["local"] for each in pod.link("eth0")["addr_info"]}
    assert left == {link_local, "2001:db8::5", "2001:db8::6", "10.0.0.5"}
    # The host may well list it among the addresses.
    update_interface(interface(hardware(FIRST), address(f"{link_local}/64", scope=253)))
    assert link_local in {each["local"] for each in pod.link("eth0")["addr_info"]}


def test_interface_without_ipv6(pod: Pod) -> None:
    """It never has an address: it would be on the wire for a moment."""
    mac = pod.plug("veth0", FIRST)
    update_interface(interface(mac, address("10.0.0.2/24"), disable_ipv6=True))
    assert pod.sysctl("ipv6/conf/eth0/disable_ipv6") == "1"
    assert [each["local"] for each in pod.link("eth0")["addr_info"]] == ["10.0.0.2"]
    update_interface(interface(mac, address("10.0.0.2/24"), address("2001:db8::2/64")))
    assert pod.sysctl("ipv6/conf/eth0/disable_ipv6") == "0"
    assert pod.addresses("eth0") == ["10.0.0.2/24", "2001:db8::2/64 nodad"]
    update_interface(interface(mac, disable_ipv6=True))
    assert pod.link("eth0")["addr_info"] == []


def before_waiting(monkeypatch: pytest.MonkeyPatch, do: Callable[[netlink.Socket], object]) -> None:
    """Have something happen when it is known that the NIC is not there, and before the wait for it."""
    real = netlink.Socket.wait
    done = threading.Event()

    def wait(events: netlink.Socket, seconds: float) -> bool:
        if not done.is_set():
            done.set()
            do(events)
        return real(events, seconds)

    monkeypatch.setattr(netlink.Socket, "wait", wait)


def test_nic_that_comes_late(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    before_waiting(monkeypatch, lambda _: pod.plug("veth0", FIRST))
    update_interface(interface(hardware(FIRST), address("10.0.0.2/24")))
    assert pod.addresses("eth0") == ["10.0.0.2/24"]


def test_more_news_than_are_kept(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    """The news that the NIC is there are among those that are lost."""
    pod.plug("veth1", SECOND)

    def flood(events: netlink.Socket) -> None:
        events._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        for number in range(8):
            pod.ip("link", "set", "veth1", "mtu", str(1400 + number))
        pod.plug("veth0", FIRST)

    before_waiting(monkeypatch, flood)
    update_interface(interface(hardware(FIRST)))
    assert "eth0" in pod.names()


def test_nic_that_never_comes(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_PLUG_SECONDS", 0.01)
    with pytest.raises(Timeout, match="cannot set up interface eth0: no NIC 02:00:00:00:00:01 in"):
        update_interface(interface(hardware(FIRST)))


def test_what_the_kernel_refuses(pod: Pod) -> None:
    mac = pod.plug("veth0", FIRST)
    with pytest.raises(KatapyError, match="cannot add address 2001:db8::2 to eth0: "):
        update_interface(interface(mac, address("2001:db8::2/64"), disable_ipv6=True))
    with pytest.raises(InvalidArgument, match="cannot add route 2001:db8:9::/48 via 2001:db8::1 in table 7: "):
        update_routes([route(6, "2001:db8:9::/48", "2001:db8::1", table=7)])
    with pytest.raises(InvalidArgument, match=r"cannot add route 10.9.0.0/16 via 10.0.0.1 in table 254: .*\(.*gateway"):
        update_routes([route(4, "10.9.0.0/16", "10.0.0.1")])


# Routes


def test_routes_of_a_bridge(pod: Pod, changes: list[int]) -> None:
    """As CNI's bridge plugin has them; the kernel's own is among them and is not touched."""
    set_up(pod, address("10.22.0.2/16"), address("2001:db8::2/64"))
    changes.clear()
    wanted = [
        route(4, via="10.22.0.1"),
        route(4, "10.22.0.0/16", src="10.22.0.2", scope=253, protocol=2),
        route(6, "2001:db8::/64", metric=256, protocol=2),
        route(6, via="2001:db8::1"),
    ]
    update_routes(wanted)
    assert changes == [netlink.RTM_NEWROUTE, netlink.RTM_NEWROUTE]
    assert pod.routes() == {
        "default via 10.22.0.1 dev eth0",
        "10.22.0.0/16 dev eth0 proto kernel scope link src 10.22.0.2",
        "2001:db8::/64 dev eth0 proto kernel metric 256",
        "default via 2001:db8::1 dev eth0 metric 1024",
    }
    changes.clear()
    update_routes(wanted)
    assert changes == []


def test_routes_of_a_point_to_point(pod: Pod) -> None:
    """As CNI's ptp plugin has them: the kernel's route of the prefix is gone, and the gateway comes first."""
    set_up(pod, address("10.1.0.5/24"))
    update_routes(
        [
            route(4, via="10.1.0.1"),
            route(4, "10.1.0.0/24", "10.1.0.1", src="10.1.0.5"),
            route(4, "10.1.0.1/32", src="10.1.0.5", scope=253),
        ]
    )
    assert pod.routes() == {
        "default via 10.1.0.1 dev eth0",
        "10.1.0.0/24 via 10.1.0.1 dev eth0 src 10.1.0.5",
        "10.1.0.1 dev eth0 scope link src 10.1.0.5",
    }


def test_routes_by_a_link_local_gateway(pod: Pod) -> None:
    """As Calico has them, of both families."""
    set_up(pod, address("192.168.7.9/32"), address("2001:db8::9/128"))
    update_routes([route(4, via="169.254.1.1"), route(4, "169.254.1.1/32", scope=253), route(6, via="fe80::1")])
    assert pod.routes() == {
        "default via 169.254.1.1 dev eth0",
        "169.254.1.1 dev eth0 scope link",
        "default via fe80::1 dev eth0 metric 1024",
    }


def ways(*hops: tuple[str, int]) -> dict[str, Any]:
    return {"dev": "", "next_hops": tuple(NextHop("eth0", packed(via), weight) for via, weight in hops)}


EVERY_KIND = (
    (route(4, "10.0.0.0/24", src="10.0.0.2", scope=253, protocol=2), ""),
    (route(4, via="10.0.0.1", table=100, metric=5), "default via 10.0.0.1 dev eth0 table 100 metric 5"),
    (route(4, via="10.0.0.1", table=70000, protocol=4), "default via 10.0.0.1 dev eth0 table 70000 proto static"),
    (route(4, "10.2.0.0/16", scope=253, mtu=1280), "10.2.0.0/16 dev eth0 scope link mtu 1280"),
    (route(4, "10.3.0.0/16", dev="", type=6), "blackhole 10.3.0.0/16"),
    (route(4, "10.4.0.0/16", dev="", type=7, table=100), "unreachable 10.4.0.0/16 table 100"),
    (route(4, "10.5.0.0/16", dev="", type=8, metric=9), "prohibit 10.5.0.0/16 metric 9"),
    (route(4, "10.6.0.0/16", dev="", type=9), "throw 10.6.0.0/16"),
    (route(4, "10.7.0.0/16", "203.0.113.1", on_link=True), "10.7.0.0/16 via 203.0.113.1 dev eth0 onlink"),
    (route(4, "10.8.0.0/16", "fe80::1"), "10.8.0.0/16 via inet6 fe80::1 dev eth0"),
    (route(4, "10.9.0.0/16", "10.0.0.1", metric=1), "10.9.0.0/16 via 10.0.0.1 dev eth0 metric 1"),
    (route(4, "10.9.0.0/16", "10.0.0.7", metric=2), "10.9.0.0/16 via 10.0.0.7 dev eth0 metric 2"),
    (
        route(4, "10.10.0.0/16", **ways(("10.0.0.7", 3), ("fe80::1", 1))),
        "10.10.0.0/16 | nexthop via 10.0.0.7 dev eth0 weight 3 | nexthop via inet6 fe80::1 dev eth0 weight 1",
    ),
    (route(4, "10.11.0.0/16", **ways(("10.0.0.1", 9))), "10.11.0.0/16 via 10.0.0.1 dev eth0"),
    (route(6, "2001:db8::/64", metric=256, protocol=2), ""),
    (
        route(6, via="2001:db8::1", src="2001:db8::2", table=100),
        "default via 2001:db8::1 dev eth0 table 100 src 2001:db8::2 metric 1024",
    ),
    (route(6, "2001:db8:3::/48", dev="", type=6), "blackhole 2001:db8:3::/48 dev lo metric 1024"),
    (route(6, "2001:db8:4::/48", dev="", type=7, metric=3), "unreachable 2001:db8:4::/48 dev lo metric 3"),
    (
        route(6, "2001:db8:7::/48", "2001:db8:ffff::1", on_link=True),
        "2001:db8:7::/48 via 2001:db8:ffff::1 dev eth0 metric 1024 onlink",
    ),
    (route(6, "2001:db8:8::/48", mtu=1300), "2001:db8:8::/48 dev eth0 metric 1024 mtu 1300"),
    (
        route(6, "2001:db8:9::/48", **ways(("2001:db8::7", 2), ("2001:db8::8", 1))),
        "2001:db8:9::/48 metric 1024 | nexthop via 2001:db8::7 dev eth0 weight 2"
        " | nexthop via 2001:db8::8 dev eth0 weight 1",
    ),
)


@pytest.mark.parametrize("repeats", [1, 2])
def test_every_kind_of_route(pod: Pod, changes: list[int], repeats: int) -> None:
    """All are there, nothing is changed when they are given again, and all go."""
    set_up(pod, address("10.0.0.2/24"), address("2001:db8::2/64"))
    kernels = pod.routes()
    given = [each for each, _ in EVERY_KIND] * repeats
    update_routes(given)
    assert pod.routes() == kernels | {text for _, text in EVERY_KIND if text}
    changes.clear()
    update_routes(list(reversed(given)))
    assert changes == []
    for count in range(len(EVERY_KIND), 0, -1):
        update_routes([each for each, _ in EVERY_KIND[: count - 1]])
        assert changes == [netlink.RTM_DELROUTE], EVERY_KIND[count - 1]
        changes.clear()
    assert pod.routes() == set()


def test_order_of_the_ways_is_nothing(pod: Pod, changes: list[int]) -> None:
    set_up(pod, address("10.0.0.2/24", no_prefix_route=True))
    link = route(4, "10.0.0.0/24", scope=253)
    update_routes([route(4, **ways(("10.0.0.1", 1), ("10.0.0.7", 2))), link])
    changes.clear()
    update_routes([link, route(4, **ways(("10.0.0.7", 2), ("10.0.0.1", 1)))])
    assert changes == []


def test_route_that_goes_by_itself(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between being listed and being removed."""
    set_up(pod, address("10.0.0.2/24"))
    real = netlink.Socket.dump

    def dump(kernel: netlink.Socket, kind: int, body: bytes) -> list[bytes]:
        found = real(kernel, kind, body)
        pod.ip("route", "del", "10.0.0.0/24")
        return found

    monkeypatch.setattr(netlink.Socket, "dump", dump)
    update_routes([])
    assert pod.routes() == set()


def test_routes_that_change(pod: Pod) -> None:
    set_up(pod, address("10.0.0.2/24", no_prefix_route=True), address("2001:db8::2/64", no_prefix_route=True))
    link = [route(4, "10.0.0.0/24", scope=253), route(6, "2001:db8::/64")]
    for four, six in (("10.0.0.1", "2001:db8::1"), ("10.0.0.7", "2001:db8::7")):
        update_routes([route(4, via=four), route(6, via=six), *link])
        assert {f"default via {four} dev eth0", f"default via {six} dev eth0 metric 1024"} < pod.routes()
        assert len(pod.routes()) == 4


def test_more_routes_than_one_message_holds(pod: Pod) -> None:
    set_up(pod, address("10.0.0.2/24"))
    many = [route(4, f"10.{64 + number // 256}.{number % 256}.0/24", scope=253) for number in range(1000)]
    update_routes(many)
    assert len(pod.routes()) == 1000
    update_routes(many[:1])
    assert pod.routes() == {"10.64.0.0/24 dev eth0 scope link"}


def test_routes_that_the_kernel_has_by_itself_stay(pod: Pod) -> None:
    """They are not asked for either: the host may give all that it has."""
    set_up(pod, address("10.0.0.2/24"), address("2001:db8::2/64"))
    pod.ip("route", "add", "local", "10.50.0.0/16", "dev", "lo", "table", "100")
    pod.ip("route", "add", "10.51.0.0/16", "dev", "lo")
    pod.ip("route", "add", "10.54.0.0/16", "dev", "eth0", "table", "local")
    pod.ip("route", "add", "broadcast", "10.52.0.0/16", "dev", "eth0", "table", "100")
    pod.ip("-6", "route", "add", "2001:db8:5::/48", "dev", "eth0", "proto", "ra")
    pod.ip("-6", "route", "add", "ff05::/16", "dev", "eth0", "table", "100")
    everything = pod.ip("-4", "route", "show", "table", "all") + pod.ip("-6", "route", "show", "table", "all")
    update_routes(
        [
            route(4, "10.0.0.0/24", src="10.0.0.2", scope=253, protocol=2),
            route(6, "2001:db8::/64", metric=256, protocol=2),
            route(4, "10.60.0.0/16", table=255, type=2, scope=254),
            route(4, "127.7.0.0/16", dev="lo", scope=253),
            route(4, "10.53.0.255/32", type=3, scope=253),
            route(6, "fe80::/64", metric=7),
            route(6, "ff02::/16", metric=7),
            route(6, "2001:db8:6::/48", protocol=9),
        ]
    )
    assert pod.ip("-4", "route", "show", "table", "all") + pod.ip("-6", "route", "show", "table", "all") == everything


def test_routes_that_cannot_be_described_go(pod: Pod) -> None:
    """What somebody has added that is like a given one but for its type of service is not that one."""
    set_up(pod, address("10.0.0.2/24"))
    pod.ip("route", "add", "10.70.0.0/16", "tos", "0x10", "via", "10.0.0.1")
    update_routes([route(4, "10.0.0.0/24", scope=253), route(4, "10.70.0.0/16", "10.0.0.1")])
    assert pod.routes() == {"10.0.0.0/24 dev eth0 scope link", "10.70.0.0/16 via 10.0.0.1 dev eth0"}


def test_route_of_an_interface_that_is_not_there(pod: Pod) -> None:
    with pytest.raises(NotFound, match="there is no interface eth7"):
        update_routes([route(4, dev="eth7")])


# Neighbours


def test_neighbors(pod: Pod) -> None:
    set_up(pod, address("10.0.0.2/24"), address("2001:db8::2/64"))
    addresses = ("10.0.0.1", "2001:db8::1")
    for mac in (FIRST, SECOND):
        add_neighbors([Neighbor("eth0", packed(each), hardware(mac)) for each in addresses])
        lines = pod.ip("neighbour", "show", "nud", "permanent").splitlines()
        assert {line.strip() for line in lines} == {f"{each} dev eth0 lladdr {mac} PERMANENT" for each in addresses}
    with pytest.raises(NotFound, match="eth7"):
        add_neighbors([Neighbor("eth7", packed("10.0.0.1"), hardware(FIRST))])


# The socket


def test_only_the_kernel_answers(pod: Pod) -> None:
    """A container that has CAP_NET_ADMIN is in the same namespace, and can send to the agent's sockets."""
    with netlink.Socket(netlink.RTMGRP_LINK) as ours, socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as theirs:
        port = ours._socket.getsockname()[0]
        forged = struct.pack("=IHHIIi", 36, 2, 0, 1, port, 0) + bytes(16)
        theirs.sendto(forged, (port, 0))
        with pytest.raises(OSError, match="No such device"):
            ours.request(netlink.RTM_NEWLINK, struct.pack("=BxHiII", 0, 0, 999, 0, 0))
        theirs.sendto(forged, (port, 0))
        assert ours.wait(0.01) is False


def test_news_are_no_answers(pod: Pod) -> None:
    pod.plug("veth0", FIRST)
    question = struct.pack("=BxHiII", 0, 0, 0, 0, 0)
    with netlink.Socket(netlink.RTMGRP_LINK) as kernel:
        pod.ip("link", "set", "veth0", "mtu", "1400")
        assert len(kernel.dump(netlink.RTM_GETLINK, question)) == len(socket.if_nameindex())
        pod.ip("link", "set", "veth0", "mtu", "1500")
        kernel.request(netlink.RTM_NEWLINK, struct.pack("=BxHiII", 0, 0, socket.if_nametoindex("veth0"), 1, 1))


def test_each_request_has_its_own_outcome(pod: Pod) -> None:
    pod.plug("veth0", FIRST)
    up, none = (struct.pack("=BxHiII", 0, 0, index, 1, 1) for index in (socket.if_nametoindex("veth0"), 999))
    with netlink.Socket() as kernel:
        outcomes = kernel.request_all([netlink.Request(netlink.RTM_NEWLINK, each) for each in (none, up) * 50])
        assert [error.errno if error else 0 for error in outcomes] == [errno.ENODEV, 0] * 50
        assert "UP" in pod.link("veth0")["flags"]
        with pytest.raises(OSError, match="Operation not supported"):
            kernel.dump(9999 & ~3 | 2, bytes(16))


# The service


@pytest.fixture
def service() -> AgentService:
    unused: Any = None
    return AgentService(sandbox.Sandbox(unused), Events())


ETH0 = pb.Interface(
    device=hardware(FIRST),
    name="eth0",
    hardware_address=hardware(FIRST),
    mtu=1400,
    up=True,
    addresses=[pb.InterfaceAddress(address=packed("10.0.0.2"), prefix_length=24, broadcast=packed("10.0.0.255"))],
)
ROUTES = [
    pb.Route(family=4, interface="eth0", gateway=packed("10.0.0.1"), table=254, type=1, protocol=3),
    pb.Route(family=4, destination=packed("10.0.0.0"), prefix_length=24, interface="eth0", scope=253),
]
NEIGHBORS = [pb.Neighbor(interface="eth0", address=packed("10.0.0.1"), hardware_address=hardware(SECOND))]


def assert_network(pod: Pod) -> None:
    assert pod.addresses("eth0") == ["10.0.0.2/24 brd 10.0.0.255"]
    assert pod.link("eth0")["mtu"] == 1400
    assert pod.routes() == {"default via 10.0.0.1 dev eth0", "10.0.0.0/24 dev eth0 scope link"}
    assert SECOND in pod.ip("neighbour", "show", "nud", "permanent")


async def test_network_comes_with_the_sandbox(pod: Pod, service: AgentService, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the shared directory is mounted: either waits for its device, and neither for the other."""
    there = threading.Event()

    def mount(tag: str) -> None:
        assert tag == "share"
        pod.plug("veth0", FIRST)
        assert there.wait(SECONDS)

    real = network.update_interface

    def update(wanted: network.Interface) -> None:
        real(wanted)
        there.set()

    monkeypatch.setattr(storage, "mount_shared", mount)
    monkeypatch.setattr(network, "update_interface", update)
    await service.create_sandbox(
        pb.CreateSandboxRequest(shared_tag="share", interfaces=[ETH0], routes=ROUTES, neighbors=NEIGHBORS)
    )
    assert_network(pod)


async def test_network_comes_piece_by_piece(pod: Pod, service: AgentService) -> None:
    pieces: tuple[Callable[[], Awaitable[object]], ...] = (
        lambda: service.update_interface(pb.UpdateInterfaceRequest(interface=ETH0)),
        lambda: service.update_routes(pb.UpdateRoutesRequest(routes=ROUTES)),
        lambda: service.add_arp_neighbors(pb.AddARPNeighborsRequest(neighbors=NEIGHBORS)),
    )
    for piece in pieces:
        with pytest.raises(InvalidState, match="there is no sandbox yet"):
            await piece()
    await service.create_sandbox(pb.CreateSandboxRequest())
    pod.plug("veth0", FIRST)
    for piece in pieces:
        await piece()
    assert_network(pod)


async def test_sandbox_without_a_network_asks_the_kernel_nothing(
    service: AgentService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(netlink, "Socket")
    await service.create_sandbox(pb.CreateSandboxRequest())
    with pytest.raises(AlreadyExists):
        await service.create_sandbox(pb.CreateSandboxRequest())


async def test_network_that_makes_no_sense_makes_no_sandbox(pod: Pod, service: AgentService) -> None:
    for request in (
        pb.CreateSandboxRequest(interfaces=[ETH0, ETH0]),
        pb.CreateSandboxRequest(interfaces=[pb.Interface(name="eth0")]),
        pb.CreateSandboxRequest(routes=[pb.Route(family=4)]),
        pb.CreateSandboxRequest(neighbors=[pb.Neighbor()]),
    ):
        with pytest.raises(InvalidArgument):
            await service.create_sandbox(request)
    await service.create_sandbox(pb.CreateSandboxRequest())


async def test_interfaces_alone_have_no_routes(pod: Pod, service: AgentService) -> None:
    pod.plug("veth0", FIRST)
    await service.create_sandbox(pb.CreateSandboxRequest(interfaces=[ETH0]))
    assert pod.routes() == set()
