"""The verb ``install``: makes katapy a runtime of the engines on this host."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from katapy.engines.change import Change
    from katapy.engines.engine import Engine, Runtime
    from katapy.engines.host import Host


def _check_name(_ctx: click.Context, _option: click.Parameter, value: str) -> str:
    # A RuntimeClass takes no other as its handler (RFC 1123, a DNS label).
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", value):
        raise click.BadParameter(f"{value!r} is not a name of small letters, digits and hyphens.")
    return value


def _check_path(_ctx: click.Context, _option: click.Parameter, value: str | None) -> str | None:
    # It may stand in a file of the engine, between quotes.
    if value is not None and not re.fullmatch(r'[^\x00-\x1f"\\]+', value):
        raise click.BadParameter(f"{value!r} is not a path that can be written down.")
    return value if value is None else os.path.abspath(value)


@click.command("install")
@click.option("--containerd", is_flag=True, help="For Kubernetes, by /etc/containerd/config.toml.")
@click.option("--crio", is_flag=True, help="For Kubernetes, by a file in /etc/crio/crio.conf.d.")
@click.option("--docker", is_flag=True, help="By /etc/docker/daemon.json.")
@click.option("--podman", is_flag=True, help="By a file in /etc/containers/containers.conf.d.")
@click.option("--uninstall", is_flag=True, help="Take out again what was put in.")
@click.option("--dry-run", is_flag=True, help="Show as a diff what would be changed, and change nothing.")
@click.option("--name", default="katapy", show_default=True, callback=_check_name, help="Of the runtime.")
@click.option("--config", metavar="FILE", callback=_check_path, help="The engine's file, instead of the usual one.")
@click.option(
    "--programs", metavar="DIR", callback=_check_path, help="Where katapy's programs are, if not where this one is."
)
@click.option(
    "--root",
    metavar="DIR",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default="/",
    show_default=True,
    help="Act on the host whose file system is mounted here; all other paths are as they are there.",
)
def install(
    uninstall: bool, dry_run: bool, name: str, config: str | None, programs: str | None, root: Path, **chosen: bool
) -> None:
    """Make katapy a runtime of the engines that are named, or take it out again.

    What is in their files stays as it is, and a copy is kept of each file that is changed. A second time there is
    nothing to do. Nothing is restarted: the last line says what has to be.

    \b
    Examples:
      katapy install --docker --dry-run             show what would be changed
      katapy install --containerd                   a runtime handler for Kubernetes
      katapy install --podman --docker              two at once
      katapy install --docker --uninstall           as it was before
      katapy install --containerd --root /host      in a container that has the host's / there
    """
    from katapy.cli import require_root
    from katapy.engines import ENGINES
    from katapy.engines.engine import Runtime
    from katapy.engines.host import Host

    engines = [engine for engine in ENGINES.values() if chosen[engine.name]]
    if not engines:
        raise click.UsageError(f"name an engine: {', '.join(f'--{engine}' for engine in ENGINES)}")
    if config is not None and len(engines) > 1:
        raise click.UsageError("--config is the file of one engine")
    if not dry_run:
        require_root("configure an engine")
    host = Host(root.resolve())
    runtime = Runtime(name, programs or _programs(host))
    if not uninstall:
        _require_programs(host, runtime)
    # All are planned before any is changed.
    plans = [(engine, _plan(engine, host, runtime, config, uninstall=uninstall)) for engine in engines]
    for engine, change in plans:
        _carry_out(engine, change, runtime.name, uninstall=uninstall, dry_run=dry_run)
        file = config or engine.config.format(name=name)
        if not uninstall and (warning := engine.warning(host, file)):
            click.echo(f"katapy: warning: {warning}", err=True)


def _programs(host: Host) -> str:
    """Return the directory of the program that was called; of another host it is the usual one."""
    return str(Path(os.path.abspath(sys.argv[0])).parent) if host.root == Path("/") else "/usr/local/bin"


def _require_programs(host: Host, runtime: Runtime) -> None:
    from katapy.errors import NotFound

    for path in (runtime.program, runtime.shim):
        if not os.access(host.locate(path), os.X_OK):
            hint = "make install puts it into /usr/local/bin, and --programs DIR names another directory"
            raise NotFound(f"{path} is missing: {hint}")


def _plan(engine: Engine, host: Host, runtime: Runtime, config: str | None, *, uninstall: bool) -> Change | None:
    file = config or engine.config.format(name=runtime.name)
    if uninstall:
        return engine.plan_uninstall(host, runtime.name, file)
    return engine.plan_install(host, runtime, file)


def _carry_out(engine: Engine, change: Change | None, name: str, *, uninstall: bool, dry_run: bool) -> None:
    if change is None:
        has = f"has nothing of {name} that katapy install wrote" if uninstall else f"has the runtime {name}"
        click.echo(f"{engine.name}: nothing to do: it {has}")
    elif dry_run:
        click.echo(change.diff(), nl=False)
    else:
        copy = change.apply()
        done = "removed" if change.after is None else "changed" if change.before is not None else "written"
        click.echo(f"{engine.name}: {change.path} {done}{f', before: {copy}' if copy else ''}")
        click.echo(f"{engine.name}: {engine.then}")
