"""Networks: how fast a pod's is, what it costs, and what it adds to a start.

The host, a bare VM, a pod of katapy's and a container of runc's are on one bridge. The bare VM's tap is a port of it,
and its NIC is plugged in as katapy's are; the others have a namespace with a veth. All three run the same servers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import lan
from containers import Bundles, started
from context import Bench
from figures import BenchError, Recorder
from start import parse_phases

_BARE: Final = "bare VM"
_KATAPY: Final = "katapy"
_RUNC: Final = "runc"
_GIGABIT: Final = 10**9 // 8  # bytes
_IPERF_PORT: Final = 5201
_ECHO_PORT: Final = 5202
_SERVE: Final = f"iperf3 --server >/dev/null 2>&1 & exec nc -ll -p {_ECHO_PORT} -e cat"
_HOSTS: Final = {_BARE: 2, _KATAPY: 3, _RUNC: 4}
_ALONE: Final = 5
_DIRECTIONS: Final[dict[str, tuple[str, ...]]] = {"to": (), "from": ("--reverse",)}
_DEADLINE: Final = 60.0
_SECONDS: Final = 3  # of each transfer
_UNMEASURED: Final = 20  # round trips, until everything has been used once
_EMPTY: Final = "run true, katapy warm, no interface"
_ONE: Final = "run true, katapy warm, one interface"
_PHASES: Final = ("connect the network", "plug in a NIC", "make the VM the pod's own")


class Transfer(NamedTuple):
    """What iperf3 has moved."""

    bytes: int
    seconds: float


def parse_transfer(text: str) -> Transfer:
    """Return what ``iperf3 --json`` says that arrived. Raises BenchError with its own words where it has failed."""
    try:
        document: dict[str, Any] = json.loads(text)
        if "error" in document:
            raise BenchError(f"iperf3: {document['error']}")
        received = document["end"]["sum_received"]
        transfer = Transfer(int(received["bytes"]), float(received["seconds"]))
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError(f"cannot read what iperf3 says: {error!r}") from error
    if transfer.bytes <= 0 or transfer.seconds <= 0:
        raise BenchError("iperf3 has moved nothing")
    return transfer


def parse_busy(stat: str) -> int:
    """Return the clock ticks in which the machine's CPUs did anything: /proc/stat, proc(5)."""
    user, nice, system, _idle, _iowait, irq, softirq = map(int, stat.split(maxsplit=8)[1:8])
    return user + nice + system + irq + softirq


def parse_ldd(text: str) -> list[Path]:
    """Return the libraries that ldd(1) names, the loader among them."""
    return [Path(path) for path in re.findall(r"(/\S+) \(0x", text)]


def measure(bench: Bench) -> Recorder:
    """Measure the group."""
    recorder = Recorder("network")
    program = shutil.which("iperf3")
    if program is None:
        recorder.note("not measured: apt-get install iperf3")
        return recorder
    with lan.bridge():
        _measure_starts(recorder, bench)
        with _servers(bench, Path(program)) as addresses:
            for _ in range(bench.plan.runs):
                _measure_traffic(recorder, bench, addresses)
    return recorder


def _measure_starts(recorder: Recorder, bench: Bench) -> None:
    """Measure starts with an interface beside starts without."""
    file = bench.directory / "network.json"
    with lan.new_namespace() as empty, lan.new_namespace() as one:
        lan.join(one, _ALONE)
        bundles = {name: bench.bundles.make("true", network=path) for name, path in ((_EMPTY, empty), (_ONE, one))}
        bench.warm.run(bundles[_ONE])
        for _ in range(bench.plan.runs):
            for name, bundle in bundles.items():
                recorder.add(name, bench.warm.run(bundle, "--timing-json", file), beside=_EMPTY)
                for phase in parse_phases(file.read_text())[0]:
                    if phase.name in _PHASES:
                        took = phase.end - phase.start
                        recorder.add(f"{name}: {phase.name}", took, beside=f"{_EMPTY}: {phase.name}")


@contextmanager
def _servers(bench: Bench, program: Path) -> Iterator[Mapping[str, str]]:
    """Give the addresses of all that serve, by what they are."""
    directory = bench.directory / "network"
    bundles = Bundles(directory)
    for path in (program, *parse_ldd(subprocess.check_output(["ldd", program], text=True))):
        (bundles.rootfs / path.relative_to("/")).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, bundles.rootfs / path.relative_to("/"))
    with ExitStack() as stack:
        own = f"{lan.address(_HOSTS[_BARE])}/24"
        stack.enter_context(bench.bare.serving(bundles.rootfs, own, _SERVE, tap="bare"))
        lan.plug_in("bare")
        for name, runtime in bench.peers:
            namespace = stack.enter_context(lan.new_namespace())
            lan.join(namespace, _HOSTS[name])
            stack.enter_context(runtime.detached(bundles.make("sh", "-c", _SERVE, network=namespace)))
        addresses = {name: lan.address(_HOSTS[name]) for name in (_BARE, *(name for name, _ in bench.peers))}
        for name, address in addresses.items():
            for port in (_IPERF_PORT, _ECHO_PORT):
                _await_server(name, address, port)
        yield addresses


def _await_server(name: str, address: str, port: int) -> None:
    """Wait until a server can be reached; there is no event that says so. Raises BenchError where it cannot."""
    deadline = time.monotonic() + _DEADLINE
    while True:
        try:
            socket.create_connection((address, port), timeout=_DEADLINE).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise BenchError(f"{name} cannot be reached at {address}, port {port}: {error}") from error
            time.sleep(0.1)
        else:
            return


def _measure_traffic(recorder: Recorder, bench: Bench, addresses: Mapping[str, str]) -> None:
    """Measure everything once, in turns."""

    def add(what: str, name: str, value: float, moved: int = 0) -> None:
        beside = None if name == _BARE else f"{what}, {_BARE}"
        recorder.add(f"{what}, {name}", value, beside=beside, moved=moved)
        if name == _KATAPY and _RUNC in addresses:
            recorder.add(f"{what}, {name}: to runc", value, beside=f"{what}, {_RUNC}", moved=moved)

    idle = _idle_load()
    for direction, options in _DIRECTIONS.items():
        for name, address in addresses.items():
            transfer, busy = _transfer(address, options, idle)
            gigabits = transfer.bytes / _GIGABIT
            add(f"TCP {direction} the pod", name, transfer.seconds / gigabits, moved=_GIGABIT)
            add(f"CPU per gigabit {direction} the pod", name, busy / gigabits)
    for name, address in addresses.items():
        times = _round_trips(address, bench.plan.round_trips)
        add("round trip", name, statistics.median(times))
        add("round trip p99", name, statistics.quantiles(times, n=100, method="inclusive")[-1])


def _transfer(address: str, options: tuple[str, ...], idle: float) -> tuple[Transfer, float]:
    """Move bytes for a while; return what was moved, and the seconds of CPU that took.

    These are the whole machine's, without ``idle`` of them a second, which it takes anyway.
    """
    argv = ["iperf3", "--json", "--client", address, "--time", str(_SECONDS), *options]
    busy, began = _busy(), time.monotonic()
    with started(argv, pipes=True) as process:
        assert process.stdout is not None
        transfer = parse_transfer(process.stdout.read().decode(errors="replace"))
    return transfer, _busy() - busy - idle * (time.monotonic() - began)


def _idle_load() -> float:
    """Return how many CPUs are busy while nothing is measured."""
    busy, began = _busy(), time.monotonic()
    time.sleep(_SECONDS)
    return (_busy() - busy) / (time.monotonic() - began)


def _busy() -> float:
    return parse_busy(Path("/proc/stat").read_text()) / os.sysconf("SC_CLK_TCK")


def _round_trips(address: str, count: int) -> list[float]:
    """Return the seconds until each of so many bytes is back."""
    times = []
    try:
        with socket.create_connection((address, _ECHO_PORT), timeout=_DEADLINE) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for _ in range(_UNMEASURED + count):
                began = time.perf_counter()
                connection.sendall(b"\n")
                if not connection.recv(1):
                    raise BenchError(f"{address} has hung up")
                times.append(time.perf_counter() - began)
    except OSError as error:
        raise BenchError(f"{address} does not answer: {error}") from error
    return times[_UNMEASURED:]
