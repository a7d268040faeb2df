"""The verbs that only read the state directory: state, list."""

from __future__ import annotations

import click

from katapy.cli import Settings
from katapy.listing import list_text, state_text


@click.command("state")
@click.argument("container_id", metavar="ID")
@click.pass_obj
def state(settings: Settings, container_id: str) -> None:
    """Print the state of a container as JSON (runtime-spec, "State").

    \b
    Example:
      katapy state web
    """
    click.echo(state_text(str(settings.root), container_id), nl=False)


@click.command("list")
@click.option("--format", "-f", "style", type=click.Choice(["table", "json"]), default="table", show_default=True)
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
    text, errors = list_text(str(settings.root), style=style, quiet=quiet)
    for error in errors:
        click.echo(f"katapy: {error}", err=True)
    click.echo(text, nl=False)
