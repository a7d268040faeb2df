"""Pods in networks that real CNI plugins have made, with real VMs in them.

The host of all of it is a network namespace of this module. Two pods and a namespace without a VM stay on one bridge
for many tests; those that kill, spoof or refuse have pods of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import station
from cni import Namespace, Network, Station, addresses_of, ip, own_host, set_offloads
from harness import Edit, Katapy, make_bundle

BRIDGE = "bridge0"
GATEWAYS = ("10.88.0.1", "fd88::1")
NAMES = {"web.test": list(GATEWAYS), "four.test": [GATEWAYS[0]]}
NAME_SERVER = f"nameserver {GATEWAYS[0]}\noptions timeout:20 attempts:3\n"
HOSTS = "127.0.0.1 localhost\n10.88.0.1 from-hosts\n"
SYSCTLS = {
    "net.ipv4.ip_forward": "1",
    "net.core.somaxconn": "1234",
    "net.ipv4.conf.eth0.log_martians": "1",
    "net.ipv6.conf.eth0.hop_limit": "77",
}
MIB = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def _host_of_its_own() -> Iterator[None]:
    with own_host():
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the module's namespaces, bundles and addresses are."""
    return tmp_path_factory.mktemp("network")


def host_local(directory: Path, *subnets: str) -> dict[str, Any]:
    """Return the IPAM part of a plugin's configuration, with default routes."""
    return {
        "type": "host-local",
        "dataDir": str(directory / "addresses"),
        "ranges": [[{"subnet": subnet}] for subnet in subnets],
        "routes": [{"dst": "::/0" if ":" in subnet else "0.0.0.0/0"} for subnet in subnets],
    }


def bridge(directory: Path, name: str, *subnets: str, **more: Any) -> dict[str, Any]:
    """Return a bridge plugin's configuration."""
    return {"type": "bridge", "bridge": name, "isGateway": True, "ipam": host_local(directory, *subnets), **more}


@pytest.fixture(scope="module")
def network(directory: Path) -> Network:
    """The network of most pods here."""
    portmap = {"type": "portmap", "snat": True, "capabilities": {"portMappings": True}}
    return Network("pods", [bridge(directory, BRIDGE, "10.88.0.0/24", "fd88::/64"), portmap])


@dataclass
class Place:
    """Something that talks: a pod, a namespace or the host. ``addresses`` are its own of IPv4 and IPv6."""

    station: Station
    addresses: tuple[str, str]
    namespace: Namespace | None = None
    link: str = ""

    def address(self, family: int) -> str:
        return self.addresses[family == 6]


def joined(namespace: Namespace | str | Path | None, *capabilities: str) -> Edit:
    """Have a bundle join a network namespace, with more capabilities."""

    def edit(spec: dict[str, Any]) -> None:
        namespaces = [each for each in spec["linux"]["namespaces"] if each["type"] != "network"]
        if namespace is not None:
            path = namespace.path if isinstance(namespace, Namespace) else namespace
            namespaces.append({"type": "network", "path": str(path)})
        else:
            namespaces.append({"type": "network"})
        spec["linux"]["namespaces"] = namespaces
        for names in spec["process"]["capabilities"].values():
            names += ["CAP_NET_RAW", *capabilities]

    return edit


def bound(spec: dict[str, Any], source: str | Path, destination: str | Path) -> None:
    """Have a bundle see a file or directory of the host's, read-only."""
    options = ["rbind", "ro"]
    spec["mounts"].append({"destination": str(destination), "type": "bind", "source": str(source), "options": options})


@contextmanager
def pod(
    directory: Path,
    rootfs: Path,
    name: str,
    namespace: Namespace | None,
    *capabilities: str,
    edit: Edit = lambda _: None,
    options: tuple[str, ...] = (),
) -> Iterator[Station]:
    """Run a station in a VM that is connected to a namespace, with the host's Python."""

    def with_python(spec: dict[str, Any]) -> None:
        joined(namespace, *capabilities)(spec)
        for each in ("/usr", "/lib", "/lib64"):
            bound(spec, each, each)
        bound(spec, station.__file__, "/station.py")
        edit(spec)

    args = ["/usr/bin/python3", "-I", "-S", "-B", "/station.py"]
    bundle = make_bundle(directory / name, rootfs, args, edit=with_python)
    with Station.in_vm(Katapy(directory / f"{name}.run", options=options), bundle, name) as found:
        yield found


@contextmanager
def attached(network: Network, path: Path, interface: str = "eth0", **capabilities: Any) -> Iterator[Namespace]:
    """Make a namespace that is in a network."""
    with Namespace.made(path) as namespace:
        network.add(namespace, interface, **capabilities)
        try:
            yield namespace
        finally:
            network.delete(namespace, interface, **capabilities)


def place(network: Network, namespace: Namespace, found: Station) -> Place:
    """Return the place of a station in a namespace that is in a network of two families."""
    result = network.results[namespace.path, "eth0"]
    four, six = addresses_of(result)
    return Place(found, (four, six), namespace, result["interfaces"][1]["name"])


@pytest.fixture(scope="module")
def places(directory: Path, network: Network, busybox: Path) -> Iterator[dict[str, Place]]:
    """Two pods with VMs, "a" and "b", a namespace without one, and the host."""
    (directory / "resolv.conf").write_text(NAME_SERVER)
    (directory / "hosts").write_text(HOSTS)

    def as_engines_do(spec: dict[str, Any]) -> None:
        for name in ("resolv.conf", "hosts"):
            bound(spec, directory / name, f"/etc/{name}")
        spec["linux"]["sysctl"] = SYSCTLS

    ports = [{"hostPort": 8080, "containerPort": station.PORT, "protocol": protocol} for protocol in ("tcp", "udp")]
    found: dict[str, Place] = {}
    with ExitStack() as stack:
        for name, mappings in (("a", ports), ("b", []), ("namespace", [])):
            path = directory / f"{name}.netns"
            namespace = stack.enter_context(attached(network, path, portMappings=mappings))
            if name == "namespace":
                running = stack.enter_context(Station.here(name, namespace))
            else:
                running = stack.enter_context(pod(directory, busybox, name, namespace, edit=as_engines_do))
            found[name] = place(network, namespace, running)
        found["host"] = Place(stack.enter_context(Station.here("host")), GATEWAYS)
        yield found


def facts(lines: str, *words: str) -> list[str]:
    """Return what the host's ip and busybox's say alike of addresses or routes: what follows certain words."""
    found = []
    for line in lines.splitlines():
        parts = line.split()
        found.append(" ".join(f"{word} {parts[parts.index(word) + 1]}" for word in words if word in parts))
    return sorted(found)


def addresses_seen(lines: str) -> list[str]:
    return facts("\n".join(line for line in lines.splitlines() if " inet" in line), "inet", "inet6", "brd", "scope")


def routes_seen(lines: str) -> list[str]:
    # busybox also tells of the kernel's own, for multicast.
    return facts(
        "\n".join(f"to {line}" for line in lines.splitlines() if not line.startswith("multicast")),
        *("to", "via", "dev", "src", "metric"),
    )


def assert_alike(one: Station, namespace: Namespace, *interfaces: str) -> None:
    """Assert that a pod sees of a namespace's interfaces what the namespace has."""
    assert sorted(one.sh("ls /sys/class/net").split()) == sorted(["lo", *interfaces])
    for name in interfaces:
        (link,) = json.loads(namespace.ip(f"-json link show dev {name}"))
        assert one.sh(f"cat /sys/class/net/{name}/address /sys/class/net/{name}/mtu").split() == [
            link["address"],
            str(link["mtu"]),
        ]
        addresses = one.sh(f"ip -o addr show dev {name}")
        assert addresses_seen(addresses) == addresses_seen(namespace.ip(f"-oneline addr show dev {name}"))
    for family in ("-4", "-6"):
        # What the host has of its own are the taps.
        routes = "\n".join(line for line in namespace.ip(f"{family} route").splitlines() if "katapy" not in line)
        assert routes_seen(one.sh(f"ip {family} route")) == routes_seen(routes)


def test_a_pod_has_the_interface_of_its_namespace(places: dict[str, Place]) -> None:
    for name in ("a", "b"):
        namespace = places[name].namespace
        assert namespace is not None
        assert_alike(places[name].station, namespace, "eth0")
    addresses = places["a"].station.sh("ip -o addr show dev eth0")
    for address in (f"{places['a'].addresses[0]}/24", f"{places['a'].addresses[1]}/64"):
        assert address in addresses
    for family, gateway in zip(("-4", "-6"), GATEWAYS, strict=True):
        assert f"default via {gateway} dev eth0" in places["a"].station.sh(f"ip {family} route")


PAIRS = [
    (one, other)
    for one in ("a", "b", "host", "namespace")
    for other in ("a", "b", "host", "namespace")
    if one != other and not {one, other} <= {"host", "namespace"}
]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("protocol", ["icmp", "tcp", "udp"])
def test_everybody_talks_to_everybody(places: dict[str, Place], protocol: str, family: int) -> None:
    for one, other in PAIRS:
        asking, address = places[one].station, places[other].address(family)
        text = f"{protocol} from {one} to {other}"
        if protocol == "icmp":
            assert ", 0% packet loss" in asking.sh(f"ping -{family} -c 2 -W 30 -i 0.1 {address}")
        else:
            assert asking(protocol, address, text) == text[::-1]


def test_a_port_of_the_host_is_the_pods(
    places: dict[str, Place], directory: Path, request: pytest.FixtureRequest
) -> None:
    """For who is elsewhere, for the host itself and for another pod."""
    outside = Network("outside", [{"type": "ptp", "ipam": host_local(directory, "10.89.0.0/24")}])
    with (
        attached(outside, directory / "outside.netns") as namespace,
        Station.here("outside", namespace) as elsewhere,
    ):
        for one in (elsewhere, places["host"].station, places["b"].station):
            assert one("tcp", GATEWAYS[0], f"to the port, {one.name}", 8080) == f"to the port, {one.name}"[::-1]
        assert elsewhere("udp", GATEWAYS[0], "datagram", 8080) == "margatad"
        assert places["host"].station("tcp", "127.0.0.1", "loopback", 8080) == "kcabpool"


@contextmanager
def mtu_of(places: dict[str, Place], mtu: int) -> Iterator[None]:
    """Have another MTU at all ends of the bridge; the pods follow."""
    try:
        _set_mtu(places, mtu)
        yield
    finally:
        _set_mtu(places, 1500)


def _set_mtu(places: dict[str, Place], mtu: int) -> None:
    ends = [(each.namespace, each.link) for each in places.values() if each.namespace is not None]
    for namespace, link in ends:
        ip(f"link set dev {link} mtu {mtu}")
        namespace.ip(f"link set dev eth0 mtu {mtu}")
    ip(f"link set dev {BRIDGE} mtu {mtu}")
    for name in ("a", "b"):
        until(places[name].station, f"[ $(cat /sys/class/net/eth0/mtu) = {mtu} ]")


def until(one: Station, condition: str) -> None:
    """Wait in a pod until a condition of the shell holds there."""
    waiting = f"until {condition}; do sleep 0.05; done"
    status, output = one("sh", f"timeout 90 sh -c '{waiting}'")
    assert status == 0, f"{one.name}: never: {condition}: {output}"


@contextmanager
def offloads_of(places: dict[str, Place], on: bool) -> Iterator[None]:
    """Have the kernel do all that a network card might at both ends of every pod, or have none of it done."""
    try:
        _set_offloads(places, on)
        yield
    finally:
        _set_offloads(places, True)


def _set_offloads(places: dict[str, Place], on: bool) -> None:
    for each in places.values():
        if each.namespace is not None:
            set_offloads(each.link, on)
            with each.namespace.entered():
                set_offloads("eth0", on)


@pytest.mark.parametrize("mtu", [1280, 1500, 9000])
@pytest.mark.parametrize("offloads", [True, False], ids=["offloads", "none"])
def test_much_data_arrives_as_it_was(places: dict[str, Place], mtu: int, offloads: bool) -> None:
    """Between two pods and with the host, both ways; and the largest packet passes, and no larger one."""
    with mtu_of(places, mtu), offloads_of(places, offloads):
        for one, family, size in (("host", 4, 20), ("namespace", 6, 4), ("b", 4, 4)):
            for order in ("put", "get"):
                intact, took = places[one].station(order, places["a"].address(family), size * MIB)
                print(f"{order} from {one}: {size / took:.0f} MiB/s")
                assert intact
        for family, header in ((4, 28), (6, 48)):
            for one, other in (("a", "host"), ("host", "a"), ("a", "b")):
                address = places[other].address(family)
                assert places[one].station("whole", address, mtu - header) == "intact"
                assert places[one].station("whole", address, mtu - header + 1) == "too big"
            fill = f"ping -{family} -c 2 -i 0.1 -W 30 -s {mtu - header} {places['b'].address(family)}"
            assert ", 0% packet loss" in places["a"].station.sh(fill)


def test_a_thousand_short_connections(places: dict[str, Place]) -> None:
    assert places["host"].station("many", places["a"].addresses[0], 500) == []
    assert places["host"].station("many", places["a"].addresses[1], 500) == []
