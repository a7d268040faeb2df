"""A pod's network in the words of agent.proto: addresses are bytes there."""

from __future__ import annotations

import socket

from katapy.interfaces import Address, Interface, Neighbour, NextHop, Route
from katapy.proto import agent_pb2


def interface_message(interface: Interface) -> agent_pb2.Interface:
    """Return the message for an interface."""
    return agent_pb2.Interface(
        device=_hardware(interface.device),
        name=interface.name,
        hardware_address=_hardware(interface.hardware_address),
        mtu=interface.mtu,
        up=interface.up,
        no_arp=interface.no_arp,
        disable_ipv6=interface.disable_ipv6,
        addresses=[_address_message(each) for each in interface.addresses],
    )


def route_message(route: Route) -> agent_pb2.Route:
    """Return the message for a route."""
    return agent_pb2.Route(
        family=route.family,
        destination=_ip(route.destination),
        prefix_length=route.prefix_length,
        interface=route.interface,
        gateway=_ip(route.gateway),
        preferred_source=_ip(route.preferred_source),
        metric=route.metric,
        scope=route.scope,
        table=route.table,
        type=route.type,
        protocol=route.protocol,
        on_link=route.on_link,
        mtu=route.mtu,
        next_hops=[_next_hop_message(each) for each in route.next_hops],
    )


def neighbour_message(neighbour: Neighbour) -> agent_pb2.Neighbor:
    """Return the message for a neighbour."""
    return agent_pb2.Neighbor(
        interface=neighbour.interface,
        address=_ip(neighbour.address),
        hardware_address=_hardware(neighbour.hardware_address),
    )


def _address_message(address: Address) -> agent_pb2.InterfaceAddress:
    return agent_pb2.InterfaceAddress(
        address=_ip(address.address),
        prefix_length=address.prefix_length,
        peer=_ip(address.peer),
        broadcast=_ip(address.broadcast),
        scope=address.scope,
        no_prefix_route=address.no_prefix_route,
    )


def _next_hop_message(hop: NextHop) -> agent_pb2.NextHop:
    return agent_pb2.NextHop(interface=hop.interface, gateway=_ip(hop.gateway), weight=hop.weight, on_link=hop.on_link)


def _ip(text: str) -> bytes:
    if not text:
        return b""
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


def _hardware(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))
