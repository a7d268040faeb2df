"""Pods in networks that real CNI plugins have made, with real VMs in them.

The host of all of it is a network namespace of this module. Two pods and a namespace without a VM stay on one bridge
for many tests; those that kill, spoof or refuse have pods of their own.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import station
from cni import Capture, Namespace, Network, Station, addresses_of, firewall, ip, look, own_host, set_offloads
from forgery import advertisement, claims, ethernet, forgeries, ipv4
from harness import DEADLINE, SLOWNESS, Edit, Katapy, MakeBundle, make_bundle

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
    # Or the bridge's own address would be that of one of its ports, and change with them.
    ip(f"link add {BRIDGE} address 02:00:5e:00:00:01 type bridge")
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
        namespace.ip("link set lo up")
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
def host_station() -> Iterator[Station]:
    with Station.here("host") as found:
        yield found


@pytest.fixture(scope="module")
def places(directory: Path, network: Network, busybox: Path, host_station: Station) -> Iterator[dict[str, Place]]:
    """Two pods with VMs, "a" and "b", a namespace without one, and the host."""
    (directory / "resolv.conf").write_text(NAME_SERVER)
    (directory / "hosts").write_text(HOSTS)

    def as_engines_do(spec: dict[str, Any]) -> None:
        for name in ("resolv.conf", "hosts"):
            bound(spec, directory / name, f"/etc/{name}")
        spec["linux"]["sysctl"] = SYSCTLS

    def ports(number: int) -> list[dict[str, Any]]:
        mapping = {"hostPort": number, "containerPort": station.PORT}
        return [{**mapping, "protocol": protocol} for protocol in ("tcp", "udp")]

    found: dict[str, Place] = {}
    with ExitStack() as stack:
        for name, mappings in (("a", ports(8080)), ("b", []), ("namespace", ports(8081))):
            path = directory / f"{name}.netns"
            namespace = stack.enter_context(attached(network, path, portMappings=mappings))
            if name == "namespace":
                running = stack.enter_context(Station.here(name, namespace))
            else:
                running = stack.enter_context(pod(directory, busybox, name, namespace, edit=as_engines_do))
            found[name] = place(network, namespace, running)
        found["host"] = Place(host_station, GATEWAYS)
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


def await_alike(one: Station, namespace: Namespace, *interfaces: str) -> None:
    """Wait until a pod sees what its namespace has come to have."""
    deadline = time.monotonic() + DEADLINE
    while True:
        try:
            assert_alike(one, namespace, *interfaces)
        except AssertionError:
            if time.monotonic() > deadline:
                raise
        else:
            return


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
        if not elsewhere.attempt("tcp", GATEWAYS[0], "without a VM", 8081, patience=10)[0]:
            pytest.skip("on this kernel no port of the host leads to a namespace, also where there is no VM")
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
def test_much_data_arrives_as_it_was(places: dict[str, Place], mtu: int) -> None:
    """With what cards do for the kernel, and without; and the largest packet passes, and no larger one."""
    with mtu_of(places, mtu):
        for offloads in (True, False):
            with offloads_of(places, offloads):
                for one, family, mib in (("host", 4, 20 if mtu == 1500 else 8), ("namespace", 6, 4), ("b", 4, 4)):
                    size = int(mib * MIB / SLOWNESS)
                    for order in ("put", "get"):
                        intact, took = places[one].station(order, places["a"].address(family), size)
                        print(f"{order} from {one}, offloads {offloads}: {size / MIB / took:.0f} MiB/s")
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


def test_names_are_those_of_the_engines_files(places: dict[str, Place], directory: Path) -> None:
    """An engine gives resolv.conf and hosts as mounts; who is asked is a server on the bridge."""
    (directory / "www").mkdir()
    (directory / "www/page").write_text("served by name\n")
    pod_a, outside = places["a"].station, places["host"].station
    outside("name_server", GATEWAYS[0], NAMES)
    answer = pod_a.sh("nslookup web.test").partition("web.test")[2]
    assert all(address in answer for address in GATEWAYS), answer
    status, refused = pod_a("sh", "nslookup nobody.test")
    assert status != 0, refused
    with subprocess.Popen(["busybox", "httpd", "-f", "-p", "8000", "-h", directory / "www"]) as server:
        try:
            until(pod_a, f"nc -w 5 {GATEWAYS[0]} 8000 </dev/null")
            for name in ("web.test", "four.test", "from-hosts", f"[{GATEWAYS[1]}]"):
                assert pod_a.sh(f"wget -q -O - http://{name}:8000/page") == "served by name\n"
        finally:
            server.kill()


def test_sysctls_of_the_network_are_the_vms(places: dict[str, Place]) -> None:
    for name, value in SYSCTLS.items():
        assert places["a"].station.sh(f"cat /proc/sys/{name.replace('.', '/')}") == f"{value}\n"
    # And of nobody else.
    namespace = places["a"].namespace
    assert namespace is not None
    assert namespace("cat", "/proc/sys/net/core/somaxconn") != "1234\n"


@dataclass
class Several:
    """A pod with three networks: "eth0" of ptp, "net1" of macvlan, "net2" of a bridge with limits."""

    station: Station
    namespace: Namespace
    host: Station
    sibling: Station
    addresses: dict[str, list[str]]


LIMIT = 16_000_000  # bits a second, of the plugin
OWN_LIMIT = 32_000_000  # of the annotations
NEIGHBOUR = ("10.92.0.77", "02:00:5e:10:00:77")
SIX_NEIGHBOUR = ("fd92::77", "02:00:5e:10:00:78")


@pytest.fixture(scope="module")
def several(directory: Path, busybox: Path, host_station: Station) -> Iterator[Several]:
    ip("link add parent0 type veth peer name parent1")
    for each in ("parent0", "parent1"):
        ip(f"link set {each} up")
    macvlan = {"type": "macvlan", "master": "parent0", "mode": "bridge", "mtu": 1400}
    macvlan["ipam"] = host_local(directory, "10.91.0.0/24", "fd91::/64") | {"routes": []}
    shaped = {"ingressRate": LIMIT, "ingressBurst": LIMIT // 20, "egressRate": LIMIT, "egressBurst": LIMIT // 20}
    extra = [{"dst": "192.0.2.0/24", "gw": "10.92.0.1"}, {"dst": "2001:db8::/32", "gw": "fd92::1"}]
    third = bridge(directory, "bridge2", "10.92.0.0/24", "fd92::/64")
    third["ipam"]["routes"] = extra
    networks = {
        "lo": Network("loopback", [{"type": "loopback"}]),
        "eth0": Network("ptp", [{"type": "ptp", "ipam": host_local(directory, "10.90.0.0/24", "fd90::/64")}]),
        "net1": Network("macvlan", [macvlan]),
        "net2": Network("shaped", [third, {"type": "bandwidth", **shaped}]),
    }

    def limited(spec: dict[str, Any]) -> None:
        spec["annotations"] = {
            "kubernetes.io/ingress-bandwidth": f"{OWN_LIMIT // 1_000_000}M",
            "kubernetes.io/egress-bandwidth": f"{OWN_LIMIT // 1_000_000}M",
        }

    with ExitStack() as stack:
        namespace = stack.enter_context(Namespace.made(directory / "several.netns"))
        for interface, one in networks.items():
            one.add(namespace, interface)
            stack.callback(one.delete, namespace, interface)
        for address, hardware in (NEIGHBOUR, SIX_NEIGHBOUR):
            namespace.ip(f"neigh add {address} lladdr {hardware} nud permanent dev net2")
        other = stack.enter_context(attached(networks["net1"], directory / "sibling.netns"))
        yield Several(
            stack.enter_context(pod(directory, busybox, "several", namespace, edit=limited)),
            namespace,
            host_station,
            stack.enter_context(Station.here("sibling", other)),
            {name: addresses_of(networks[name].results[namespace.path, name]) for name in ("eth0", "net1", "net2")}
            | {"sibling": addresses_of(networks["net1"].results[other.path, "eth0"])},
        )
    ip("link del parent0")


def test_a_pod_in_several_networks(several: Several) -> None:
    """Of ptp, macvlan and a bridge, with routes, neighbours and an MTU of their own; and loopback."""
    one = several.station
    assert_alike(one, several.namespace, "eth0", "net1", "net2")
    assert one.sh("cat /sys/class/net/net1/mtu") == "1400\n"
    assert "inet 127.0.0.1/8" in one.sh("ip -o addr show dev lo")
    assert one("tcp", "127.0.0.1", "myself") == one("tcp", "::1", "myself") == "flesym"
    for family, destination in (("-4", "192.0.2.0/24"), ("-6", "2001:db8::/32")):
        assert destination in one.sh(f"ip {family} route")
    for address, hardware in (NEIGHBOUR, SIX_NEIGHBOUR):
        (line,) = [line for line in one.sh("ip neigh").splitlines() if line.split()[0] == address]
        assert (hardware in line, "PERMANENT" in line) == (True, True)
    gateways = {
        "eth0": ("10.90.0.1", "fd90::1"),
        "net1": several.addresses["sibling"],
        "net2": ("10.92.0.1", "fd92::1"),
    }
    for interface, others in gateways.items():
        peer = several.sibling if interface == "net1" else several.host
        for own, other in zip(several.addresses[interface], others, strict=True):
            for protocol in ("tcp", "udp"):
                assert one(protocol, other, f"{protocol} by {interface}") == f"{protocol} by {interface}"[::-1]
                assert peer(protocol, own, f"{protocol} to {interface}") == f"{protocol} to {interface}"[::-1]


@pytest.mark.parametrize(("interface", "limit"), [("net2", LIMIT), ("eth0", OWN_LIMIT)])
def test_a_limit_holds_and_is_one(several: Several, interface: str, limit: int) -> None:
    """The bandwidth plugin's on the host where there is one; katapy's own for the annotations elsewhere."""
    size = limit // 8  # a second
    gateway = {"net2": "10.92.0.1", "eth0": "10.90.0.1"}[interface]
    for order in ("put", "get"):
        # No transfer is faster, and not all are much slower: one may fall into a stall of the machine.
        rates: list[float] = []
        while len(rates) < 5 and max(rates, default=0.0) <= limit / 4:
            intact, took = several.station(order, gateway, size)
            rates.append(size * 8 / took)
            print(f"{order} over {interface}: {rates[-1] / 1e6:.1f} Mbit/s of {limit / 1e6:.0f}")
            assert intact
            assert rates[-1] < limit * 1.3
        assert max(rates) > limit / 4
    shaped = [each["dev"] for each in json.loads(several.namespace("tc", "-json", "qdisc")) if each["kind"] == "tbf"]
    assert (interface in shaped) is (interface != "net2")
    # A tap for each interface that is limited here.
    assert len([name for name in shaped if name.startswith("katapy")]) == len(shaped) / 2


def _change_and_change_back(several: Several) -> None:
    """Have another address and another route for a while."""
    one, namespace = several.station, several.namespace
    interfaces = ("eth0", "net1", "net2", "net3")
    namespace.ip("addr add 10.93.0.200/24 dev net3")
    namespace.ip("route add 198.51.100.0/24 via 10.93.0.1")
    await_alike(one, namespace, *interfaces)
    assert several.host("tcp", "10.93.0.200", "another") == "rehtona"
    namespace.ip("route del 198.51.100.0/24")
    namespace.ip("addr del 10.93.0.200/24 dev net3")
    await_alike(one, namespace, *interfaces)


def test_networks_that_come_and_go(several: Several, directory: Path) -> None:
    """While a connection over another interface goes on."""
    one, namespace = several.station, several.namespace
    late = Network("late", [bridge(directory, "bridge3", "10.93.0.0/24", "fd93::/64")])
    late.plugins[0]["ipam"]["routes"] = []
    own = several.addresses["eth0"][0]
    data = os.urandom(MIB)
    for again in (False, True):
        with socket.create_connection((own, station.PORT), timeout=DEADLINE) as connection:
            connection.sendall(f"put {2 * MIB}\n".encode() + data)
            result = late.add(namespace, "net3")
            try:
                four, six = addresses_of(result)
                await_alike(one, namespace, "eth0", "net1", "net2", "net3")
                for gateway, address in (("10.93.0.1", four), ("fd93::1", six)):
                    assert one("tcp", gateway, "late") == several.host("tcp", address, "late") == "etal"
                if not again:
                    _change_and_change_back(several)
            finally:
                late.delete(namespace, "net3")
            await_alike(one, namespace, "eth0", "net1", "net2")
            assert len([name for name in namespace.links() if name.startswith("katapy")]) == 4  # a sink and three taps
            connection.sendall(data)
            assert connection.makefile("rb").read() == hashlib.sha256(2 * data).hexdigest().encode()
    ip("link del bridge3")


def settings(path: Path, *lines: str) -> tuple[str, str]:
    """Return the options of a command line that has these settings beside those of all tests."""
    named = os.environ.get("KATAPY_CONFIG")
    path.write_text("\n".join([Path(named).read_text() if named else "", *lines]))
    path.chmod(0o600)
    return "--config", str(path)


TRIES = (
    f"for each in 10.88.0.1 10.94.0.1 fd88::1; do ping -c 1 -W 1 $each; echo x | nc -u -w 1 $each {station.PORT}; done"
)


@contextmanager
def nothing_moves(namespace: Namespace, *links: str) -> Iterator[None]:
    """Assert that meanwhile a namespace has these interfaces and no packet passes any."""
    before = namespace.counters()
    assert sorted(before) == sorted(links)
    yield
    assert namespace.counters() == before


def assert_no_network(one: Station) -> None:
    """Assert that a pod has loopback and nothing else, and let it try to reach others."""
    assert one.sh("ls /sys/class/net") == "lo\n"
    assert NETWORK_CARD not in one.sh(CARDS)
    assert "100% packet loss" not in one.sh(f"{TRIES} 2>&1; true")  # it cannot even send
    assert one("tcp", "127.0.0.1", "myself") == "flesym"


FOREIGN = "02:00:5e:00:00:66"
CARDS = "cat /sys/bus/pci/devices/*/class"
NETWORK_CARD = "0x0200"


def test_a_namespace_of_its_own_is_no_network(places: dict[str, Place], directory: Path, busybox: Path) -> None:
    assert NETWORK_CARD in places["a"].station.sh(CARDS)
    with pod(directory, busybox, "fresh", None) as one:
        pid = Katapy(directory / "fresh.run").state("fresh")["pid"]
        namespace = Namespace(Path(f"/proc/{pid}/ns/net"))
        assert os.stat(namespace.path).st_ino != os.stat("/proc/self/ns/net").st_ino
        with nothing_moves(namespace, "lo"):
            assert_no_network(one)


def test_an_empty_namespace_is_no_network(directory: Path, busybox: Path) -> None:
    with Namespace.made(directory / "empty.netns") as namespace:
        before = namespace.look()
        with pod(directory, busybox, "empty", namespace) as one, nothing_moves(namespace, "lo"):
            assert_no_network(one)
        assert namespace.look() == before


def test_a_network_that_the_configuration_forbids(directory: Path, busybox: Path) -> None:
    """What the namespace has stays unused."""
    options = settings(directory / "none.toml", "[network]", 'model = "none"')
    with Namespace.made(directory / "none.netns") as namespace:
        namespace("sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/default/disable_ipv6")
        ip(f"link add outer type veth peer name eth0 netns {os.getpid()}")
        ip(f"link set eth0 netns {namespace.path}")
        Path("/proc/sys/net/ipv6/conf/outer/disable_ipv6").write_text("1")
        ip("addr add 10.94.0.1/24 dev outer")
        ip("link set outer up")
        namespace.ip("addr add 10.94.0.2/24 dev eth0")
        namespace.ip("link set eth0 up")
        before = namespace.look()
        with pod(directory, busybox, "none", namespace, options=options) as one, nothing_moves(namespace, "lo", "eth0"):
            assert_no_network(one)
            assert namespace.look() == before


def neighbours(one: Station, addresses: Sequence[str]) -> dict[str, str]:
    """Return where somebody thinks that addresses are."""
    found = {}
    for line in one.sh("ip neigh").splitlines():
        parts = line.split()
        if parts[0] in addresses and "lladdr" in parts:
            found[parts[0]] = parts[parts.index("lladdr") + 1]
    return found


@dataclass
class Mallory:
    """A pod that is root of its network, its hardware address, and all that comes out of it."""

    place: Place
    mac: str
    capture: Capture

    def send(self, frames: Mapping[str, bytes]) -> list[str]:
        """Send frames, and then something honest; return which of them have come out."""
        honest = ethernet(self.mac, 0x0800, ipv4(self.place.addresses[0], GATEWAYS[0], b"[honest]"), bridge_address())
        self.capture.frames.clear()
        self.place.station("raw", "eth0", [frame.hex() for frame in (*frames.values(), honest)])
        seen = self.capture.until(b"[honest]")
        return [name for name in frames if any(f"[{name}]".encode() in frame for frame in seen)]


@contextmanager
def mallory_with(directory: Path, busybox: Path, network: Network, name: str, *lines: str) -> Iterator[Mallory]:
    options = settings(directory / f"{name}.toml", *lines)
    with (
        attached(network, directory / f"{name}.netns") as namespace,
        pod(directory, busybox, name, namespace, "CAP_NET_ADMIN", options=options) as found,
    ):
        one = place(network, namespace, found)
        with Capture(one.link) as capture:
            yield Mallory(one, network.results[namespace.path, "eth0"]["interfaces"][2]["mac"], capture)


@pytest.fixture(scope="module")
def mallory(directory: Path, busybox: Path, network: Network, metadata: None) -> Iterator[Mallory]:
    with mallory_with(directory, busybox, network, "mallory") as found:
        yield found


@pytest.fixture(scope="module")
def metadata(places: dict[str, Place]) -> None:
    """Have the service that clouds have."""
    ip(f"addr add 169.254.169.254/32 dev {BRIDGE}")


def bridge_address() -> str:
    return str(json.loads(ip(f"-json link show dev {BRIDGE}"))[0]["address"])


def test_a_guest_cannot_pass_for_another(places: dict[str, Place], mallory: Mallory) -> None:
    """Root in it, with every right on its network: nothing that it forges gets out, and nobody is misled."""
    one, mac, victim = mallory.place, mallory.mac, places["a"]
    four, six = victim.addresses
    everybody = [each.addresses[family] for each in places.values() for family in (0, 1)]
    witnesses = [places["b"].station, places["host"].station, places["namespace"].station]
    for address in everybody:
        for each in (*witnesses, one.station):
            each("udp", address, "here")
    known = [neighbours(each, everybody) for each in witnesses]
    assert all(each[address] != mac for each in known for address in victim.addresses)
    assert mallory.send(forgeries((mac, *one.addresses), victim.addresses, GATEWAYS, bridge_address())) == []

    # And by the guest's own kernel.
    one.station.sh(f"""set -e
        ip link set dev eth0 address {FOREIGN}; ping -c 1 -W 1 {GATEWAYS[0]} || :
        ip link set dev eth0 address {mac}
        ip addr add {four}/24 dev eth0; ip addr add {six}/64 dev eth0
        arping -U -c 1 -w 2 -I eth0 {four} || :; arping -A -c 1 -w 2 -I eth0 {four} || :
        ping -c 1 -W 1 -I {four} {GATEWAYS[0]} || :; ping -6 -c 1 -W 1 -I {six} {GATEWAYS[1]} || :
        ip addr del {four}/24 dev eth0; ip addr del {six}/64 dev eth0
    """)
    mallory.send({})
    assert [each for each in map(claims, mallory.capture.frames) if each & {FOREIGN, four, six}] == []
    for each, before in zip(witnesses, known, strict=True):
        assert neighbours(each, everybody) == before
    # It is a neighbour like every other all the same.
    assert one.station("tcp", four, "honest") == one.station("tcp", six, "honest") == "tsenoh"


def test_a_guest_advertises_nothing_in_anothers_name(places: dict[str, Place], mallory: Mallory) -> None:
    """Also not its own address."""
    claim = advertisement(places["a"].addresses[1], mallory.place.addresses[1], mallory.mac)
    assert mallory.send({"advertisement": ethernet(mallory.mac, 0x86DD, claim) + b"[advertisement]"}) == []


def test_a_guest_reaches_no_metadata_unless_that_is_allowed(
    mallory: Mallory, network: Network, directory: Path, busybox: Path
) -> None:
    assert mallory.place.station.attempt("tcp", "169.254.169.254", "metadata", patience=3)[0] is False
    with (
        attached(network, directory / "asking.netns") as namespace,
        pod(
            directory,
            busybox,
            "asking",
            namespace,
            options=settings(directory / "asking.toml", "[network]", "metadata = true"),
        ) as one,
    ):
        assert one("tcp", "169.254.169.254", "metadata") == "atadatem"


def test_a_guest_may_forge_where_that_is_allowed(
    directory: Path, busybox: Path, network: Network, metadata: None
) -> None:
    """So it is the check that keeps the same frames of the same guest from getting out."""
    with mallory_with(directory, busybox, network, "router", "[network]", "spoofing = true") as router:
        # In nobody's name, for nobody must be misled.
        own = (router.mac, *router.place.addresses)
        frames = forgeries(own, ("10.88.0.250", "fd88::250"), GATEWAYS, bridge_address())
        assert router.send(frames) == list(frames)


def part_of(katapy: Katapy, name: str, part: str) -> int:
    """Return the pid of one of a pod's processes."""
    state = json.loads((katapy.root / name / "state.json").read_text())
    return next(int(each["pid"]) for each in (state["shim"], *state["helpers"]) if part in each["name"].lower())


def tapped(namespace: Namespace) -> bool:
    """Tell whether a VM is connected to a namespace."""
    return any(name.startswith("katapy") for name in namespace.links())


@pytest.mark.parametrize("part", ["", "qemu", "virtiofsd", "shim"])
def test_a_namespace_is_left_as_it_was(
    katapy: Katapy, bundle: MakeBundle, tmp_path: Path, network: Network, part: str
) -> None:
    """Whatever ends the pod."""
    with attached(network, tmp_path / f"left-{part}.netns") as namespace:
        before, outside, rules = namespace.look(), look(), firewall()
        katapy.detach("run", "--detach", "--bundle", bundle(["sleep", "1000"], edit=joined(namespace)), "c1")
        assert tapped(namespace)
        if part:
            pidfd = os.pidfd_open(katapy.state("c1")["pid"])
            os.kill(part_of(katapy, "c1", part), signal.SIGKILL)
            assert select.select([pidfd], [], [], DEADLINE)[0]
            os.close(pidfd)
        katapy("delete", "--force", "c1", check=True)
        assert namespace.look() == before
        assert (look(), firewall()) == (outside, rules)


def live_and_die(katapy: Katapy, bundle: MakeBundle, tmp_path: Path, network: Network, count: int) -> None:
    """Make and delete so many pods with networks of their own; nothing of them may be left."""
    outside, mounts = look(), Path("/proc/self/mountinfo").read_text()
    given = sorted(path.name for path in (tmp_path.parent).rglob(f"addresses/{network.name}/10.*"))
    for number in range(count):
        with attached(network, tmp_path / f"pod{number}.netns") as namespace:
            before = namespace.look()
            gateway = network.results[namespace.path, "eth0"]["ips"][0]["gateway"]
            argv = ["ping", "-c", "1", "-W", "30", gateway]
            katapy("run", "--bundle", bundle(argv, edit=joined(namespace)), f"c{number}", check=True)
            assert namespace.look() == before
    assert (look(), Path("/proc/self/mountinfo").read_text()) == (outside, mounts)
    assert sorted(path.name for path in (tmp_path.parent).rglob(f"addresses/{network.name}/10.*")) == given


@pytest.mark.usefixtures("places")  # or the bridge would have a carrier now and then
def test_nothing_piles_up(katapy: Katapy, bundle: MakeBundle, tmp_path: Path, network: Network) -> None:
    live_and_die(katapy, bundle, tmp_path, network, 3)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("places")
def test_nothing_piles_up_of_fifty(katapy: Katapy, bundle: MakeBundle, tmp_path: Path, network: Network) -> None:
    live_and_die(katapy, bundle, tmp_path, network, 50)


def refused(katapy: Katapy, bundle: Path, *words: str) -> None:
    """Assert that a bundle is refused with one line that has these words in it."""
    done = katapy("run", "--bundle", bundle, "c1")
    assert (done.returncode, done.stdout) == (1, b""), done
    lines = done.stderr.decode().splitlines()
    assert len([line for line in lines if line.startswith("katapy: ")]) == len(lines) == 1, lines
    assert [word for word in words if word not in lines[0]] == [], lines
    assert katapy("list", "-q").stdout == b""


@pytest.mark.parametrize("text", ["fast", "-1M", "10"])
def test_a_bandwidth_that_is_none_is_refused(
    katapy: Katapy, bundle: MakeBundle, tmp_path: Path, network: Network, text: str
) -> None:
    with attached(network, tmp_path / "bandwidth.netns") as namespace:

        def edit(spec: dict[str, Any]) -> None:
            joined(namespace)(spec)
            spec["annotations"] = {"kubernetes.io/egress-bandwidth": text}

        before = namespace.look()
        refused(katapy, bundle(["true"], edit=edit), "kubernetes.io/egress-bandwidth", repr(text))
        assert namespace.look() == before


def test_an_interface_that_no_vm_can_have_is_refused(
    katapy: Katapy, bundle: MakeBundle, tmp_path: Path, network: Network
) -> None:
    """And the others of its namespace are left alone."""
    with attached(network, tmp_path / "unsupported.netns") as namespace:
        namespace.ip("link add inner0 type bridge")
        before = namespace.look()
        refused(katapy, bundle(["true"], edit=joined(namespace)), "inner0", "bridge")
        assert namespace.look() == before


@pytest.mark.parametrize("path", ["/proc/self/ns/net", "bind"])
@pytest.mark.usefixtures("places")
def test_the_hosts_own_network_is_refused(katapy: Katapy, bundle: MakeBundle, tmp_path: Path, path: str) -> None:
    before = look()
    if path == "bind":
        path = str(tmp_path / "host.netns")
        Path(path).touch()
        subprocess.run(["mount", "--bind", "/proc/self/ns/net", path], check=True)
    try:
        refused(katapy, bundle(["true"], edit=joined(path)), "the host's own network")
    finally:
        if not path.startswith("/proc"):
            subprocess.run(["umount", path], check=True)
    assert look() == before


@pytest.mark.parametrize("kind", ["missing", "file", "directory", "other"])
def test_what_is_no_network_namespace_is_refused(katapy: Katapy, bundle: MakeBundle, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "place"
    if kind == "file":
        path.touch()
    elif kind == "directory":
        path.mkdir()
    elif kind == "other":
        path = Path("/proc/self/ns/ipc")
    refused(katapy, bundle(["true"], edit=joined(path)), str(path))


def test_containers_of_a_pod_have_one_network(
    katapy: Katapy, bundle: MakeBundle, tmp_path: Path, network: Network
) -> None:
    def member(kind: str) -> Edit:
        def edit(spec: dict[str, Any]) -> None:
            joined(namespace)(spec)
            spec["annotations"] = {
                "io.kubernetes.cri.container-type": kind,
                "io.kubernetes.cri.sandbox-id": "s1",
            }

        return edit

    def seen(name: str, script: str) -> str:
        return katapy("exec", name, "sh", "-c", script, check=True).stdout.decode()

    with attached(network, tmp_path / "pod.netns") as namespace:
        before = namespace.look()
        serving = ["httpd", "-f", "-p", "80", "-h", "/etc"]
        katapy.detach("run", "--detach", "--bundle", bundle(serving, edit=member("sandbox")), "s1")
        katapy.detach("run", "--detach", "--bundle", bundle(["sleep", "1000"], edit=member("container")), "m1")
        address = addresses_of(network.results[namespace.path, "eth0"])[0]
        told = "readlink /proc/self/ns/net; ip addr; ip route"
        assert address in seen("m1", told)
        assert seen("m1", told) == seen("s1", told)
        fetched = " && ".join(f"wget -q -O - http://{each}/group" for each in ("127.0.0.1", "[::1]", address))
        assert seen("m1", fetched).count("root:") == 3
        assert urllib.request.urlopen(f"http://{address}/group", timeout=DEADLINE).read().startswith(b"root:")
        for name in ("m1", "s1"):
            assert tapped(namespace)
            katapy("delete", "--force", name, check=True)
        assert namespace.look() == before
