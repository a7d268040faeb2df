"""A pod's network namespace: what is found in it, what is refused, and that nothing of ours stays in it."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from network_frames import OTHER, OWN, ipv4
from network_lab import WITHOUT_VHOST, Lab, in_namespace, nothing_left, run, send, until_frame

from katapy.errors import AlreadyExists, InvalidArgument, Unavailable, Unsupported
from katapy.interfaces import Address, Neighbour, Network, NextHop
from katapy.network import helper, netlink, pod
from katapy.network.pod import Helper, PodNetwork, Settings, clean

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

# A filter of somebody else, asked after katapy's own.
FOREIGN = "pref 60000 protocol ip u32 match ip src 10.1.0.99/32 action mirred egress redirect dev lo"


@pytest.fixture
def lab() -> Iterator[Lab]:
    with nothing_left(), ExitStack() as stack:
        yield Lab(stack)


# -- what is found


async def test_an_interface_and_its_addresses(lab: Lab) -> None:
    lab.veth("eth0", "p0", "10.1.0.2/24", "2001:db8::2/64", mtu=1400)
    lab.ip("addr add 10.9.0.1 peer 10.9.0.2/32 dev eth0")
    lab.ip("addr add 10.8.0.1/16 brd 10.8.255.255 scope link noprefixroute dev eth0")
    lab.ip("addr add 2001:db8:2::2/64 dev eth0 valid_lft 1000 preferred_lft 1000")
    connection = await lab.connect()
    interface = connection.interface()
    assert interface == interface._replace(
        name="eth0", hardware_address=OWN, mtu=1400, up=True, no_arp=False, disable_ipv6=False
    )
    assert set(interface.addresses) == {
        Address("10.1.0.2", 24),
        Address("10.9.0.1", 32, peer="10.9.0.2"),
        Address("10.8.0.1", 16, broadcast="10.8.255.255", scope=253, no_prefix_route=True),
        Address("2001:db8::2", 64),
    }
    assert [nic.device for nic in connection.nics] == [interface.device]
    assert lab.names() == {"eth0", "katapy0", "katapy-sink"}


async def test_several_interfaces_in_their_order(lab: Lab) -> None:
    names = ["net1", "eth0", "a", "interface-of-15"]
    for number, name in enumerate(names):
        lab.veth(name, f"p{number}", f"10.{number}.0.2/24", mac=f"02:00:00:00:00:{number:02x}")
    lab.ip("link set dev a down")
    lab.ip("link set net1 arp off")
    in_namespace(lab.pod, lambda: Path("/proc/sys/net/ipv6/conf/eth0/disable_ipv6").write_text("1"))
    connection = await lab.connect()
    found = connection.network.interfaces
    assert [each.name for each in found] == names
    assert [each.up for each in found] == [True, True, False, True]
    assert [each.no_arp for each in found] == [True, False, False, False]
    assert [each.disable_ipv6 for each in found] == [False, True, False, False]
    assert len({each.device for each in found}) == len(names)
    assert [nic.device for nic in connection.nics] == [each.device for each in found]


async def test_routes(lab: Lab) -> None:
    lab.veth("eth0", "p0", "10.1.0.2/24", "2001:db8::2/64")
    lab.veth("eth1", "p1", "10.2.0.2/24", mac=OTHER)
    for command in (
        "route add default via 10.1.0.1 metric 50",
        "route add 169.254.1.1 dev eth0 scope link src 10.1.0.2",
        "route add 10.3.0.0/16 nexthop via 10.1.0.1 weight 2 nexthop via 10.2.0.1 weight 3",
        "route add blackhole 10.4.0.0/16",
        "route add unreachable 10.5.0.0/16",
        "route add 10.6.0.0/16 via 10.2.0.1 table 1000 mtu 1300",
        "route add 10.7.0.0/16 via 192.0.2.1 dev eth1 onlink proto static",
        "route add 10.8.0.0/16 via inet6 2001:db8::1 dev eth0",
        "-6 route add default via 2001:db8::1",
        "-6 route add 2001:db8:5::/48 via fe80::1 dev eth0",
        "-6 route add blackhole 2001:db8:6::/48",
        "-6 route add 2001:db8:7::/48 nexthop via 2001:db8::1 nexthop via 2001:db8::9",
        "-6 route add 2001:db8:8::/48 dev eth0 proto ra",
    ):
        lab.ip(command)
    routes = (await lab.connect()).network.routes
    found = {(each.family, each.destination): each for each in routes}
    assert len(found) == len(routes)

    default = found[4, ""]
    assert (default.interface, default.gateway, default.metric, default.prefix_length) == ("eth0", "10.1.0.1", 50, 0)
    direct = found[4, "169.254.1.1"]
    assert (direct.interface, direct.gateway, direct.scope, direct.preferred_source) == ("eth0", "", 253, "10.1.0.2")
    several = found[4, "10.3.0.0"]
    assert (several.interface, several.gateway) == ("", "")
    assert several.next_hops == (NextHop("eth0", "10.1.0.1", 2), NextHop("eth1", "10.2.0.1", 3))
    assert (found[4, "10.4.0.0"].type, found[4, "10.4.0.0"].interface) == (6, "")
    assert found[4, "10.5.0.0"].type == 7
    assert (found[4, "10.6.0.0"].table, found[4, "10.6.0.0"].mtu) == (1000, 1300)
    assert (found[4, "10.7.0.0"].on_link, found[4, "10.7.0.0"].protocol) == (True, 4)
    assert (found[4, "10.8.0.0"].gateway, found[4, "10.8.0.0"].interface) == ("2001:db8::1", "eth0")
    assert (found[4, "10.1.0.0"].prefix_length, found[4, "10.1.0.0"].preferred_source) == (24, "10.1.0.2")
    assert found[6, ""].gateway == "2001:db8::1"
    assert (found[6, "2001:db8:5::"].gateway, found[6, "2001:db8:5::"].prefix_length) == ("fe80::1", 48)
    assert (found[6, "2001:db8:6::"].type, found[6, "2001:db8:6::"].interface) == (6, "")
    assert {hop.gateway for hop in found[6, "2001:db8:7::"].next_hops} == {"2001:db8::1", "2001:db8::9"}
    assert (6, "2001:db8::") in found
    # What a router has advertised, and what every kernel makes by itself.
    assert not {(6, "2001:db8:8::"), (6, "fe80::"), (6, "ff00::"), (4, "10.1.0.2")} & set(found)


async def test_permanent_neighbours(lab: Lab) -> None:
    lab.veth("eth0", "p0", "10.1.0.2/24", "2001:db8::2/64")
    for each in ("10.1.0.1 nud permanent", "2001:db8::1 nud permanent", "10.1.0.7 nud stale", "10.1.0.8 nud reachable"):
        lab.ip(f"neigh add {each.split()[0]} lladdr {OTHER} {each.split(maxsplit=1)[1]} dev eth0")
    neighbours = (await lab.connect()).network.neighbours
    assert set(neighbours) == {Neighbour("eth0", "10.1.0.1", OTHER), Neighbour("eth0", "2001:db8::1", OTHER)}


async def test_an_empty_namespace(lab: Lab) -> None:
    before = lab.snapshot()
    connection = await lab.connect()
    assert connection.network == Network()
    assert connection.nics == []
    connection.close()
    assert lab.snapshot() == before


async def test_a_macvlan_and_a_persistent_tap(lab: Lab) -> None:
    lab.ip("link add p0 type veth peer name p1", namespace=lab.wire)
    for each in ("p0", "p1"):
        lab.ip(f"link set {each} up", namespace=lab.wire)
    lab.ip(f"link add eth0 link p0 netns {lab.pod} address {OWN} type macvlan mode bridge", namespace=lab.wire)
    lab.ip("addr add 10.1.0.2/24 dev eth0")
    lab.ip("link set eth0 up")
    lab.ip("tuntap add dev tap7 mode tap")
    lab.ip("addr add 10.2.0.2/24 dev tap7")
    lab.ip("link set tap7 up")
    lab.until(lambda: lab.is_ready("eth0"))
    before = lab.snapshot()
    connection = await lab.connect()
    assert {each.name for each in connection.network.interfaces} == {"eth0", "tap7"}
    wire = lab.capture("p1")
    out, back = ipv4("10.1.0.2", "10.1.0.9"), ipv4("10.1.0.9", "10.1.0.2", sender=OTHER)
    back = bytes.fromhex(OWN.replace(":", "")) + back[6:]
    send(connection.tap(), ipv4("10.1.0.3", "10.1.0.9"), out)
    assert not any(frame[12:14] == b"\x08\0" for frame in until_frame(wire, out))
    wire.send(back)
    until_frame(connection.tap(), back)
    connection.close()
    assert lab.snapshot() == before


# -- what is refused


@pytest.mark.parametrize(("kind", "arguments"), [("bridge", ""), ("ifb", ""), ("vxlan", "id 5 dstport 4789")])
async def test_an_unsupported_link_is_refused_by_its_name_and_kind(lab: Lab, kind: str, arguments: str) -> None:
    lab.veth("eth0", "p0", "10.1.0.2/24")
    lab.ip(f"link add other type {kind} {arguments}")
    before = lab.snapshot()
    with pytest.raises(Unsupported, match=f"other.*{kind}"):
        await lab.connect()
    assert lab.snapshot() == before


async def test_a_tun_that_carries_no_ethernet_is_refused(lab: Lab) -> None:
    lab.ip("tuntap add dev tun7 mode tun")
    with pytest.raises(Unsupported, match="tun7"):
        await lab.connect()


async def test_a_namespace_serves_one_vm_at_a_time(lab: Lab) -> None:
    lab.veth("eth0", "p0", "10.1.0.2/24")
    before = lab.snapshot()
    first = await lab.connect()
    held = lab.snapshot()
    with pytest.raises(AlreadyExists, match="another pod"):
        await lab.connect()
    assert lab.snapshot() == held
    first.close()
    assert lab.snapshot() == before
    await lab.connect()


@pytest.mark.parametrize("number", [8, 9])
async def test_interfaces_have_a_limit(lab: Lab, number: int) -> None:
    for each in range(number):
        lab.veth(f"eth{each}", f"p{each}", f"10.{each}.0.2/24", mac=f"02:00:00:00:00:{each:02x}")
    before = lab.snapshot()
    if number <= 8:
        connection = await lab.connect()
        assert len(connection.nics) == number
        connection.close()
    else:
        with pytest.raises(Unsupported, match="9 interfaces"):
            await lab.connect()
    assert lab.snapshot() == before


async def test_routes_have_a_limit(lab: Lab) -> None:
    lab.veth("eth0", "p0", "10.1.0.2/24")
    lines = "".join(f"route add 10.2.{number >> 8}.{number & 255}/32 via 10.1.0.1\n" for number in range(511))
    lab.batch(lines)
    connection = await lab.connect()
    assert len(connection.network.routes) == 512
    connection.close()
    lab.ip("route add 10.3.0.0/16 via 10.1.0.1")
    before = lab.snapshot()
    with pytest.raises(Unsupported, match="513 routes"):
        await lab.connect()
    assert lab.snapshot() == before


async def test_what_is_no_network_namespace_is_refused(lab: Lab) -> None:
    fd = os.open("/proc/self/ns/uts", os.O_RDONLY)
    network = PodNetwork(fd, WITHOUT_VHOST)
    os.close(fd)
    with pytest.raises(InvalidArgument, match="network namespace"):
        await network.connect(Helper())
    network.close()


# -- undo


@pytest.mark.parametrize("qdisc", ["", "ingress", "clsact"])
@pytest.mark.parametrize("foreign", [False, True])
async def test_the_namespace_is_left_as_it_was_found(lab: Lab, qdisc: str, foreign: bool) -> None:
    lab.veth("eth0", "p0", "10.1.0.2/24", "2001:db8::2/64")
    lab.ip("route add default via 10.1.0.1")
    lab.ip(f"neigh add 10.1.0.1 lladdr {OTHER} nud permanent dev eth0")
    if qdisc:
        lab.tc(f"qdisc add dev eth0 {qdisc}")
        if foreign:
            lab.tc(f"filter add dev eth0 ingress {FOREIGN}")
    before = lab.snapshot()
    connection = await lab.connect(Settings(vhost=False, ingress_rate=10**6, egress_rate=10**6))
    wire, frame = lab.capture("p0"), ipv4("10.1.0.9", "10.1.0.2", sender=OTHER)
    wire.send(frame)
    until_frame(connection.tap(), frame)
    connection.close()
    assert lab.snapshot() == before
    connection.close()


async def test_undo_where_an_interface_has_vanished(lab: Lab) -> None:
    lab.veth("eth0", "p0", "10.1.0.2/24")
    before = lab.snapshot()
    lab.veth("eth1", "p1", "10.2.0.2/24", mac=OTHER)
    connection = await lab.connect(Settings(vhost=False, egress_rate=10**6))
    lab.ip("link delete eth1")
    connection.close()
    assert lab.snapshot() == before


async def test_undo_leaves_the_rate_that_somebody_has_put_in_place_of_ours(lab: Lab) -> None:
    lab.veth("eth0", "p0", "10.1.0.2/24")
    connection = await lab.connect(Settings(vhost=False, egress_rate=10**6))
    lab.tc("qdisc replace dev eth0 root handle 5: tbf rate 1mbit burst 32k latency 50ms")
    connection.close()
    assert "tbf 5:" in lab.tc("qdisc show dev eth0")


async def test_an_interface_without_a_queue_has_none_afterwards(lab: Lab) -> None:
    """As CNI plugins make them: the kernel gives it a queue of 1000 packets with its first queueing discipline."""
    lab.veth("eth0", "p0", "10.1.0.2/24")
    lab.ip("link set eth0 txqueuelen 0")
    before = lab.snapshot()
    (await lab.connect(Settings(vhost=False, egress_rate=10**6))).close()
    assert lab.snapshot() == before
    process = lab.owner()
    process.kill()
    process.wait()
    await clean(lab.path)
    assert lab.snapshot() == before


async def test_a_namespace_without_an_interface_stays_without(lab: Lab) -> None:
    """Until it has one; and as long it is no matter who else is there."""
    before = lab.snapshot()
    first, second = await lab.connect(), await lab.connect()
    assert lab.snapshot() == before
    first.close()
    second.close()


# -- crashes


@pytest.mark.parametrize("egress_rate", [0, 10**6])
@pytest.mark.parametrize("qdisc", ["", "clsact"])
async def test_what_a_killed_owner_leaves_is_cleaned(lab: Lab, egress_rate: int, qdisc: str) -> None:
    lab.veth("eth0", "p0", "10.1.0.2/24", "2001:db8::2/64")
    if qdisc:
        lab.tc(f"qdisc add dev eth0 {qdisc}")
        lab.tc(f"filter add dev eth0 ingress {FOREIGN}")
    before = lab.snapshot()
    process = lab.owner(egress_rate=egress_rate)
    held = lab.snapshot()
    await pod.clean(lab.path)
    assert lab.snapshot() == held  # its VM lives
    process.kill()
    process.wait()
    assert lab.snapshot() != before
    await pod.clean(lab.path)
    assert lab.snapshot() == before
    await pod.clean(lab.path)
    assert lab.snapshot() == before


async def test_cleaning_what_is_gone_does_nothing(tmp_path: Path) -> None:
    await pod.clean(tmp_path / "never made")


async def test_after_a_crash_the_namespace_can_be_connected_again(lab: Lab) -> None:
    lab.veth("eth0", "p0", "10.1.0.2/24")
    before = lab.snapshot()
    process = lab.owner(egress_rate=10**6)
    process.kill()
    process.wait()
    connection = await lab.connect(Settings(vhost=False, egress_rate=10**6))
    wire, frame = lab.capture("p0"), ipv4("10.1.0.2", "10.1.0.9")
    send(connection.tap(), frame)
    until_frame(wire, frame)
    connection.close()
    assert lab.snapshot() == before


@pytest.mark.parametrize("stopped", [False, True])
async def test_a_helper_that_is_killed_at_once(lab: Lab, stopped: bool) -> None:
    lab.veth("eth0", "p0", "10.1.0.2/24")
    before, descriptors = lab.snapshot(), len(os.listdir("/proc/self/fd"))
    fd = os.open(lab.path, os.O_RDONLY)
    network, helper = PodNetwork(fd, WITHOUT_VHOST), Helper()
    os.close(fd)
    if stopped:
        helper._process.signal(signal.SIGSTOP)
        connecting = asyncio.ensure_future(network.connect(helper))
        await asyncio.sleep(0)
    helper._process.signal(signal.SIGKILL)
    with pytest.raises(Unavailable, match="helper died"):
        await (connecting if stopped else network.connect(helper))
    network.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert lab.snapshot() == before


@pytest.mark.parametrize("queue", [0, 1000])
def test_nothing_is_left_wherever_a_helper_is_killed(lab: Lab, monkeypatch: pytest.MonkeyPatch, queue: int) -> None:
    """After each of its requests to the kernel; so each must leave what can be told from somebody else's."""
    lab.veth("eth0", "p0", "10.1.0.2/24")
    lab.ip(f"link set eth0 txqueuelen {queue}")
    before = lab.snapshot()
    settings = Settings(vhost=False, loopback=False, egress_rate=10**6, ingress_rate=10**6)
    exchange = netlink.Netlink._exchange
    left = 0

    def counted(self: netlink.Netlink, *requests: bytes) -> None:
        nonlocal left
        exchange(self, *requests)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def in_child(clean: bool) -> int:
        pid = os.fork()
        if pid == 0:
            request = {"settings": settings._asdict(), "state": {}}
            try:
                work = helper.Helper(request, netlink.Netlink())
                work.clean() if clean else work.connect()
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    monkeypatch.setattr(netlink.Netlink, "_exchange", counted)
    for number in itertools.count(1):
        left = number
        status = in_namespace(lab.pod, lambda: in_child(clean=False))
        left = 0
        assert in_namespace(lab.pod, lambda: in_child(clean=True)) == 0
        assert lab.snapshot() == before, number
        if status != -signal.SIGKILL:
            break
    assert status == 0
    assert number > 10


@pytest.mark.parametrize("event", range(0, 12, 2))
@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_helper_that_is_killed_at_work_leaves_nothing(lab: Lab, event: int, cancelled: bool) -> None:
    """Frames for the pod went to a tap that was gone, until the next VM came."""
    lab.veth("eth0", "p0", "10.1.0.2/24", "2001:db8::2/64")
    lab.veth("eth1", "p1", "10.2.0.2/24", mac=OTHER)
    before = lab.snapshot()

    def watch() -> socket.socket:
        watching = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        watching.bind((0, 1))  # RTMGRP_LINK
        return watching

    watching = in_namespace(lab.pod, watch)
    fd = os.open(lab.path, os.O_RDONLY)
    network, helper = PodNetwork(fd, Settings(vhost=False, egress_rate=10**6)), Helper()
    os.close(fd)
    seen = 0

    def happened() -> None:
        nonlocal seen
        watching.recv(1 << 16)
        seen += 1
        if seen == event + 1 and cancelled:
            connecting.cancel()
        elif seen == event + 1:
            helper._process.signal(signal.SIGKILL)

    loop = asyncio.get_running_loop()
    loop.add_reader(watching, happened)
    connecting = asyncio.ensure_future(network.connect(helper))
    try:
        nics = await connecting
    except (Unavailable, asyncio.CancelledError):
        assert network.network == Network()
    else:
        for nic in nics:
            pod.close_nic(nic)
    finally:
        loop.remove_reader(watching)
        watching.close()
    network.close()
    assert seen
    assert lab.snapshot() == before


async def test_giving_up_leaves_nothing(lab: Lab) -> None:
    """A container that is killed while it starts cancels the wait for the helper."""
    lab.veth("eth0", "p0", "10.1.0.2/24")
    before = lab.snapshot()
    fd = os.open(lab.path, os.O_RDONLY)
    network, helper = PodNetwork(fd, WITHOUT_VHOST), Helper()
    os.close(fd)
    helper._process.signal(signal.SIGSTOP)
    connecting = asyncio.ensure_future(network.connect(helper))
    await asyncio.sleep(0)
    connecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await connecting
    network.close()
    assert lab.snapshot() == before


# -- rates


def rates(lab: Lab, name: str) -> list[int]:
    """Return the rates of an interface's tbfs in bytes a second."""
    found = json.loads(lab.tc(f"-j qdisc show dev {name}"))
    return [each["options"]["rate"] for each in found if each["kind"] == "tbf"]


@pytest.mark.parametrize("rate", [125, 10**6, 125_000_000, (1 << 32) - 1, 5 * 10**9, 125 * 10**12])
async def test_rates_of_all_sizes(lab: Lab, rate: int) -> None:
    """A rate below 250 bytes a second or of 4 GiB and more killed the helper."""
    lab.veth("eth0", "p0", "10.1.0.2/24")
    before = lab.snapshot()
    connection = await lab.connect(Settings(vhost=False, ingress_rate=rate, egress_rate=rate))
    assert (rates(lab, "katapy0"), rates(lab, "eth0")) == ([rate], [rate])
    wire, frame = lab.capture("p0"), ipv4("10.1.0.2", "10.1.0.9", body=bytes(1480))
    send(connection.tap(), frame)
    until_frame(wire, frame)
    connection.close()
    assert lab.snapshot() == before


async def test_one_direction_has_a_rate(lab: Lab) -> None:
    lab.veth("eth0", "p0", "10.1.0.2/24")
    connection = await lab.connect(Settings(vhost=False, ingress_rate=10**6))
    assert (rates(lab, "katapy0"), rates(lab, "eth0")) == ([10**6], [])
    connection.close()
    connection = await lab.connect(Settings(vhost=False, egress_rate=10**6))
    assert (rates(lab, "katapy0"), rates(lab, "eth0")) == ([], [10**6])


@pytest.mark.parametrize("shaped", [False, True])
async def test_what_is_limited_at_its_hosts_end_is_left_alone(lab: Lab, shaped: bool) -> None:
    """As the CNI plugin "bandwidth" does, whom the same annotations tell."""
    host = f"katapyt{os.getpid() % 10**7}"
    run("ip", "link", "add", host, "type", "veth", "peer", "name", "eth0", "netns", lab.pod)
    lab.stack.callback(lambda: subprocess.run(["ip", "link", "delete", host], capture_output=True, check=False))
    if shaped:
        run(*f"tc qdisc add dev {host} root tbf rate 1mbit burst 32k latency 50ms".split())
    connection = await lab.connect(Settings(vhost=False, asked_ingress=10**6, asked_egress=10**6))
    expected = [] if shaped else [10**6]
    assert (rates(lab, "katapy0"), rates(lab, "eth0")) == (expected, expected)
    connection.close()
    # What the host's configuration says is not the plugin's affair.
    connection = await lab.connect(Settings(vhost=False, ingress_rate=5000, egress_rate=6000, asked_egress=7000))
    assert (rates(lab, "katapy0"), rates(lab, "eth0")) == ([5000], [6000])
    connection.close()


async def test_the_hosts_end_is_not_mistaken(lab: Lab) -> None:
    """The other end's index was looked up on the host, also where that end is in another namespace."""
    host, index = f"katapyt{os.getpid() % 10**7}", 1_000_000 + os.getpid()
    run(*f"ip link add name {host} index {index} type ifb".split())
    lab.stack.callback(run, "ip", "link", "delete", host)
    run(*f"tc qdisc add dev {host} root tbf rate 1mbit burst 32k latency 50ms".split())
    lab.ip(f"link add name p0 index {index} type veth peer name eth0 netns {lab.pod}", namespace=lab.wire)
    assert json.loads(lab.ip("-j link show dev p0", namespace=lab.wire))[0]["ifindex"] == index
    connection = await lab.connect(Settings(vhost=False, asked_ingress=10**6, asked_egress=10**6))
    assert (rates(lab, "katapy0"), rates(lab, "eth0")) == ([10**6], [10**6])
    connection.close()


@pytest.mark.parametrize(
    ("host", "asked", "expected"), [(0, 0, []), (0, 2000, [2000]), (1000, 2000, [1000]), (2000, 1000, [1000])]
)
async def test_the_lower_limit_holds(lab: Lab, host: int, asked: int, expected: list[int]) -> None:
    lab.veth("eth0", "p0", "10.1.0.2/24")
    settings = Settings(vhost=False, ingress_rate=host, egress_rate=host, asked_ingress=asked, asked_egress=asked)
    await lab.connect(settings)
    assert (rates(lab, "katapy0"), rates(lab, "eth0")) == (expected, expected)


async def test_a_queueing_discipline_of_somebody_else_is_not_replaced(lab: Lab) -> None:
    lab.veth("eth0", "p0", "10.1.0.2/24")
    lab.tc("qdisc add dev eth0 root handle 1: htb")
    before = lab.snapshot()
    with pytest.raises(Unsupported, match=r"eth0.*htb"):
        await lab.connect(Settings(vhost=False, egress_rate=10**6))
    assert lab.snapshot() == before
    await lab.connect(Settings(vhost=False, ingress_rate=10**6))


# -- taps


async def test_two_queues(lab: Lab) -> None:
    lab.veth("eth0", "p0", "10.1.0.2/24")
    before = lab.snapshot()
    connection = await lab.connect(Settings(vhost=False, queues=2))
    (nic,) = connection.nics
    assert len(nic.tap_fds) == 2
    wire = lab.capture("p0")
    for number, fd in enumerate(nic.tap_fds):
        frame = ipv4("10.1.0.2", "10.1.0.9", body=bytes((number,)) * 40)
        send(fd, frame)
        until_frame(wire, frame)
    frame = ipv4("10.1.0.9", "10.1.0.2", sender=OTHER)
    wire.send(frame)
    ready, _, _ = select.select(nic.tap_fds, [], [], 20)
    until_frame(ready[0], frame)
    connection.close()
    assert lab.snapshot() == before


@pytest.mark.skipif(not Path("/dev/vhost-net").exists(), reason="no vhost-net")
async def test_vhost_has_a_descriptor_for_each_queue(lab: Lab) -> None:
    lab.veth("eth0", "p0", "10.1.0.2/24")
    lab.veth("eth1", "p1", "10.2.0.2/24", mac=OTHER)
    connection = await lab.connect(Settings(queues=2))
    for nic in connection.nics:
        assert [os.readlink(f"/proc/self/fd/{fd}") for fd in nic.vhost_fds] == ["/dev/vhost-net"] * 2
        assert [os.readlink(f"/proc/self/fd/{fd}") for fd in nic.tap_fds] == ["/dev/net/tun"] * 2


async def test_an_mtu_that_no_tap_can_have(lab: Lab) -> None:
    """A veth's may be 65,535 bytes, and a tap's 14 less."""
    lab.veth("eth0", "p0", "10.1.0.2/24", mtu=65535)
    connection = await lab.connect()
    assert connection.interface().mtu == 65535
