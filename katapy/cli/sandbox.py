"""The verb ``sandbox``: a command that nobody trusts, in a VM, with limits and a verdict; and a pool of such VMs."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from katapy.cli import Settings, require_root
from katapy.errors import InvalidArgument, KatapyError

if TYPE_CHECKING:
    from katapy.sdk.process import Process
    from katapy.sdk.sandbox import Sandbox

_CHUNK: Final = 65536
_KILLED: Final = 128 + signal.SIGKILL
_PAIR: Final = "HOST:GUEST"


@click.command("sandbox", context_settings={"allow_interspersed_args": False})
@click.option("--rootfs", type=click.Path(file_okay=False), help="Directory that is its root file system.")
@click.option("--image", metavar="LAYOUT[:TAG]", help="OCI image layout, a directory or an archive, that is.")
@click.option("--bundle", "-b", type=click.Path(file_okay=False), help="OCI bundle that is.")
@click.option("--memory", metavar="SIZE", default="256M", show_default=True, help="Memory of the command.")
@click.option("--cpus", type=float, default=1.0, show_default=True, help="CPUs; a fraction is a share of one.")
@click.option("--time", "cpu_time", type=float, metavar="SECONDS", help="CPU time; by default no limit.")
@click.option("--wall-time", type=float, metavar="SECONDS", default=60.0, show_default=True, help="0 is no limit.")
@click.option("--processes", type=int, default=64, show_default=True, help="Processes and threads at once.")
@click.option("--disk", metavar="SIZE", default="256M", show_default=True, help="What may be written in all.")
@click.option("--inodes", type=int, default=65536, show_default=True, help="Files that may be made in all.")
@click.option("--output", metavar="SIZE", default="16M", show_default=True, help="What may be printed in all.")
@click.option("--files", type=int, default=1024, show_default=True, help="Files that a process may have open.")
@click.option("--file-size", metavar="SIZE", help="Size of a file; by default that of the disk.")
@click.option(
    "--net", metavar="none|NAMESPACE", default="none", show_default=True, help="A name of ip netns, or a path."
)
@click.option("--ro", "read_only", multiple=True, metavar=_PAIR, help="Share a path read-only; repeatable.")
@click.option("--rw", "writable", multiple=True, metavar=_PAIR, help="Share a path; repeatable.")
@click.option("--env", "-e", multiple=True, metavar="KEY=VALUE", help="Set a variable; repeatable.")
@click.option("--cwd", help="Working directory.")
@click.option("--user", "-u", metavar="UID[:GID]", help="Run as that user; by default root, of the sandbox.")
@click.option("--tty", "-t", is_flag=True, help="Give it a terminal.")
@click.option("--stdin", "stdin", type=click.File("rb"), help="Its input, instead of katapy's own.")
@click.option("--meta", type=click.Path(path_type=Path, dir_okay=False), help="Write the verdict as isolate does.")
@click.option("--json", "as_json", is_flag=True, help="Print output and verdict as one JSON object.")
@click.option("--serve", type=click.IntRange(min=1), metavar="N", help="Keep N sandboxes ready instead, for others.")
@click.argument("command", nargs=-1, metavar="[--] [CMD...]")
@click.pass_obj
def sandbox(settings: Settings, /, command: tuple[str, ...], **flags: Any) -> int:
    """Run a command that nobody trusts in a VM of its own, with limits, and say what became of it.

    Without a root file system it has a small one with Python. Nothing that it writes there stays, and it has no
    network. The exit status is the command's, 128 and the signal where one ended it, 137 where a limit did: stderr
    says which.

    \b
    Examples:
      katapy sandbox -- python3 -c 'print(6 * 7)'
      katapy sandbox --time 2 --memory 64M --ro ./solution.py:/s.py --stdin case1 --meta meta -- python3 /s.py
      katapy sandbox --image ./alpine:latest --json -- cat /etc/os-release
      katapy sandbox -t -- sh
      katapy sandbox --serve 4               the next ones start in milliseconds
    """
    require_root("start a sandbox")
    settings.check_config()
    given = _arguments(settings, flags)
    if flags["serve"]:
        from katapy.sdk.pool import SOCKET

        if command:
            raise InvalidArgument("sandbox: --serve and a command exclude one another")
        return _serve(given, flags["serve"], settings.root / SOCKET)
    from katapy.cli import emulation
    from katapy.cli.progress import Progress
    from katapy.sdk.sandbox import Sandbox

    if flags["tty"] and not os.isatty(0):
        raise InvalidArgument("sandbox: --tty: standard input is not a terminal")
    made = Sandbox(**given)
    with _ended_by_signals(), closing(made):
        with Progress("starting the sandbox"):
            made.open()
        if made.accelerator == "tcg":
            emulation.warn()
        return _run(made, command, flags)


def _run(made: Sandbox, command: tuple[str, ...], flags: dict[str, Any]) -> int:
    output: dict[str, list[bytes]] = {"stdout": [], "stderr": []}
    with made.start(command or None, tty=flags["tty"]) as process, _terminal(process, wanted=flags["tty"]):
        source = 0 if flags["stdin"] is None else flags["stdin"].fileno()
        threading.Thread(target=_copy_input, args=(source, process), daemon=True).start()
        for chunk in process:
            if flags["as_json"]:
                output[chunk.stream].append(chunk.data)
            else:
                _write(1 if chunk.stream == "stdout" else 2, chunk.data)
        verdict = process.wait()
    if flags["meta"] is not None:
        try:
            flags["meta"].write_text(verdict.to_meta())
        except OSError as error:
            raise InvalidArgument(f"--meta: cannot write {flags['meta']}: {error.strerror}") from error
    if flags["as_json"]:
        texts = {name: b"".join(pieces).decode(errors="replace") for name, pieces in output.items()}
        click.echo(json.dumps({**texts, "truncated": process.truncated, **verdict.to_json()}, ensure_ascii=True))
    if verdict.exit_code is not None:
        return verdict.exit_code
    if verdict.signal is not None and verdict.killed_by in ("signal", "memory"):
        return 128 + verdict.signal
    if not flags["as_json"]:
        click.echo(f"katapy: the command was ended: {verdict.killed_by}", err=True)
    return _KILLED


def _arguments(settings: Settings, flags: dict[str, Any]) -> dict[str, Any]:
    """Return the flags as arguments of a Sandbox."""
    env = {}
    for variable in flags["env"]:
        name, equals, value = variable.partition("=")
        if not equals:
            raise InvalidArgument(f"--env {variable[:40]!r} is not KEY=VALUE")
        env[name] = value
    same = ("rootfs", "image", "bundle", "memory", "cpus", "cpu_time", "processes", "disk", "inodes", "output")
    return {
        **{name: flags[name] for name in (*same, "file_size", "cwd", "user")},
        "timeout": flags["wall_time"] or None,
        "open_files": flags["files"],
        "network": None if flags["net"] == "none" else flags["net"],
        "ro": dict(map(_pair, flags["read_only"])),
        "rw": dict(map(_pair, flags["writable"])),
        "env": env,
        "config": settings.config_path,
        "state_dir": settings.root,
    }


def _pair(text: str) -> tuple[str, str]:
    # The last colon: a path of the host may hold some.
    host, colon, guest = text.rpartition(":")
    if not colon or not host or not guest.startswith("/"):
        raise InvalidArgument(f"{text[:100]!r} is not {_PAIR}, with an absolute path in the sandbox")
    return host, guest


def _serve(given: dict[str, Any], count: int, path: Path) -> int:
    from katapy.cli.progress import Progress
    from katapy.sdk.pool import Pool
    from katapy.sdk.sandbox import Sandbox

    with _ended_by_signals(), Pool(lambda: Sandbox(pool="", **given), count, path) as pool:
        with Progress(f"starting {count} sandboxes"):
            pool.await_ready(count)
        click.echo(f"{count} sandboxes are ready at {path}")
        with suppress(SystemExit):
            signal.pause()
    return 0


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Have SIGTERM and SIGHUP unwind what is open, as SIGINT does."""

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _terminal(process: Process, *, wanted: bool) -> Iterator[None]:
    """Make the caller's terminal the command's: raw, and of one size."""
    if not wanted:
        yield
        return
    import termios
    import tty

    def resize(*_: object) -> None:
        with suppress(OSError, KatapyError):
            size = os.get_terminal_size(0)
            process.resize(columns=size.columns, rows=size.lines)

    saved = termios.tcgetattr(0)
    before = signal.signal(signal.SIGWINCH, resize)
    try:
        tty.setraw(0, termios.TCSANOW)
        resize()
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)
        termios.tcsetattr(0, termios.TCSANOW, saved)


def _copy_input(fd: int, process: Process) -> None:
    with suppress(OSError, KatapyError):
        while data := _read(fd):
            process.write(data)
    process.close_stdin()


def _read(fd: int) -> bytes:
    from katapy.client import attach

    while True:
        try:
            return os.read(fd, _CHUNK)
        except BlockingIOError:
            attach.wait_for(fd, select.POLLIN)


def _write(fd: int, data: bytes) -> None:
    from katapy.client import attach

    try:
        attach.write_all(fd, memoryview(data))
    except BrokenPipeError:
        # As a command in a pipe ends whose reader has left.
        sys.exit(128 + signal.SIGPIPE)
