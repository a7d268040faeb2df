"""The verbs of a container's life: run, create, start, kill, pause, resume, delete."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from katapy.cli import Settings, require_root
from katapy.cli.timing import Report
from katapy.errors import InvalidArgument, Unsupported
from katapy.timing import phase

if TYPE_CHECKING:
    from katapy.client.pod import Pod, Streams
    from katapy.oci.bundle import Bundle
    from katapy.oci.process import ProcessSpec

_BUNDLE = click.option(
    "--bundle", "-b", type=click.Path(), default=".", show_default=True, help="Directory of the bundle."
)
_PID_FILE = click.option(
    "--pid-file", type=click.Path(path_type=Path), help="Write the pid of the container's host process here."
)
_CONSOLE_SOCKET = click.option(
    "--console-socket", type=click.Path(path_type=Path), help="Unix socket that gets the container's terminal."
)
_PRESERVE_FDS = click.option("--preserve-fds", type=click.IntRange(min=0), default=0, help="Only 0: see docs/oci.md.")
_NO_PIVOT = click.option("--no-pivot", is_flag=True, help="Accepted, and of no effect: the root is the VM's own.")
_NO_NEW_KEYRING = click.option("--no-new-keyring", is_flag=True, help="Accepted, and of no effect: so is the keyring.")


class Wanted(NamedTuple):
    """What `create` and `run` are asked for; ``foreground`` is a container that ends with the command."""

    container_id: str
    bundle: str
    console_socket: Path | None
    pid_file: Path | None
    detached: bool
    foreground: bool


@contextmanager
def _begun(settings: Settings, wanted: Wanted) -> Iterator[tuple[Pod, Bundle]]:
    """Check everything that came from outside, then begin a container; a failure leaves nothing of it."""
    from katapy.client.pod import Launch, Pod
    from katapy.oci.bundle import load_bundle
    from katapy.state import check_id

    name = wanted.container_id
    require_root(f"create {name!r}" if len(name) < 77 else "create a container")
    check_id(name)
    bundle = load_bundle(wanted.bundle)
    check_console(terminal=bundle.spec.process.terminal, detached=wanted.detached, socket=wanted.console_socket)
    settings.check_config()
    tell_unknown(bundle.spec.process)
    launch = Launch(settings.root, settings.config_path, settings.debug, wanted.foreground, settings.systemd_cgroup)
    with phase("launch the shim"):
        begun = Pod.begin(launch, name, bundle)
    with begun as pod:
        try:
            yield pod, bundle
        except BaseException:
            tell(pod.discard())
            raise


def tell(warnings: list[str]) -> None:
    """Say what went wrong and changes nothing: on stderr, and in the log where there is one."""
    import logging

    for text in warnings:
        if logging.getLogger().handlers:
            logging.getLogger("katapy").warning("%s", text)
        click.echo(f"katapy: warning: {text}", err=True)


def tell_unknown(process: ProcessSpec) -> None:
    """Warn of what a process cannot be given and starts without."""
    if names := process.unknown_capabilities:
        tell([f"unknown capabilities are ignored: {', '.join(names)[:200]}"])


def _boot(pod: Pod, bundle: Bundle, container_id: str) -> None:
    from katapy.cli.progress import Progress

    with Progress(f"starting the VM of {container_id}"), phase("create"):
        pod.create(bundle)
    tell(pod.warnings())
    if pod.state().accelerator == "tcg":
        from katapy.cli import emulation

        emulation.warn()


def _create_detached(settings: Settings, wanted: Wanted, *, start: bool, report: Report | None = None) -> None:
    """Create a container that a stand-in takes care of on the host, and ``start`` it."""
    from katapy.client.pod import write_pid_file

    with _begun(settings, wanted) as (pod, bundle), ExitStack() as undo:
        with standard_streams(wanted.console_socket) as streams:
            stand_in = pod.stand_in(streams, bundle=bundle)
        undo.callback(stand_in.kill)
        _boot(pod, bundle, wanted.container_id)
        pid = stand_in.attached()
        undo.pop_all()
        if start:
            pod.start()
        write_pid_file(wanted.pid_file, pid)
        if report is not None:
            report.ask(pod)
    if report is not None:
        report.give()


def check_console(*, terminal: bool, detached: bool, socket: Path | None) -> None:
    """Raise InvalidArgument where a terminal is wanted that nobody would hold, or given and not wanted."""
    if terminal and detached and socket is None:
        raise InvalidArgument("cannot allocate tty if katapy will detach without setting console socket")
    if socket is not None and not (terminal and detached):
        raise InvalidArgument("cannot use console socket if katapy will not detach or allocate tty")
    if terminal and not detached and not os.isatty(0):
        raise InvalidArgument("process.terminal: standard input is not a terminal; set it to false")


def check_preserved(count: int) -> None:
    """Raise Unsupported for descriptors that were to go into the container."""
    if count:
        raise Unsupported(f"--preserve-fds {count}: open files of the host cannot be handed into a virtual machine")


@contextmanager
def standard_streams(console_socket: Path | None) -> Iterator[Streams]:
    """Yield the descriptors that become a stand-in's standard streams.

    A terminal on standard input stays the caller's: whoever leaves a container behind would not share it with that.
    """
    from katapy.client.launch import send_console

    if console_socket is not None:
        stdin = send_console(console_socket)
        streams = (stdin, stdin, stdin)
    else:
        stdin = os.open(os.devnull, os.O_RDONLY) if os.isatty(0) else os.dup(0)
        streams = (stdin, 1, 2)
    try:
        yield streams
    finally:
        os.close(stdin)


@click.command("run")
@_BUNDLE
@_PID_FILE
@_CONSOLE_SOCKET
@_PRESERVE_FDS
@_NO_PIVOT
@_NO_NEW_KEYRING
@click.option("--detach", "-d", is_flag=True, help="Leave it running and return.")
@click.option("--keep", is_flag=True, help="Do not remove it when it has ended.")
@click.option("--timing", is_flag=True, help="Say at the end, on stderr, where the time went.")
@click.option("--timing-json", type=click.Path(path_type=Path), help="Write that to a file, as JSON.")
@click.argument("container_id", metavar="ID")
@click.pass_obj
def run(
    settings: Settings,
    bundle: str,
    pid_file: Path | None,
    console_socket: Path | None,
    preserve_fds: int,
    no_pivot: bool,  # noqa: ARG001
    no_new_keyring: bool,  # noqa: ARG001
    detach: bool,
    keep: bool,
    timing: bool,
    timing_json: Path | None,
    container_id: str,
) -> int:
    """Run a bundle in a VM of its own.

    In the foreground the container's streams and exit status are the command's own, signals reach the container, and
    it is removed when it has ended.

    \b
    Examples:
      katapy run --bundle ./bundle web
      echo hello | katapy run -b ./cat-bundle c1
      katapy run --detach -b ./bundle web && katapy exec web ps
      katapy run --timing -b ./bundle web
    """
    check_preserved(preserve_fds)
    report = Report(text=timing, file=timing_json)
    if detach:
        wanted = Wanted(container_id, bundle, console_socket, pid_file, detached=True, foreground=False)
        _create_detached(settings, wanted, start=True, report=report)
        return 0
    from katapy.client.namespace import enter_network
    from katapy.client.pod import write_pid_file

    wanted = Wanted(container_id, bundle, console_socket, pid_file, detached=False, foreground=not keep)
    with _begun(settings, wanted) as (pod, loaded):
        enter_network(loaded.spec)
        control = pod.come_for_streams()
        _boot(pod, loaded, container_id)
        write_pid_file(pid_file, os.getpid())
        with phase("run the container"):
            status = pod.run_foreground(control)
        report.ask(pod)
        if not keep:
            with phase("remove the container"):
                tell(pod.discard())
    report.give()
    return status


@click.command("create")
@_BUNDLE
@_PID_FILE
@_CONSOLE_SOCKET
@_PRESERVE_FDS
@_NO_PIVOT
@_NO_NEW_KEYRING
@click.argument("container_id", metavar="ID")
@click.pass_obj
def create(
    settings: Settings,
    bundle: str,
    pid_file: Path | None,
    console_socket: Path | None,
    preserve_fds: int,
    no_pivot: bool,  # noqa: ARG001
    no_new_keyring: bool,  # noqa: ARG001
    container_id: str,
) -> None:
    """Create a container that waits for `katapy start`.

    \b
    Example:
      katapy create --bundle ./bundle web && katapy start web
    """
    check_preserved(preserve_fds)
    wanted = Wanted(container_id, bundle, console_socket, pid_file, detached=True, foreground=False)
    _create_detached(settings, wanted, start=False)


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
    """Return a signal's number from ``9``, ``KILL`` or ``SIGKILL``; 0 only asks. Raises InvalidArgument."""
    if re.fullmatch("[0-9]{1,3}", name):
        number = int(name)
    else:
        upper = name.upper()
        known = signal.Signals.__members__
        number = known.get(upper if upper.startswith("SIG") else f"SIG{upper}", -1)
    if number != 0 and number not in signal.valid_signals():
        raise InvalidArgument(f"{name[:40]!a} is not a signal: use a name as KILL or a number as 9")
    return int(number)


@click.command("pause")
@click.argument("container_id", metavar="ID")
@click.pass_obj
def pause(settings: Settings, container_id: str) -> None:
    """Freeze every process of a running container.

    \b
    Example:
      katapy pause web
    """
    from katapy.client.pod import Pod

    require_root("pause a container")
    with Pod.connect(settings.root, container_id) as pod:
        pod.task.pause(container_id)


@click.command("resume")
@click.argument("container_id", metavar="ID")
@click.pass_obj
def resume(settings: Settings, container_id: str) -> None:
    """Let a paused container go on.

    \b
    Example:
      katapy resume web
    """
    from katapy.client.pod import Pod

    require_root("resume a container")
    with Pod.connect(settings.root, container_id) as pod:
        pod.task.resume(container_id)


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
    from katapy.client import removal

    require_root("delete a container")
    tell(removal.delete(settings.root, container_id, force=force))
