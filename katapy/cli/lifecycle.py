"""The verbs of a container's life: run, create, start, kill, delete."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from katapy.cli import Settings, require_root
from katapy.errors import InvalidArgument, Unsupported

if TYPE_CHECKING:
    from katapy.client.pod import Pod

_BUNDLE = click.option(
    "--bundle", "-b", type=click.Path(), default=".", show_default=True, help="Directory of the bundle."
)
_PID_FILE = click.option(
    "--pid-file", type=click.Path(path_type=Path), help="Write the pid of the container's host process here."
)


@contextmanager
def _created(settings: Settings, container_id: str, bundle_path: str, *, foreground: bool) -> Iterator[Pod]:
    """Check everything that came from outside, then create; afterwards ``foreground`` or a failure removes again."""
    from katapy.cli.progress import Progress
    from katapy.client.pod import Launch, Pod
    from katapy.oci.bundle import load_bundle
    from katapy.state import check_id

    require_root(f"create {container_id!r}" if len(container_id) < 77 else "create a container")
    check_id(container_id)
    bundle = load_bundle(bundle_path)
    _check_terminal(bundle.spec.process.terminal, foreground=foreground)
    settings.check_config()
    launch = Launch(settings.root, settings.config_path, settings.debug, foreground)
    with Progress(f"booting the VM of {container_id}"):
        pod = Pod.create(launch, container_id, bundle)
    with pod:
        try:
            if pod.state().accelerator == "tcg":
                from katapy.cli import emulation

                emulation.warn()
            yield pod
        except BaseException:
            pod.discard()
            raise
        if foreground:
            pod.discard()


def _check_terminal(terminal: bool, *, foreground: bool) -> None:
    if terminal and not foreground:
        raise Unsupported("process.terminal: a detached container cannot have a terminal without a console socket")
    if terminal and not os.isatty(0):
        raise InvalidArgument("process.terminal: standard input is not a terminal; set it to false")


@click.command("run")
@_BUNDLE
@_PID_FILE
@click.option("--detach", "-d", is_flag=True, help="Leave it running and return.")
@click.argument("container_id", metavar="ID")
@click.pass_obj
def run(settings: Settings, bundle: str, pid_file: Path | None, detach: bool, container_id: str) -> int:
    """Run a bundle in a VM of its own.

    In the foreground the container's streams and exit status are the command's own, signals reach the container, and
    it is removed when it has ended.

    \b
    Examples:
      katapy run --bundle ./bundle web
      echo hello | katapy run -b ./cat-bundle c1
      katapy run --detach -b ./bundle web && katapy exec web ps
    """
    from katapy.client.pod import write_pid_file

    status = 0
    with _created(settings, container_id, bundle, foreground=not detach) as pod:
        if detach:
            pid = pod.stand_in()
            pod.start()
            write_pid_file(pid_file, pid)
        else:
            write_pid_file(pid_file, os.getpid())
            status = pod.run_foreground()
    return status


@click.command("create")
@_BUNDLE
@_PID_FILE
@click.argument("container_id", metavar="ID")
@click.pass_obj
def create(settings: Settings, bundle: str, pid_file: Path | None, container_id: str) -> None:
    """Create a container that waits for `katapy start`.

    \b
    Example:
      katapy create --bundle ./bundle web && katapy start web
    """
    from katapy.client.pod import write_pid_file

    with _created(settings, container_id, bundle, foreground=False) as pod:
        write_pid_file(pid_file, pod.stand_in())


@click.command("start")
@click.argument("container_id", metavar="ID")
@click.pass_obj
def start(settings: Settings, container_id: str) -> None:
    """Run what was created.

    \b
    Example:
      katapy start web
    """
    from katapy.client.pod import Pod

    require_root("start a container")
    with Pod.connect(settings.root, container_id) as pod:
        pod.start()


@click.command("kill")
@click.option("--all", "-a", "everyone", is_flag=True, help="Signal every process of the container.")
@click.argument("container_id", metavar="ID")
@click.argument("name", metavar="[SIGNAL]", default="SIGTERM")
@click.pass_obj
def kill(settings: Settings, everyone: bool, container_id: str, name: str) -> None:
    """Send a signal to a container (SIGTERM unless another is given, by name or number).

    \b
    Examples:
      katapy kill web
      katapy kill web KILL
    """
    number = parse_signal(name)
    from katapy.client.pod import Pod

    require_root("signal a container")
    with Pod.connect(settings.root, container_id) as pod:
        pod.kill(number, everyone=everyone)


def parse_signal(name: str) -> int:
    """Return a signal's number from ``9``, ``KILL`` or ``SIGKILL``. Raises InvalidArgument."""
    if re.fullmatch("[0-9]{1,3}", name):
        number = int(name)
    else:
        upper = name.upper()
        known = signal.Signals.__members__
        number = known.get(upper if upper.startswith("SIG") else f"SIG{upper}", 0)
    if number not in signal.valid_signals():
        raise InvalidArgument(f"{name[:40]!a} is not a signal: use a name as KILL or a number as 9")
    return int(number)


@click.command("delete")
@click.option("--force", "-f", is_flag=True, help="Kill it first if it runs; no error if it does not exist.")
@click.argument("container_id", metavar="ID")
@click.pass_obj
def delete(settings: Settings, force: bool, container_id: str) -> None:
    """Remove a container and its VM.

    \b
    Examples:
      katapy delete web
      katapy delete --force web
    """
    from katapy.client import pod

    require_root("delete a container")
    pod.delete(settings.root, container_id, force=force)
