"""The verb ``exec``: one more process in a running container."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import click

from katapy.cli import Settings, require_root
from katapy.errors import InvalidArgument


@click.command("exec", context_settings={"allow_interspersed_args": False})
@click.option("--tty", "-t", is_flag=True, help="Give it a terminal.")
@click.option("--user", "-u", help="Run as uid[:gid].")
@click.option("--cwd", help="Working directory in the container.")
@click.option("--env", "-e", multiple=True, metavar="KEY=VALUE", help="Set a variable; may be repeated.")
@click.option("--detach", "-d", is_flag=True, help="Leave it running and return.")
@click.option("--pid-file", type=click.Path(path_type=Path), help="Write the pid of its host process here.")
@click.argument("container_id", metavar="ID")
@click.argument("command", nargs=-1, required=True, metavar="CMD...")
@click.pass_obj
def exec_command(
    settings: Settings,
    tty: bool,
    user: str | None,
    cwd: str | None,
    env: tuple[str, ...],
    detach: bool,
    pid_file: Path | None,
    container_id: str,
    command: tuple[str, ...],
) -> int:
    """Run a command in a running container; its streams and exit status are the command's own.

    \b
    Examples:
      katapy exec web ls /
      katapy exec -t web sh
      katapy exec --user 1000:1000 --env LANG=C web id
    """
    from katapy.client.pod import Pod, write_pid_file

    require_root("execute a process in a container")
    if tty and (detach or not os.isatty(0)):
        raise InvalidArgument("exec: --tty needs a terminal as standard input, and no --detach")
    with Pod.connect(settings.root, container_id) as pod:
        size = os.get_terminal_size(0) if tty else None
        process = pod.own_process().with_exec_flags(
            command, env=env, cwd=cwd, user=user, terminal=tty, console_size=size
        )
        exec_id = secrets.token_hex(8)
        pod.add_exec(exec_id, process)
        if detach:
            write_pid_file(pid_file, pod.exec_detached(exec_id))
            return 0
        write_pid_file(pid_file, os.getpid())
        return pod.exec_foreground(exec_id)
