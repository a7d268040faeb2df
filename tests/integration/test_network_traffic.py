"""Frames between a pod's taps and its wire, through the kernel: all that may pass, and none of the attacks."""

from __future__ import annotations

import json
import os
import select
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from network_frames import (
    ALLOWED,
    FORBIDDEN,
    GATEWAY,
    OTHER,
    OTHER_IP,
    OTHER_IP6,
    OWN,
    OWN_IP,
    OWN_IP6,
    arp,
    ethernet,
    ipv4,
    ipv6,
    mac,
    neighbour,
    udp,
)
from network_lab import Lab, frames_at, in_namespace, nothing_left, send, until_frame

from katapy.network.pod import Settings

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

MARK = ipv4(OWN_IP, "255.255.255.255", protocol=17, body=udp(1, 1))
BACK = mac(OWN) + mac(OTHER) + ipv4(OTHER_IP, OWN_IP, protocol=17, body=udp(2, 2))[12:]


@pytest.fixture(params=["tcfilter", "macvtap"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """On one processor, so that no frame overtakes another; by each model."""
    processors = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(processors)})
    try:
        with nothing_left(), ExitStack() as stack:
            lab = Lab(stack, model=request.param)
            lab.veth("eth0", "p0", f"{OWN_IP}/24", f"{OWN_IP6}/64", mtu=9000)
            lab.require_model()
            yield lab
    finally:
        os.sched_setaffinity(0, processors)


def to_guest(frame: bytes, destination: str = OWN) -> bytes:
    """As another host sends it."""
    return mac(destination) + mac(OTHER) + frame[12:]


async def test_what_may_pass_passes_as_it_is(lab: Lab) -> None:
    connection = await lab.connect()
    wire = lab.capture("p0")
    for frame in ALLOWED.values():
        send(connection.tap(), frame)
        until_frame(wire, frame)


async def test_what_may_not_pass_reaches_nobody(lab: Lab) -> None:
    """Neither the wire nor the namespace's own stack, which would answer for the pod's addresses."""
    connection = await lab.connect()
    wire = lab.capture("p0")
    until_frame_sent = lab.counters()
    send(connection.tap(), *FORBIDDEN.values(), MARK)
    assert not set(until_frame(wire, MARK)) & set(FORBIDDEN.values())
    assert lab.counters() == until_frame_sent
    assert lab.ip("neigh") == ""
    # Nothing was said to the guest either.
    wire.send(BACK)
    assert until_frame(connection.tap(), BACK) == []


@pytest.mark.parametrize("cut", [14, 15, 20, 33, 37, 53, 57])
async def test_frames_cut_off_reach_nobody(lab: Lab, cut: int) -> None:
    connection = await lab.connect()
    wire = lab.capture("p0")
    before = lab.counters()
    cuts = {frame[:cut] for frame in FORBIDDEN.values() if len(frame) > cut}
    send(connection.tap(), *cuts, MARK)
    assert not set(until_frame(wire, MARK)) & cuts
    assert lab.counters() == before


async def test_the_pods_own_stack_does_not_answer_the_guest(lab: Lab) -> None:
    connection = await lab.connect()
    before = lab.counters()
    echo = b"\x08\0" + (0xFFFF - 0x0800).to_bytes(2, "big") + bytes(4)
    frames = [
        arp(1, OTHER_IP, OWN_IP, sender=OTHER, source=OTHER),
        arp(1, OTHER_IP, OWN_IP),
        arp(1, OWN_IP, OWN_IP),
        ipv4(OTHER_IP, OWN_IP, protocol=1, body=echo),
        ipv4(OWN_IP, OWN_IP, protocol=1, body=echo),
        neighbour(135, OTHER_IP6, OWN_IP6),
        ipv6(OTHER_IP6, OWN_IP6, protocol=58, body=b"\x80" + bytes(7)),
    ]
    send(connection.tap(), *frames)
    wire = lab.capture("p0")
    wire.send(BACK)
    assert until_frame(connection.tap(), BACK) == []
    assert lab.counters() == before
    assert lab.ip("neigh") == ""


@pytest.mark.parametrize("size", [60, 1514, 9014])
async def test_frames_of_all_sizes_pass_both_ways(lab: Lab, size: int) -> None:
    connection = await lab.connect()
    wire = lab.capture("p0")
    out = ipv4(OWN_IP, OTHER_IP, body=bytes(size - 34))
    assert len(out) == size
    send(connection.tap(), out)
    until_frame(wire, out)
    back = to_guest(ipv4(OTHER_IP, OWN_IP, body=b"\x55" * (size - 34)))
    wire.send(back)
    assert until_frame(connection.tap(), back) == []


@pytest.mark.parametrize(
    "frame",
    [
        to_guest(ipv4(OTHER_IP, OWN_IP)),
        to_guest(ipv4(OTHER_IP, "255.255.255.255"), "ff:ff:ff:ff:ff:ff"),
        to_guest(ipv4(OTHER_IP, "224.0.0.251"), "01:00:5e:00:00:fb"),
        to_guest(ipv6(OTHER_IP6, "ff02::fb"), "33:33:00:00:00:fb"),
        to_guest(arp(1, OTHER_IP, OWN_IP), "ff:ff:ff:ff:ff:ff"),
        to_guest(neighbour(135, OTHER_IP6, OWN_IP6), "33:33:ff:00:00:02"),
        to_guest(ethernet(0x8100, b"\0\x05" + ipv4(OTHER_IP, OWN_IP)[12:])),
        to_guest(ethernet(0x88CC, bytes(46)), "01:80:c2:00:00:0e"),
        to_guest(ipv4(OTHER_IP, OWN_IP), "02:00:00:00:00:99"),
    ],
    ids=["unicast", "broadcast", "multicast", "multicast6", "arp", "ns", "vlan", "lldp", "to another"],
)
async def test_all_that_comes_reaches_the_guest_and_only_the_guest(lab: Lab, frame: bytes) -> None:
    connection = await lab.connect()
    before = lab.counters()
    wire = lab.capture("p0")
    wire.send(frame)
    assert until_frame(connection.tap(), frame) == []
    # What is for many, the kernel gives a macvtap's interface too.
    if lab.model == "tcfilter" or not frame[0] & 1:
        assert lab.counters() == before
        assert lab.ip("neigh") == ""


async def test_without_checks_everything_passes(lab: Lab) -> None:
    connection = await lab.connect(Settings(vhost=False, checked=False))
    wire = lab.capture("p0")
    before = lab.counters()
    for frame in FORBIDDEN.values():
        if len(frame) > 14 and frame[12] not in (0x81, 0x88):  # the tag is beside what a socket reads
            send(connection.tap(), frame)
            until_frame(wire, frame)
    assert lab.counters() == before


async def test_metadata_services_where_they_are_allowed(lab: Lab) -> None:
    connection = await lab.connect(Settings(vhost=False, metadata=True))
    wire = lab.capture("p0")
    for name in ("metadata", "metadata by ipv6"):
        send(connection.tap(), FORBIDDEN[name])
        until_frame(wire, FORBIDDEN[name])


async def test_what_is_dropped_is_kept_nowhere(lab: Lab) -> None:
    """The sink takes a frame or two, and never keeps the guest waiting."""
    connection = await lab.connect()
    spoofed = ipv4(OTHER_IP, GATEWAY, body=bytes(1400))
    for _ in range(10_000):
        send(connection.tap(), spoofed)
    (sink,) = json.loads(lab.ip("-j -s link show dev katapy-sink"))
    assert sink["txqlen"] == 1
    assert sink["stats64"]["tx"]["dropped"] > 9_000
    (queue,) = json.loads(lab.tc("-j -s qdisc show dev katapy-sink"))
    assert queue["backlog"] < 10_000
    wire = lab.capture("p0")
    send(connection.tap(), MARK)
    assert spoofed not in until_frame(wire, MARK)


async def test_the_taps_say_nothing_of_their_own(lab: Lab) -> None:
    """A tap with IPv6 asks for routers and joins groups, and so would the host be seen by its guest."""
    connection = await lab.connect()

    def disabled() -> set[str]:
        return {each.read_text() for each in Path("/proc/sys/net/ipv6/conf").glob("katapy*/disable_ipv6")}

    assert in_namespace(lab.pod, disabled) == {"1\n"}
    for name in ("katapy0", "katapy-sink"):
        assert json.loads(lab.ip(f"-j addr show dev {name}"))[0]["addr_info"] == []
    assert not select.select([connection.tap()], [], [], 0)[0]
    wire = lab.capture("p0")
    wire.send(BACK)
    assert until_frame(connection.tap(), BACK) == []


async def test_interfaces_are_apart(lab: Lab) -> None:
    """What one may send, the other may not, and what comes at one does not reach the other."""
    lab.veth("eth1", "p1", "10.2.0.2/24", mac=OTHER)
    connection = await lab.connect()
    wires = lab.capture("p0"), lab.capture("p1")
    first, second = ipv4(OWN_IP, GATEWAY), ipv4("10.2.0.2", "10.2.0.1", sender=OTHER)
    send(connection.tap("eth0"), second, first)
    send(connection.tap("eth1"), first, second)
    assert second not in until_frame(wires[0], first)
    assert first not in until_frame(wires[1], second)
    back = [mac(OWN) + mac(OTHER) + ipv4(OTHER_IP, OWN_IP, body=bytes((number,)) * 40)[12:] for number in range(2)]
    for wire, frame in zip(wires, back, strict=True):
        wire.send(frame)
    assert next(frames_at(connection.tap("eth0"))) == back[0]
    assert next(frames_at(connection.tap("eth1"))) == back[1]
