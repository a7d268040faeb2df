"""How a pod is connected, and its network in the words of JSON and of agent.proto."""

from __future__ import annotations

import json
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katapy import config
from katapy.agent.network import interface_message, neighbour_message, route_message
from katapy.config import Config
from katapy.errors import InvalidArgument
from katapy.interfaces import Address, Interface, Neighbour, Network, NextHop, Route
from katapy.network.pod import QUEUES_MAX
from katapy.sandbox.network import settings

INGRESS, EGRESS = "kubernetes.io/ingress-bandwidth", "kubernetes.io/egress-bandwidth"


def limited(ingress: int = 0, egress: int = 0) -> Config:
    return Config(network=config.Network(ingress_rate=ingress, egress_rate=egress))


def test_by_default_frames_are_checked_and_nothing_is_limited() -> None:
    found = settings(Config(), {}, vcpus=1)
    assert found.checked
    assert (found.metadata, found.ingress_rate, found.asked_egress, found.queues) == (False, 0, 0, 1)


def test_what_the_configuration_says_holds() -> None:
    network = config.Network(spoofing=True, metadata=True, vhost=False)
    found = settings(Config(network=network), {}, vcpus=4)
    assert (found.checked, found.metadata, found.vhost, found.queues) == (False, True, False, 4)
    assert settings(Config(), {}, vcpus=1000).queues == QUEUES_MAX


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("10M", 10_000_000),
        ("512k", 512_000),
        ("1Gi", 1 << 30),
        ("1Ki", 1024),
        ("1000", 1000),
        ("1k", 1000),
        ("1P", 10**15),
        ("1.5M", 1_500_000),
        ("0.5Gi", 1 << 29),
        ("1e6", 1_000_000),
        ("2E6", 2_000_000),
        ("1e+3", 1000),
        ("+10M", 10_000_000),
        (".5M", 500_000),
        ("1.M", 1_000_000),
        ("1000000m", 1000),
        ("0.001E", 10**15),
        ("0.0005Ei", (1 << 60) // 2000),
        ("1000000000000000", 10**15),
        ("10.999999999k", 10_999),
    ],
)
def test_a_bandwidth_is_a_quantity_of_kubernetes_in_bits(text: str, bits: int) -> None:
    found = settings(Config(), {INGRESS: text, EGRESS: "16k"}, vcpus=1)
    assert (found.asked_ingress, found.asked_egress) == (bits // 8, 2000)


@pytest.mark.parametrize(
    "text",
    ["0", "-1", "-1M", "999", "0.9k", "", "M", "10 M", "10MB", "10m", "ten", "1_000_000", "1,5M", "1.5.5M", "1e",
     "1e6M", "1k\n", "\u0661\u0660M", "inf", "nan", "0x1000", ".", "1e999999999", "9" * 16, "9" * 5000, "9999P",
     "1.1P", "16E", "1Ei", "e3", "+", "++1M", "1e-9", "1mi", "1ki"],
)  # fmt: skip
@pytest.mark.parametrize("key", [INGRESS, EGRESS])
def test_what_is_no_bandwidth_is_refused_by_its_annotation(text: str, key: str) -> None:
    with pytest.raises(InvalidArgument, match=key) as refused:
        settings(Config(), {key: text}, vcpus=1)
    assert len(str(refused.value)) < 250


def test_what_the_host_demands_and_what_the_pod_asks_for() -> None:
    """They are kept apart: a plugin may have done what the pod asks for, and that frees it of nothing else."""
    found = settings(limited(ingress=8000, egress=16000), {INGRESS: "16k"}, vcpus=1)
    assert (found.ingress_rate, found.egress_rate) == (1000, 2000)
    assert (found.asked_ingress, found.asked_egress) == (2000, 0)


TEXT = st.text(max_size=15)
IPS = st.one_of(st.just(""), st.ip_addresses().map(str))
MACS = st.binary(min_size=6, max_size=6).map(lambda raw: raw.hex(":"))
NUMBERS = st.integers(0, 0xFFFF_FFFF)
ADDRESSES = st.builds(
    Address, st.ip_addresses().map(str), st.integers(0, 128), IPS, IPS, st.integers(0, 255), st.booleans()
)
INTERFACES = st.builds(
    Interface, MACS, TEXT, MACS, NUMBERS, st.booleans(), st.booleans(), st.booleans(),
    st.lists(ADDRESSES, max_size=3).map(tuple),
)  # fmt: skip
HOPS = st.builds(NextHop, TEXT, IPS, st.integers(1, 256), st.booleans())
ROUTES = st.builds(
    Route, st.sampled_from((4, 6)), IPS, st.integers(0, 128), TEXT, IPS, IPS, NUMBERS, st.integers(0, 255), NUMBERS,
    st.integers(0, 11), st.integers(0, 255), st.booleans(), NUMBERS, st.lists(HOPS, max_size=3).map(tuple),
)  # fmt: skip
NEIGHBOURS = st.builds(Neighbour, TEXT, IPS, MACS)
NETWORKS = st.builds(
    Network, *(st.lists(each, max_size=3).map(tuple) for each in (INTERFACES, ROUTES, NEIGHBOURS))
)  # fmt: skip


@given(NETWORKS)
def test_a_network_crosses_as_json(network: Network) -> None:
    assert Network.from_json(json.loads(json.dumps(network.to_json()))) == network


def packed(text: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text) if text else b""


@given(INTERFACES)
def test_an_interface_in_the_agents_words(interface: Interface) -> None:
    message = interface_message(interface)
    assert message.device.hex(":") == interface.device
    assert message.hardware_address.hex(":") == interface.hardware_address
    for name in ("name", "mtu", "up", "no_arp", "disable_ipv6"):
        assert getattr(message, name) == getattr(interface, name)
    assert len(message.addresses) == len(interface.addresses)
    for said, address in zip(message.addresses, interface.addresses, strict=True):
        for name in ("address", "peer", "broadcast"):
            assert getattr(said, name) == packed(getattr(address, name))
        for name in ("prefix_length", "scope", "no_prefix_route"):
            assert getattr(said, name) == getattr(address, name)


@given(ROUTES)
def test_a_route_in_the_agents_words(route: Route) -> None:
    message = route_message(route)
    addresses = {"destination", "gateway", "preferred_source"}
    for name in Route._fields:
        if name in addresses:
            assert getattr(message, name) == packed(getattr(route, name))
        elif name != "next_hops":
            assert getattr(message, name) == getattr(route, name)
    said = [(hop.interface, hop.gateway, hop.weight, hop.on_link) for hop in message.next_hops]
    assert said == [(hop.interface, packed(hop.gateway), hop.weight, hop.on_link) for hop in route.next_hops]


@given(NEIGHBOURS)
def test_a_neighbour_in_the_agents_words(neighbour: Neighbour) -> None:
    message = neighbour_message(neighbour)
    assert message.interface == neighbour.interface
    assert message.address == packed(neighbour.address)
    assert message.hardware_address.hex(":") == neighbour.hardware_address
