"""The process that connects a network namespace, looks again, or cleans up after a supervisor that was killed.

It lives for one request: it enters the namespace, for which the supervisor would need a thread of its own, and it
imports pyroute2, whose memory no pod shall hold for its whole life. Started by ``pod``; everything that it makes goes
by itself with the descriptors that it hands over, but for what is in the answer's ``undo``.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from katapy import linux
from katapy.errors import AlreadyExists, InvalidArgument, KatapyError, Unavailable, Unsupported, codes_of
from katapy.interfaces import Address, Interface, Network
from katapy.network import loopback, macvtap, netlink, rules, tap
from katapy.network.netlink import IFF_ALLMULTI, IFF_NOARP, IFF_UP, Link, Netlink, Qdisc

MESSAGE_MAX: Final = 200_000  # what a socket's buffer holds on every host
INTERFACES_MAX: Final = 8
ROUTES_MAX: Final = 512

# What a kernel hands over to a tap is to be told from the filters of others, also after we were killed.
_PRIORITY: Final = 0xCA7A
_RATE_HANDLE: Final = 0xCA7A_0000
_OUR_RATE: Final = Qdisc("tbf", _RATE_HANDLE, netlink.ROOT)
# That there was none is remembered with the filter, for whoever cleans up.
_NO_QUEUE: Final = 0xCA7A_0001
_SINK: Final = "katapy-sink"
_PREFIX: Final = "katapy"
_SUPPORTED: Final = frozenset(("veth", "macvlan", "ipvlan", "vlan", "dummy", "tun"))
# Every new namespace has these where the kernel has their drivers.
_OWN: Final = frozenset(
    ("tunl0", "sit0", "gre0", "gretap0", "erspan0", "ip_vti0", "ip6_vti0", "ip6tnl0", "ip6gre0", "bonding_masters")
)
_ETHERNET: Final = 1
# The filters at a tap: while new ones are made, the old ones count, so there are two sets of priorities.
_GENERATIONS: Final = (0, 16)
_MTU_MAX: Final = 65521  # of a tap; it counts for what the kernel itself would send through it
_BURST_SECONDS: Final = 0.05
_BURST_MAX: Final = 1 << 30
_BURST_MIN: Final = 1 << 16
_QUEUE_SECONDS: Final = 0.1
_SETTLE_ATTEMPTS: Final = 16


class Helper:
    """One request about the namespace that this process is in."""

    def __init__(self, request: Mapping[str, Any], outside: Netlink) -> None:
        self._settings: Mapping[str, Any] = request["settings"]
        state = request["state"]
        self._first = not state
        self._known: dict[int, dict[str, Any]] = {int(index): each for index, each in state.get("known", {}).items()}
        self._sink: int = state.get("sink", 0)
        self._next: int = state.get("next_device", 0)
        self._outside = outside
        self._netlink = Netlink()
        self._stack = ExitStack()
        self._undo: dict[int, list[bytes]] = {}
        self.fds: list[int] = []

    def undo(self) -> None:
        """Undo what was done, but for what the known interfaces may send."""
        for requests in self._undo.values():
            for each in requests:
                self._netlink.delete(each)
        self._stack.close()

    def connect(self) -> dict[str, Any]:
        """Bring the taps in line with the interfaces, and return what there is; new descriptors are in ``fds``.

        Raises KatapyError, OSError.
        """
        watching = None
        if self._first:
            watching = self._netlink.watch()
            self._stack.callback(watching.close)
            datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._stack.callback(datagrams.close)
            self.fds = [watching.fileno(), self._netlink.fileno(), datagrams.fileno()]
        had_sink = bool(self._sink)
        added: list[dict[str, Any]] = []
        for _ in range(_SETTLE_ATTEMPTS):
            links = self._served()
            if links and not self._sink:
                self._make_sink()
                self._remove_leftovers()
            interfaces = [self._serve(link, addresses, added) for link, addresses in links]
            if watching is not None:
                _drain(watching)  # among it is our own doing, so look once more
            if self._served() == links:
                break
        names = {link.index: link.name for link, _ in links}
        routes = self._netlink.routes(names) if names else []
        if len(routes) > ROUTES_MAX:
            raise Unsupported(f"cannot give a VM {len(routes)} routes: {ROUTES_MAX} are possible")
        network = Network(tuple(interfaces), tuple(routes), tuple(self._netlink.neighbours(names) if names else ()))
        known = {index: each for index, each in self._known.items() if index in names}
        return {
            **self._lead_loopback(),
            "network": network.to_json(),
            "added": added,
            "undo": {index: [each.hex() for each in requests] for index, requests in self._undo.items()},
            "new_sink": bool(self._sink) and not had_sink,
            "state": {"known": known, "sink": self._sink, "next_device": self._next},
        }

    def _lead_loopback(self) -> dict[str, Any]:
        """Lead connections to the loopback to listeners, where that can be done: a pod can do without.

        Those descriptors are the last ones: of the link, then of the listeners.
        """
        fds, error = list[int](), ""
        if self._first and self._settings["loopback"]:
            try:
                fds = loopback.lead(self._stack)
            except OSError as failure:
                error = loopback.reason(failure)
        self.fds += fds
        return {"loopback": len(fds), "loopback_error": error}

    def _make_sink(self) -> None:
        try:
            (sink,) = tap.open_tap(_SINK, queues=1, stack=self._stack)
        except AlreadyExists as error:
            raise AlreadyExists(
                "the network namespace has the VM of another pod: it can serve one at a time"
            ) from error
        self.fds.append(sink)
        # Nobody reads it: what is in its queue stays there, and everything after that is dropped.
        self._sink = self._up(_SINK, mtu=0, queue=1)

    def _served(self) -> list[tuple[Link, list[Address]]]:
        """Return the interfaces that the VM is to have, in the order of their making, each with its addresses."""
        links, addresses = self._netlink.links(), self._netlink.addresses()
        found = [
            (link, addresses.get(link.index, []))
            for link in sorted(links, key=lambda link: link.index)
            if self._is_served(link)
        ]
        if len(found) > INTERFACES_MAX:
            raise Unsupported(f"cannot give a VM {len(found)} interfaces: {INTERFACES_MAX} are possible")
        return found

    def _is_served(self, link: Link) -> bool:
        if link.name == "lo" or _is_ours(link):
            return False
        if link.name in _OWN and not link.flags & IFF_UP:
            return False
        if link.kind not in _SUPPORTED or (link.kind == "tun" and not link.tap) or link.hardware_type != _ETHERNET:
            what = link.kind or "hardware"
            raise Unsupported(f"cannot connect {link.name} to a VM: a link of type {what} is not supported")
        return True

    def _serve(self, link: Link, addresses: Sequence[Address], added: list[dict[str, Any]]) -> Interface:
        """Make the tap of an interface, or let it know the interface as it is now."""
        known = self._known.get(link.index)
        interface = Interface(
            device=known["device"] if known else _device(self._next),
            name=link.name,
            hardware_address=link.hardware_address,
            mtu=link.mtu,
            up=bool(link.flags & IFF_UP),
            no_arp=bool(link.flags & IFF_NOARP),
            disable_ipv6=_sysctl(link.name, "disable_ipv6") != "0",
            addresses=tuple(addresses),
        )
        if known is None:
            try:
                known = self._add(link, interface, added)
            except OSError as error:
                raise Unavailable(f"cannot connect {link.name} to a VM: {error.strerror}") from error
            self._next += 1
        elif known["interface"] != json.loads(json.dumps(interface)):
            known["generation"] = self._allow(known["tap"], interface, known["target"], known["generation"])
            self._netlink.set_link(known["tap"], mtu=min(link.mtu, _MTU_MAX))
        known["interface"] = json.loads(json.dumps(interface))
        self._known[link.index] = known
        return interface

    def _add(self, link: Link, interface: Interface, added: list[dict[str, Any]]) -> dict[str, Any]:
        settings = self._settings
        # Not the interface's index: one that has left may come back before the VM has let go of its tap.
        name = f"{_PREFIX}{self._next}"
        connect = self._add_macvtap if settings["model"] == "macvtap" else self._add_tap
        queues, record = connect(link, interface, name)
        vhost = tap.open_vhost(settings["queues"], self._stack) if settings["vhost"] else []
        self.fds += queues + vhost
        added.append({"device": interface.device, "queues": len(queues), "vhost": len(vhost)})
        return {"device": interface.device, **record}

    def _add_macvtap(self, link: Link, interface: Interface, name: str) -> tuple[list[int], dict[str, Any]]:
        """Have a macvtap take the interface over; return its queues, and what to know of it."""
        ingress, egress = self._rates(link)
        if ingress:
            raise Unsupported(f"cannot limit what {link.name} receives: the model macvtap has no place for that")
        self._netlink.add_macvtap(name, link.index)
        index = socket.if_nametoindex(name)
        self._undo.setdefault(link.index, []).append(netlink.delete_link(index))
        # Before it is up, so that nothing leaves it unseen.
        self._netlink.add_ingress(index, "clsact")
        generation = self._allow(index, interface, 0)
        self._limit(index, egress)
        # Which groups the guest joins, it is not told. Before it is up: later, the kernel would count that at the
        # interface below, and forget to count it off again.
        self._netlink.set_link(index, flags=IFF_ALLMULTI)
        self._up(name, mtu=0)
        queues = macvtap.open_macvtap(name, queues=self._settings["queues"], stack=self._stack)
        return queues, {"tap": index, "target": 0, "generation": generation}

    def _add_tap(self, link: Link, interface: Interface, name: str) -> tuple[list[int], dict[str, Any]]:
        """Make a tap beside the interface, and let frames go both ways; return its queues, and what to know of it."""
        # A helper that was killed while the pod ran has left half of this.
        self._remove_from(link.index, {each.index for each in self._netlink.links()})
        queues = tap.open_tap(name, queues=self._settings["queues"], stack=self._stack)
        requests = self._undo.setdefault(link.index, [])
        index = self._up(name, mtu=min(link.mtu, _MTU_MAX))
        self._netlink.add_ingress(index)
        generation = self._allow(index, interface, link.index)
        ingress, egress = self._rates(link)
        self._limit(index, ingress)
        if egress:
            self._require_no_queue(link)
        # A kernel gives an interface without a queue one, once it has a queueing discipline.
        note = _NO_QUEUE if link.queue == 0 else 0
        filtered = rules.incoming(_PRIORITY, index)._replace(note=note)
        # The filter first, by which whoever cleans up after us knows all of it.
        kind = self._filtered(link.index)
        requests.append(netlink.delete_filters(link.index, kind or "ingress", _PRIORITY))
        if kind is None:
            self._netlink.add_ingress(link.index, filtered=filtered)
            requests.append(netlink.delete_qdisc(link.index, Qdisc("ingress", 0xFFFF_0000, netlink.INGRESS)))
        else:
            self._netlink.add_filter(link.index, kind, filtered)
        if note:
            requests.append(netlink.empty_queue(link.index))
        if egress:
            self._limit(link.index, egress)
            requests.insert(0, netlink.delete_qdisc(link.index, _OUR_RATE))
        return queues, {"tap": index, "target": link.index, "generation": generation}

    def _rates(self, link: Link) -> tuple[int, int]:
        """Return the limits in bytes a second of what the pod receives and sends by an interface; 0: none.

        What the pod asks for is left to a CNI plugin that has done it; what the host demands is not.
        """
        settings = self._settings
        asked = (0, 0) if self._is_shaped(link) else (settings["asked_ingress"], settings["asked_egress"])
        ingress, egress = (
            min((rate for rate in rates if rate), default=0)
            for rates in zip(asked, (settings["ingress_rate"], settings["egress_rate"]), strict=True)
        )
        return ingress, egress

    def _remove_leftovers(self) -> None:
        """Remove what a supervisor that was killed has left: what takes over an interface, or hands its frames away."""
        links = self._netlink.links()
        for link in links:
            if link.kind == "macvtap" and _is_ours(link):
                self._netlink.delete(netlink.delete_link(link.index))
        for link in links:
            self._remove_from(link.index, {each.index for each in links})

    def _remove_from(self, index: int, present: Collection[int]) -> None:
        """Remove from an interface what hands frames to a tap that is gone."""
        kind = self._filtered(index)
        if kind is not None:
            filters = self._netlink.redirects(index, kind)
            ours = [(target, note) for priority, target, note in filters if priority == _PRIORITY]
            stale = [note for target, note in ours if target not in present]
            if stale and len(filters) == len(stale) and kind == "ingress":
                self._netlink.delete(netlink.delete_qdisc(index, Qdisc(kind, 0xFFFF_0000, netlink.INGRESS)))
            elif stale:
                self._netlink.delete(netlink.delete_filters(index, kind, _PRIORITY))
            if ours and not stale:
                return
            if _NO_QUEUE in stale:
                self._netlink.delete(netlink.empty_queue(index))
        if any(each.handle == _RATE_HANDLE for each in self._netlink.qdiscs(index)):
            self._netlink.delete(netlink.delete_qdisc(index, _OUR_RATE))

    def _filtered(self, index: int) -> str | None:
        """Return the kind of qdisc that an interface's filters on what comes in are at, if it has one."""
        kinds = [each.kind for each in self._netlink.qdiscs(index) if each.kind in ("ingress", "clsact")]
        return kinds[0] if kinds else None

    def _up(self, name: str, *, mtu: int, queue: int | None = None) -> int:
        # Or the host's own stack would talk to the guest.
        _set_sysctl(name, "disable_ipv6", "1")
        index = socket.if_nametoindex(name)
        self._netlink.set_link(index, mtu=mtu, queue=queue)
        return index

    def _allow(self, index: int, interface: Interface, target: int, old: int | None = None) -> int:
        """Let pass at a tap what the interface's guest may send, and nothing else; return the filters' generation.

        ``old`` is that of those it has. No frame finds none, or it would reach the namespace's own stack: the
        last filter of a generation, which drops the rest, goes when all of the next are there.
        """
        new = _GENERATIONS[0] if old != _GENERATIONS[0] else _GENERATIONS[1]
        if old is not None:
            self._forget(index, target, new)  # where somebody was killed meanwhile
        settings = self._settings
        for each in rules.outgoing(
            interface, target=target, sink=self._sink, checked=settings["checked"], metadata=settings["metadata"]
        ):
            self._netlink.add_filter(index, _place(target), each._replace(priority=new + each.priority))
        if old is not None:
            self._forget(index, target, old)
        return new

    def _forget(self, index: int, target: int, generation: int) -> None:
        for priority in range(1, rules.PRIORITIES + 1):
            self._netlink.delete(netlink.delete_filters(index, _place(target), generation + priority))

    def _limit(self, index: int, rate: int) -> None:
        if rate:
            burst = min(max(int(rate * _BURST_SECONDS), _BURST_MIN), _BURST_MAX)
            limit = burst + int(rate * _QUEUE_SECONDS)
            self._netlink.add_rate(index, _RATE_HANDLE, rate=rate, burst=burst, limit=limit)

    def _require_no_queue(self, link: Link) -> None:
        for each in self._netlink.qdiscs(link.index):
            if each.parent == netlink.ROOT and each.handle:
                raise Unsupported(f"cannot limit the rate of {link.name}: it has a queueing discipline, {each.kind}")

    def _is_shaped(self, link: Link) -> bool:
        """Whether a CNI plugin limits the interface already, at its end on the host."""
        if link.kind != "veth" or not link.peer_elsewhere:
            return False
        try:
            # That its other end is in our own namespace is a guess; in another one, the index is somebody else's.
            ends = [each for each in self._outside.links() if each.index == link.peer and each.peer == link.index]
            return bool(ends) and any(each.kind == "tbf" for each in self._outside.qdiscs(link.peer))
        except OSError:
            return False

    def clean(self) -> dict[str, Any]:
        """Remove what a supervisor that was killed has left."""
        # A VM that lives and has an interface has its sink.
        if not any(link.name == _SINK for link in self._netlink.links()):
            self._remove_leftovers()
        return {}


def _is_ours(link: Link) -> bool:
    if link.kind not in ("tun", "macvtap"):
        return False
    return link.name == _SINK or (link.name.startswith(_PREFIX) and link.name[len(_PREFIX) :].isdecimal())


def _place(target: int) -> str:
    """Where the filters are for what a guest sends: a tap receives it, and a macvtap, which has no target, sends it."""
    return "ingress" if target else "egress"


def _device(number: int) -> str:
    """Return the permanent hardware address of the VM's NIC with this number: locally administered, "kat"."""
    return f"02:6b:61:74:{number >> 8 & 0xFF:02x}:{number & 0xFF:02x}"


def _sysctl(interface: str, name: str) -> str:
    try:
        return Path(f"/proc/sys/net/ipv6/conf/{interface}/{name}").read_text().strip()
    except OSError:
        return "1"  # a kernel without IPv6


def _set_sysctl(interface: str, name: str, value: str) -> None:
    path = Path(f"/proc/sys/net/ipv6/conf/{interface}/{name}")
    if path.parent.exists():
        path.write_text(value)


def _drain(watching: socket.socket | None) -> None:
    if watching is not None:
        try:
            while watching.recv(1 << 16):
                pass
        except BlockingIOError:
            pass
        except OSError:  # more has happened than fits
            _drain(watching)


def _answer(control: socket.socket, request: Mapping[str, Any], namespace: int) -> None:
    outside = Netlink()
    try:
        linux.setns(namespace, linux.CLONE_NEWNET)
    except OSError as error:
        raise InvalidArgument(f"cannot enter the pod's network namespace: {error.strerror}") from error
    helper = Helper(request, outside)
    try:
        answer = helper.clean() if request["clean"] else helper.connect()
        encoded = json.dumps(answer).encode()
        if len(encoded) > MESSAGE_MAX:
            raise Unsupported("cannot give a VM that many addresses and routes")
        socket.send_fds(control, [encoded], helper.fds)
    except BaseException:
        helper.undo()
        raise


def main() -> int:
    """Answer one request on the socket that is the argument."""
    control = socket.socket(fileno=int(sys.argv[1]))
    data, fds, _flags, _address = socket.recv_fds(control, MESSAGE_MAX, 1)
    if not data:
        return 0
    try:
        try:
            _answer(control, json.loads(data), fds[0])
        except OSError as error:
            raise Unavailable(f"cannot set up the pod's network: {error.strerror or error}") from error
    except KatapyError as error:
        said = {"error": str(error), "kind": type(error).__name__, "code": codes_of(error).rpc}
        control.send(json.dumps(said).encode())
    os._exit(0)
