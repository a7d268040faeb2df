"""What becomes of a pod's network namespace while its VM runs."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack

import pytest
from network_frames import OTHER, OTHER_IP, OWN, OWN_IP, OWN_IP6, arp, ipv4, ipv6, mac
from network_lab import DEADLINE, Connection, Lab, nothing_left, send, until_frame

from katapy.interfaces import Network
from katapy.network.pod import Change, close_nic

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]


@pytest.fixture
def lab() -> Iterator[Lab]:
    """On one processor, so that no frame overtakes another."""
    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(processors)})
    try:
        with nothing_left(), ExitStack() as stack:
            lab = Lab(stack)
            lab.veth("eth0", "p0", f"{OWN_IP}/24", f"{OWN_IP6}/64")
            yield lab
    finally:
        os.sched_setaffinity(0, processors)


class Following:
    """A pod's changes; the NICs that come are the connection's."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._changes = connection.pod.changes()

    async def next(self) -> Change:
        async with asyncio.timeout(DEADLINE):
            change = await anext(self._changes)
        self._connection.nics += change.added
        for nic in [each for each in self._connection.nics if each.device in change.removed]:
            self._connection.nics.remove(nic)
            close_nic(nic)
        return change

    async def until(self, condition: Callable[[Network], bool]) -> int:
        """Follow until the network is so; return how many changes that took."""
        count = 0
        while not condition(self._connection.network):
            await self.next()
            count += 1
        return count

    async def close(self) -> None:
        assert isinstance(self._changes, AsyncIterator)
        await self._changes.aclose()  # type: ignore[attr-defined]


@pytest.fixture
async def connection(lab: Lab) -> Connection:
    return await lab.connect()


@pytest.fixture
async def following(connection: Connection) -> AsyncIterator[Following]:
    following = Following(connection)
    yield following
    await following.close()


async def test_an_interface_comes_and_goes(lab: Lab, connection: Connection, following: Following) -> None:
    before = connection.network
    lab.veth("eth1", "p1", "10.2.0.2/24", mac=OTHER)
    await following.until(lambda network: bool(len(network.interfaces) == 2 and network.interfaces[1].addresses))
    assert [each.name for each in connection.network.interfaces] == ["eth0", "eth1"]
    assert connection.network.interfaces[0] == before.interfaces[0]
    wire, frame = lab.capture("p1"), ipv4("10.2.0.2", "10.2.0.1", sender=OTHER)
    send(connection.tap("eth1"), frame)
    until_frame(wire, frame)
    wire.send(back := mac(OTHER) + mac(OWN) + frame[12:])
    until_frame(connection.tap("eth1"), back)

    device = connection.interface("eth1").device
    lab.ip(f"link set eth1 netns {lab.wire}")
    change = await following.next()
    assert (change.removed, change.added) == ((device,), ())
    assert change.network == before

    lab.ip(f"link set eth1 netns {lab.pod}", namespace=lab.wire)
    change = await following.next()
    assert [nic.device for nic in change.added] == [connection.interface("eth1").device]
    assert connection.interface("eth1").device != device


async def test_an_interface_comes_back_before_the_vm_has_let_go(lab: Lab, connection: Connection) -> None:
    """Its tap could not be made, for the old one had the same name, and the pod was without it for ever."""
    changes = connection.pod.changes()
    elsewhere = lab.namespace("elsewhere")  # where its index is free, so that it keeps it
    index = lab.link("eth0")["ifindex"]
    lab.ip(f"link set eth0 netns {elsewhere}")
    async with asyncio.timeout(DEADLINE):
        change = await anext(changes)
        assert change.network.interfaces == ()
        lab.ip(f"link set eth0 netns {lab.pod}", namespace=elsewhere)
        assert lab.link("eth0")["ifindex"] == index
        lab.ip(f"addr add {OWN_IP}/24 dev eth0")
        lab.ip("link set eth0 up")
        while not connection.network.interfaces or not connection.interface().addresses:
            connection.nics += (await anext(changes)).added
    wire, frame = lab.capture("p0"), ipv4(OWN_IP, OTHER_IP)
    send(connection.tap(), frame)
    until_frame(wire, frame)
    await changes.aclose()  # type: ignore[attr-defined]


async def test_what_a_helper_has_left_that_was_killed_during_a_change(lab: Lab, connection: Connection) -> None:
    """The frames of the interface went to a tap that is gone, and the filter stayed when the pod had ended."""
    lab.veth("eth1", "p1", "10.2.0.2/24", mac=OTHER)
    lab.ip("tuntap add dev gone mode tap")
    lab.tc("qdisc add dev eth1 ingress")
    redirect = "u32 match u32 0 0 action mirred egress redirect dev gone"
    lab.tc(f"filter add dev eth1 ingress protocol all prio {0xCA7A} {redirect}")
    lab.ip("link delete gone")
    changes = connection.pod.changes()
    async with asyncio.timeout(DEADLINE):
        connection.nics += (await anext(changes)).added
    await changes.aclose()  # type: ignore[attr-defined]
    wire, frame = lab.capture("p1"), ipv4("10.2.0.9", "10.2.0.2", sender=OWN)
    wire.send(frame)
    until_frame(connection.tap("eth1"), frame)
    connection.close()
    assert "ingress" not in lab.tc("qdisc show dev eth1")


async def test_filters_follow_the_addresses(lab: Lab, connection: Connection, following: Following) -> None:
    wire = lab.capture("p0")
    old, new, new6 = ipv4(OWN_IP, OTHER_IP), ipv4("10.1.0.5", OTHER_IP), ipv6("2001:db8::5", "2001:db8::1")
    send(connection.tap(), new, new6, old)
    assert not {new, new6} & set(until_frame(wire, old))
    lab.ip("addr add 10.1.0.5/24 dev eth0")
    change = await following.next()
    assert [each.address for each in change.network.interfaces[0].addresses] == [OWN_IP, "10.1.0.5", OWN_IP6]
    assert (change.added, change.removed) == ((), ())
    send(connection.tap(), new)
    until_frame(wire, new)
    lab.ip("addr add 2001:db8::5/64 dev eth0")
    await following.next()
    send(connection.tap(), old, new, new6)
    assert {old, new} <= set(until_frame(wire, new6))
    lab.ip("addr del 2001:db8::5/64 dev eth0")
    await following.next()
    lab.ip("addr del 10.1.0.5/24 dev eth0")
    await following.next()
    send(connection.tap(), new, new6, last := ipv4(OWN_IP, OTHER_IP, body=b"end"))
    assert not {new, new6} & set(until_frame(wire, last))


async def test_a_changed_mtu_and_hardware_address(lab: Lab, connection: Connection, following: Following) -> None:
    lab.ip("link set eth0 mtu 1300")
    assert (await following.next()).network.interfaces[0].mtu == 1300
    assert lab.link("katapy0")["mtu"] == 1300
    lab.ip(f"link set eth0 address {OTHER}")
    assert (await following.next()).network.interfaces[0].hardware_address == OTHER
    wire, frame = lab.capture("p0"), ipv4(OWN_IP, "10.1.0.9", sender=OTHER)
    send(connection.tap(), ipv4(OWN_IP, "10.1.0.9"), frame)
    assert ipv4(OWN_IP, "10.1.0.9") not in until_frame(wire, frame)


async def test_a_new_name_and_state(lab: Lab, connection: Connection, following: Following) -> None:
    device = connection.interface().device
    lab.ip("link set eth0 down")
    assert not (await following.next()).network.interfaces[0].up
    lab.ip("link set eth0 name net7")
    change = await following.next()
    assert (change.network.interfaces[0].name, change.network.interfaces[0].device) == ("net7", device)
    assert (change.added, change.removed) == ((), ())


async def test_routes_and_neighbours(lab: Lab, connection: Connection, following: Following) -> None:
    lab.ip("route add 10.5.0.0/16 via 10.1.0.1")
    change = await following.next()
    assert "10.5.0.0" in [each.destination for each in change.network.routes]
    lab.ip(f"neigh add 10.1.0.1 lladdr {OTHER} nud permanent dev eth0")
    assert [each.address for each in (await following.next()).network.neighbours] == ["10.1.0.1"]
    lab.ip("route del 10.5.0.0/16")
    assert "10.5.0.0" not in [each.destination for each in (await following.next()).network.routes]


async def test_many_changes_at_once_are_told_of_together(
    lab: Lab, connection: Connection, following: Following
) -> None:
    lab.batch("".join(f"addr add 10.1.1.{number}/24 dev eth0\n" for number in range(1, 101)))
    assert await following.until(lambda network: len(network.interfaces[0].addresses) == 102) <= 3


async def test_an_unsupported_link_is_told_of_and_the_pod_goes_on(
    lab: Lab, connection: Connection, caplog: pytest.LogCaptureFixture
) -> None:
    changes = connection.pod.changes()
    waiting = asyncio.ensure_future(anext(changes))
    lab.ip("link add br0 type bridge")
    async with asyncio.timeout(DEADLINE):
        while not any("br0" in message for message in caplog.messages):
            done, _ = await asyncio.wait([waiting], timeout=0.05)
            assert not done
    wire, frame = lab.capture("p0"), ipv4(OWN_IP, OTHER_IP)
    send(connection.tap(), frame)
    until_frame(wire, frame)
    lab.ip("link delete br0")
    lab.ip("addr add 10.1.0.5/24 dev eth0")
    async with asyncio.timeout(DEADLINE):
        change = await waiting
    assert "10.1.0.5" in [each.address for each in change.network.interfaces[0].addresses]
    await changes.aclose()  # type: ignore[attr-defined]


async def test_while_filters_change_nothing_gets_past_them(lab: Lab, connection: Connection) -> None:
    """Between the old ones and the new, the namespace's own stack answered the guest for the pod's addresses."""
    changes = connection.pod.changes()
    before = lab.counters()
    asks = arp(1, OTHER_IP, OWN_IP, sender=OTHER, source=OTHER)
    packet = ipv4(OTHER_IP, OWN_IP, protocol=1, body=bytes(8))
    wire = lab.capture("p0")
    for number in range(5, 9):
        waiting = asyncio.ensure_future(anext(changes))
        lab.ip(f"addr add 10.1.0.{number}/24 dev eth0")
        async with asyncio.timeout(DEADLINE):
            while not waiting.done():
                send(connection.tap(), *[asks, packet] * 50)
                await asyncio.sleep(0)
        await waiting
    mark = ipv4(OWN_IP, OTHER_IP)
    send(connection.tap(), mark)
    assert not {asks, packet} & set(until_frame(wire, mark))
    assert lab.counters() == before
    assert lab.ip("neigh") == ""
    wire.send(mac(OWN) + mac(OTHER) + mark[12:])
    assert until_frame(connection.tap(), mac(OWN) + mac(OTHER) + mark[12:]) == []
    await changes.aclose()  # type: ignore[attr-defined]


async def test_afterwards_the_namespace_is_as_it_would_be_without_a_vm(
    lab: Lab, connection: Connection, following: Following
) -> None:
    lab.ip("addr add 10.1.0.5/24 dev eth0")
    await following.next()
    lab.veth("eth1", "p1", mac=OTHER)
    await following.until(lambda network: len(network.interfaces) == 2 and network.interfaces[1].up)
    await following.close()
    connection.close()
    assert lab.names() == {"eth0", "eth1"}
    assert "ingress" not in lab.tc("qdisc")
    for name in ("eth0", "eth1"):
        assert lab.tc(f"filter show dev {name} ingress") == ""
