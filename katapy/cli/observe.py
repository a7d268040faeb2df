"""The verbs that ask what a container does: ps, events."""

from __future__ import annotations

import json
import re
from typing import Final

import click

from katapy.cli import Settings, require_root
from katapy.errors import InvalidArgument, InvalidState

_UNITS: Final = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_DURATION: Final = re.compile(r"\+?((\d+\.?\d*|\.\d+)(h|ms|us|µs|ns|m|s))+", re.ASCII)
_LONGEST: Final = 365 * 86400.0


@click.command("ps", context_settings={"allow_interspersed_args": False})
@click.option("--format", "-f", "style", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.argument("container_id", metavar="ID")
@click.argument("ps_options", metavar="[PS OPTIONS...]", nargs=-1)
@click.pass_obj
def ps(settings: Settings, style: str, container_id: str, ps_options: tuple[str, ...]) -> None:  # noqa: ARG001
    """List the processes of a container.

    \b
    Examples:
      katapy ps web
      katapy ps --format json web     pids on the host
    """
    from katapy.client.observe import ShimClient
    from katapy.client.pod import Pod

    require_root("list processes")
    with Pod.connect(settings.root, container_id) as pod:
        if style == "json":
            click.echo(json.dumps([process.pid for process in pod.task.pids(container_id)], separators=(",", ":")))
            return
        rows = [("UID", "PID", "EXEC", "CMD")]
        for process in ShimClient(pod.client).processes(container_id):
            # The container's choice, on somebody's terminal.
            command = "".join(char if char.isprintable() else "?" for char in process.command)
            rows.append((str(process.uid), str(process.pid), process.exec_id or "-", command))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join([*map(str.ljust, row[:-1], widths), row[-1]]))


@click.command("events")
@click.option("--interval", default="5s", show_default=True, help="Time between two reports, as 5s or 1m30s.")
@click.option("--stats", is_flag=True, help="Print one report and return.")
@click.argument("container_id", metavar="ID")
@click.pass_obj
def events(settings: Settings, interval: str, stats: bool, container_id: str) -> None:
    """Print what a container uses, and each time that its memory runs out, a line of JSON each, until it ends.

    \b
    Examples:
      katapy events --stats web
      katapy events --interval 1s web
    """
    seconds = parse_duration(interval)
    from katapy.client.observe import ShimClient, follow, stats_event
    from katapy.client.pod import Pod

    require_root("observe a container")
    with Pod.connect(settings.root, container_id) as pod:
        if ShimClient(pod.client).next_event(container_id, wait=0).ended:
            raise InvalidState(f"container with id {container_id} is not running")
        reports = [stats_event(pod.task, container_id)] if stats else follow(pod.client, container_id, seconds)
        for report in reports:
            click.echo(json.dumps(report, separators=(",", ":")))


def parse_duration(text: str) -> float:
    """Return the seconds of one of Go's durations, which is more than none: ``5s``, ``1m30s``, ``1.5h``."""
    seconds = 0.0
    if _DURATION.fullmatch(text):
        seconds = sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"([\d.]+)([a-zµ]+)", text))
    if not 0 < seconds <= _LONGEST:
        raise InvalidArgument(f"{text[:40]!a} is not a duration above zero: write it as 5s or 1m30s")
    return seconds
