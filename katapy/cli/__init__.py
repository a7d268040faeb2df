"""The command line: flags in, text and an exit status out. No logic; each verb's module is imported when it is used.

Exit status: what the container returned; 1 for an error, 2 for wrong usage, 126 and 127 for a program that cannot
be executed or found in the container.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import click

from katapy import __version__
from katapy.errors import InvalidArgument, KatapyError, Unsupported, codes_of

if TYPE_CHECKING:
    from katapy.config import Config
    from katapy.sandbox.sizing import Size

DEFAULT_ROOT: Final = "/run/katapy"

# verb -> module; the command is the module's attribute of the same name. The order is the one of --help.
_VERBS: Final = {
    "run": "lifecycle",
    "create": "lifecycle",
    "start": "lifecycle",
    "exec": "execute",
    "kill": "lifecycle",
    "pause": "lifecycle",
    "resume": "lifecycle",
    "update": "update",
    "delete": "lifecycle",
    "state": "inspect",
    "list": "inspect",
    "ps": "observe",
    "events": "observe",
    "sandbox": "sandbox",
    "spec": "spec",
    "features": "features",
    "check": "check",
    "install": "install",
    "image": "image",
    "template": "template",
    "completion": "completion",
}


class Settings:
    """What the global options say; made once, passed to each verb by click."""

    def __init__(self, root: Path, config_path: Path | None, *, debug: bool, systemd_cgroup: bool = False) -> None:
        self.root, self.config_path, self.debug, self.systemd_cgroup = root, config_path, debug, systemd_cgroup

    @property
    def config(self) -> Config:
        """The configuration, read when a verb asks for it."""
        from katapy.config import Config

        return Config.load(self.config_path)

    def size(self, memory: str | None, vcpus: int | None) -> Size:
        """Return the size of a VM, as configured where it is not given. Raises InvalidArgument."""
        from katapy.config import parse_size
        from katapy.sandbox.sizing import Size

        hypervisor = self.config.hypervisor
        try:
            memory_bytes = hypervisor.memory if memory is None else parse_size(memory)
        except ValueError as error:
            raise InvalidArgument(f"--memory: {error}") from error
        return Size(vcpus or hypervisor.vcpus, memory_bytes)

    def check_config(self) -> None:
        """Raise what is wrong with the configuration, for a verb that leaves reading it to another process."""
        _ = self.config


class _Verbs(click.Group):
    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        module = importlib.import_module(f"katapy.cli.{_VERBS[cmd_name]}")
        command = getattr(module, f"{cmd_name}_command", None) or getattr(module, cmd_name)
        assert isinstance(command, click.Command)
        return command


def _check_rootless(_ctx: click.Context, _option: click.Parameter, value: str) -> None:
    # Go's strconv.ParseBool, which is runc's.
    if value in ("1", "t", "T", "true", "TRUE", "True"):
        raise Unsupported("--rootless true is not supported: katapy needs root")
    if value not in ("auto", "0", "f", "F", "false", "FALSE", "False"):
        raise click.BadParameter(f"{value!r} is none of true, false, auto.")


def _print_version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from katapy.oci.default import OCI_VERSION

        click.echo(f"katapy version {__version__}\nspec: {OCI_VERSION}")
        ctx.exit()


@click.command(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False, readable=False),
    default=DEFAULT_ROOT,
    show_default=True,
    help="Directory of the containers' state.",
)
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="KATAPY_CONFIG",
    help="Configuration file, instead of /etc/katapy/katapy.toml and conf.d.",
)
@click.option("--log", "log_file", type=click.Path(path_type=Path), help="Write log lines to this file.")
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--debug", is_flag=True, help="Log more; show a traceback with an error.")
@click.option("--systemd-cgroup", is_flag=True, help='Have systemd make cgroups; cgroupsPath is "slice:prefix:name".')
@click.option(
    "--rootless",
    metavar="true|false|auto",
    default="auto",
    show_default=True,
    callback=_check_rootless,
    expose_value=False,
    help="As runc's; katapy needs root, so true is refused.",
)
@click.option(
    "--version",
    "-v",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the version.",
)
@click.pass_context
def cli(
    ctx: click.Context,
    root: Path,
    config_path: Path | None,
    log_file: Path | None,
    log_format: Literal["text", "json"],
    debug: bool,
    systemd_cgroup: bool,
) -> None:
    """Run containers, each pod in its own virtual machine.

    katapy takes the arguments of an OCI runtime (runc) and runs the bundle in a VM of its own.

    \b
    Examples:
      katapy check                            what this host has and lacks
      katapy run --bundle ./bundle web        run a bundle in the foreground
      katapy exec -t web sh                   a shell in it
      katapy delete --force web               remove it
    """
    if log_file is not None or debug:
        from katapy import log

        log.setup(debug=debug, file=None if log_file is None else str(log_file), format=log_format)
    # The shim reads it too, in another directory.
    config_path = None if config_path is None else Path(os.path.abspath(config_path))
    ctx.obj = Settings(Path(os.path.abspath(root)), config_path, debug=debug, systemd_cgroup=systemd_cgroup)


def require_root(what: str) -> None:
    """Raise PermissionDenied unless the caller is root."""
    from katapy.errors import PermissionDenied

    if os.geteuid() != 0:
        raise PermissionDenied(f"cannot {what}: katapy must run as root; try sudo")


def _open_missing_streams() -> None:
    """Make /dev/null of a standard stream that the caller has closed: else a socket of ours would take its place."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)


def main() -> None:
    """Run the command line and exit."""
    _open_missing_streams()
    debug = "--debug" in sys.argv
    try:
        status = cli(standalone_mode=False)
    except click.exceptions.Exit as done:
        status = done.exit_code
    except click.ClickException as error:
        error.show()
        _log_error(error.format_message())
        status = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        status = 130
    except BrokenPipeError:
        # Whoever read our output has left; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = 141
    except Exception as error:
        status = _report(error, debug=debug)
    sys.exit(status if isinstance(status, int) else 0)


def _report(error: Exception, *, debug: bool) -> int:
    known = isinstance(error, KatapyError)
    text = str(error) if known else f"internal error: {type(error).__name__}: {error}"
    if debug:
        import traceback

        traceback.print_exc()
    _log_error(text)
    click.echo(f"katapy: {text}", err=True)
    return codes_of(error).exit_status


def _log_error(text: str) -> None:
    import logging

    if logging.getLogger().handlers:
        logging.getLogger("katapy").error("%s", text)
