"""The verb ``update``: other limits for a container."""

from __future__ import annotations

import json
import re
import sys
from typing import Any, Final

import click

from katapy.cli import Settings, require_root
from katapy.errors import InvalidArgument, Unsupported

# docker's go-units, which is runc's: powers of 1024.
_SIZE: Final = re.compile(r"(\d{1,19}(?:\.\d{1,9})?) ?([kmgtp]?)(?:i?b)?", re.ASCII | re.IGNORECASE)
_DOCUMENT_MAX: Final = 1 << 20
_NUMBERS: Final = {
    "blkio_weight": ("blockIO", "weight"),
    "cpu_period": ("cpu", "period"),
    "cpu_quota": ("cpu", "quota"),
    "cpu_share": ("cpu", "shares"),
    "cpu_rt_period": ("cpu", "realtimePeriod"),
    "cpu_rt_runtime": ("cpu", "realtimeRuntime"),
    "cpuset_cpus": ("cpu", "cpus"),
    "cpuset_mems": ("cpu", "mems"),
    "pids_limit": ("pids", "limit"),
}
_SIZES: Final = {
    "kernel_memory": ("memory", "kernel"),
    "kernel_memory_tcp": ("memory", "kernelTCP"),
    "memory": ("memory", "limit"),
    "memory_reservation": ("memory", "reservation"),
    "memory_swap": ("memory", "swap"),
}


@click.command("update")
@click.option("--resources", "-r", metavar="FILE|-", help="JSON as linux.resources; other options are ignored then.")
@click.option("--blkio-weight", type=int, help="Weight of block I/O, 10 to 1000.")
@click.option("--cpu-period", type=int, help="Period of the quota in microseconds.")
@click.option("--cpu-quota", type=int, help="CPU time in each period in microseconds; -1: no limit.")
@click.option("--cpu-share", type=int, help="CPU shares, among the guest's containers.")
@click.option("--cpu-rt-period", type=int, help="Refused: cgroup v2 has no such limit.")
@click.option("--cpu-rt-runtime", type=int, help="Refused: cgroup v2 has no such limit.")
@click.option("--cpuset-cpus", help="CPUs of the VM, as 0-3,8.")
@click.option("--cpuset-mems", help="Memory nodes of the VM.")
@click.option("--kernel-memory", help="Refused: cgroup v2 has no such limit.")
@click.option("--kernel-memory-tcp", help="Refused: cgroup v2 has no such limit.")
@click.option("--memory", help="Memory in bytes, or as 512m; -1: no limit.")
@click.option("--memory-reservation", help="Memory that is kept for it, in bytes.")
@click.option("--memory-swap", help="Memory and swap together in bytes; -1: no limit.")
@click.option("--pids-limit", type=int, help="Number of tasks; -1: no limit.")
@click.option("--l3-cache-schema", help="Refused: a guest has no resctrl.")
@click.option("--mem-bw-schema", help="Refused: a guest has no resctrl.")
@click.argument("container_id", metavar="ID")
@click.pass_obj
def update(settings: Settings, /, resources: str | None, container_id: str, **limits: Any) -> None:
    """Change limits of a container: all that are given, or on failure none.

    \b
    Examples:
      katapy update --memory 256m --pids-limit 100 web
      echo '{"cpu": {"quota": 50000}}' | katapy update --resources - web
    """
    document = json.dumps(from_flags(limits)).encode() if resources is None else _read(resources)
    from katapy.client.pod import Pod

    require_root("update a container")
    with Pod.connect(settings.root, container_id) as pod:
        pod.task.update(container_id, document)


def from_flags(flags: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what the options say as linux.resources. Raises InvalidArgument and Unsupported."""
    for name in ("l3_cache_schema", "mem_bw_schema"):
        if flags.get(name):
            raise Unsupported(f"--{name.replace('_', '-')} is not supported: a guest has no resctrl")
    document: dict[str, dict[str, Any]] = {}
    for name, (group, member) in (_NUMBERS | _SIZES).items():
        if (value := flags.get(name)) not in (None, ""):
            number = parse_size(value, f"--{name.replace('_', '-')}") if name in _SIZES else value
            document.setdefault(group, {})[member] = number
    return document


def parse_size(text: str, what: str) -> int:
    """Return the bytes of ``text``: a number, one with a unit (512m, 1.5GiB), or -1. Raises InvalidArgument."""
    if text == "-1":
        return -1
    found = _SIZE.fullmatch(text)
    if found is None:
        raise InvalidArgument(f"{what}: {text[:40]!a} is not a number of bytes")
    number, unit = found.groups()
    factor = 1 << 10 * " kmgtp".index(unit.lower() or " ")
    return int(number) * factor if number.isdigit() else int(float(number) * factor)


def _read(name: str) -> bytes:
    if name != "-":
        from katapy.jsonfile import read

        return read(name)
    data = sys.stdin.buffer.read(_DOCUMENT_MAX + 1)
    if len(data) > _DOCUMENT_MAX:
        raise InvalidArgument(f"standard input has more than {_DOCUMENT_MAX} bytes")
    return data
