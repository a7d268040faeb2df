"""The verbs that only read the state directory: state, list."""

from __future__ import annotations

import json

import click

from katapy.cli import Settings
from katapy.state import StateDir, list_states, state_json


@click.command("state")
@click.argument("container_id", metavar="ID")
@click.pass_obj
def state(settings: Settings, container_id: str) -> None:
    """Print the state of a container as JSON (runtime-spec, "State").

    \b
    Example:
      katapy state web
    """
    with StateDir.open(str(settings.root), container_id) as directory:
        click.echo(json.dumps(state_json(directory.load()), indent=2))


@click.command("list")
@click.option("--format", "style", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option("--quiet", "-q", is_flag=True, help="Print only the ids.")
@click.pass_obj
def list_command(settings: Settings, style: str, quiet: bool) -> None:
    """List the containers.

    \b
    Examples:
      katapy list
      katapy list --format json
      katapy list -q | xargs -n1 katapy delete --force
    """
    found, errors = list_states(str(settings.root))
    for error in errors:
        click.echo(f"katapy: {error}", err=True)
    if quiet:
        for one in found:
            click.echo(one.id)
        return
    rows = [{**state_json(one), "owner": _user_name(one.owner)} for one in found]
    if style == "json":
        click.echo(json.dumps(rows))
        return
    columns = ("id", "pid", "status", "bundle", "created", "owner")
    table = [[column.upper() for column in columns], *([str(row[column]) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in table) for index in range(len(columns))]
    for line in table:
        click.echo("   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _user_name(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"
