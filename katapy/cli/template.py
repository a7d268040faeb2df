"""`katapy template`: the saved VMs that others are restored from."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from katapy import templates
from katapy.cli import Settings, require_root
from katapy.cli.table import age, print_table, size, utc
from katapy.errors import KatapyError

if TYPE_CHECKING:
    from pathlib import Path


@click.group("template")
def template() -> None:
    """Make, list, check and remove VM templates."""


@template.command("create")
@click.option("--memory", metavar="SIZE", help="Of the VM, all included, such as 512M; default: as configured.")
@click.option("--vcpus", type=click.IntRange(1, 255), help="Of the VM; default: as configured.")
@click.pass_obj
def create(settings: Settings, memory: str | None, vcpus: int | None) -> None:
    """Make the template of a shape now, where there is none, instead of with the first start that needs it.

    \b
    Examples:
      katapy template create
      katapy template create --memory 640M --vcpus 2
    """
    require_root("make a template")
    # Before any thread exists.
    from katapy.storage.shared_dir import enter_private_mounts

    enter_private_mounts()
    import asyncio

    from katapy.cli.progress import Progress
    from katapy.sandbox.machine import make_template

    shape = settings.size(memory, vcpus)
    with Progress("making the template"):
        made = asyncio.run(make_template(settings.config, shape))
    click.echo(made.short_key)


@template.command("ls")
@click.option("--format", "style", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.pass_obj
def list_all(settings: Settings, style: str) -> None:
    """List the templates, the one used last first.

    \b
    Examples:
      katapy template ls
      katapy template ls --format json
    """
    found, errors = templates.list_templates(_directory(settings))
    for error in errors:
        click.echo(f"katapy: {error}", err=True)
    if style == "json":
        click.echo(json.dumps([_document(each) for each in found]))
        return
    rows = [
        (
            each.short_key,
            str(each.shape.get("vcpus")),
            size(int(each.shape.get("memory", 0))),
            str(each.shape.get("kernel")),
            str(each.shape.get("accelerator")),
            size(each.size_bytes),
            age(each.used),
        )
        for each in found
    ]
    print_table([("KEY", "VCPUS", "MEMORY", "KERNEL", "ACCELERATOR", "SIZE", "USED"), *rows])


@template.command("verify")
@click.argument("keys", metavar="[KEY...]", nargs=-1)
@click.pass_obj
def verify(settings: Settings, keys: tuple[str, ...]) -> None:
    """Read templates as a whole, all unless some are named, and say which are damaged. The status is 1 then.

    A damaged template is also found by whoever is to be restored from it, and made anew.

    \b
    Example:
      katapy template verify
    """
    place = _directory(settings)
    found, errors = templates.list_templates(place)
    for error in errors if not keys else ():
        click.echo(f"katapy: {error}", err=True)
    bad = bool(errors) and not keys
    for key in keys or [each.key for each in found]:
        try:
            click.echo(f"{templates.verify(place, key).short_key} intact")
        except KatapyError as error:
            click.echo(f"katapy: {error}", err=True)
            bad = True
    sys.exit(1 if bad else 0)


@template.command("rm")
@click.argument("keys", metavar="KEY...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Remove all templates.")
@click.pass_obj
def remove(settings: Settings, keys: tuple[str, ...], everything: bool) -> None:
    """Remove templates by the first digits of their keys. Virtual machines that run are not affected.

    \b
    Examples:
      katapy template rm 3f2a
      katapy template rm --all
    """
    if everything is bool(keys):
        raise click.UsageError("give either a KEY or --all")
    require_root("remove a template")
    place = _directory(settings)
    # One by one: what is removed is told, also where a later one is not there.
    removed = (templates.remove(place, key) for key in keys)
    for key in templates.remove_all(place) if everything else removed:
        click.echo(key)


def _directory(settings: Settings) -> Path:
    return settings.config.runtime.data_dir / templates.DIRECTORY


def _document(each: templates.Template) -> dict[str, Any]:
    times = {"created": utc(each.created), "used": utc(each.used)}
    return {"key": each.key, "path": str(each.directory), **each.shape, "size": each.size_bytes, **times}
