"""The verb ``exec``: one more process in a running container."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from katapy.cli import Settings, require_root
from katapy.cli.lifecycle import check_console, check_preserved, standard_streams, tell_unknown
from katapy.errors import InvalidArgument

if TYPE_CHECKING:
    from katapy.client.pod import Pod
    from katapy.oci.process import ProcessSpec


@click.command("exec", context_settings={"allow_interspersed_args": False})
@click.option("--console-socket", type=click.Path(path_type=Path), help="Unix socket that gets the terminal.")
@click.option("--tty", "-t", is_flag=True, help="Give it a terminal.")
@click.option("--user", "-u", help="Run as uid[:gid].")
@click.option("--additional-gids", "-g", multiple=True, type=int, metavar="GID", help="One more group; repeatable.")
@click.option("--cwd", help="Working directory in the container.")
@click.option("--env", "-e", multiple=True, metavar="KEY=VALUE", help="Set a variable; repeatable.")
@click.option("--cap", "-c", multiple=True, metavar="CAP_NAME", help="One more capability; repeatable.")
@click.option("--no-new-privs", is_flag=True, help="Let it gain no privileges.")
@click.option("--process", "-p", "process_file", type=click.Path(path_type=Path), help="process.json, instead of CMD.")
@click.option("--detach", "-d", is_flag=True, help="Leave it running and return.")
@click.option("--pid-file", type=click.Path(path_type=Path), help="Write the pid of its host process here.")
@click.option("--preserve-fds", type=click.IntRange(min=0), default=0, help="Only 0: see docs/oci.md.")
@click.option("--ignore-paused", is_flag=True, help="Also in a paused container, where it waits for the resume.")
@click.argument("container_id", metavar="ID")
@click.argument("command", nargs=-1, metavar="[CMD...]")
@click.pass_obj
def exec_command(settings: Settings, /, container_id: str, command: tuple[str, ...], **flags: Any) -> int:
    """Run a command in a running container; its streams and exit status are the command's own.

    \b
    Examples:
      katapy exec web ls /
      katapy exec -t web sh
      katapy exec --user 1000:1000 --env LANG=C web id
      katapy exec --process process.json --detach --pid-file pid web
    """
    from katapy.client.pod import Pod, write_pid_file

    options = Flags(**flags)
    require_root("execute a process in a container")
    check_preserved(options.preserve_fds)
    with Pod.connect(settings.root, container_id) as pod:
        process = _process(pod, command, options)
        check_console(terminal=process.terminal, detached=options.detach, socket=options.console_socket)
        tell_unknown(process)
        if options.ignore_paused:
            pod.wait_resumed()
        exec_id = os.urandom(8).hex()
        pod.add_exec(exec_id, process)
        if not options.detach:
            write_pid_file(options.pid_file, os.getpid())
            return pod.exec_foreground(exec_id)
        with standard_streams(options.console_socket) as streams:
            stand_in = pod.stand_in(streams, exec_id)
        try:
            pod.start_exec(exec_id)
            pid = stand_in.attached()
        except BaseException:
            stand_in.kill()
            pod.forget_exec(exec_id)
            raise
        write_pid_file(options.pid_file, pid)
    return 0


class Flags(NamedTuple):
    """The options of exec."""

    console_socket: Path | None
    tty: bool
    user: str | None
    additional_gids: tuple[int, ...]
    cwd: str | None
    env: tuple[str, ...]
    cap: tuple[str, ...]
    no_new_privs: bool
    process_file: Path | None
    detach: bool
    pid_file: Path | None
    preserve_fds: int
    ignore_paused: bool


def _process(pod: Pod, command: tuple[str, ...], options: Flags) -> ProcessSpec:
    """Return the process to execute: the one of the file, or the container's own with the options' changes."""
    if options.process_file is not None:
        if command:
            raise InvalidArgument("exec: --process and a command exclude one another")
        from katapy.jsonfile import printable, read
        from katapy.oci.process import parse_process

        name = str(options.process_file)
        return parse_process(read(name), what=printable(name))
    if not command:
        raise click.UsageError("Missing argument 'CMD...', or --process.")
    return pod.own_process().with_exec_flags(
        command,
        env=options.env,
        cwd=options.cwd,
        user=options.user,
        terminal=options.tty,
        capabilities=options.cap,
        additional_gids=options.additional_gids,
        no_new_privileges=True if options.no_new_privs else None,
        console_size=os.get_terminal_size(0) if options.tty and os.isatty(0) else None,
    )
