"""`katapy image`: the guest image and kernel that virtual machines boot, and the default root of sandboxes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from katapy.assets import guest, store
from katapy.assets.asset import DEFAULT_DATA_DIR
from katapy.assets.root import Root, list_roots
from katapy.cli.table import age, print_table, size, utc
from katapy.errors import KatapyError


@click.group("image")
def image() -> None:
    """Build, list and remove guest images and kernels."""


@image.command("build")
@click.option("--force", is_flag=True, help="Build although nothing has changed: take up Debian's updates.")
def build(force: bool) -> None:
    """Build the guest image and the default root of sandboxes, and take the kernel from Debian's package.

    Does nothing when all were built from the same recipes and agent.

    \b
    Examples:
      katapy image build
      katapy image build --force      with the packages that Debian has today
    """
    from katapy.cli import require_root
    from katapy.image_build import build as build_image
    from katapy.image_build import find_sources

    require_root("build a guest image")
    built, kernel, root = build_image(
        _data_dir(),
        find_sources(),
        force=force,
        waiting=lambda: click.echo("waiting for another katapy image build", err=True),
    )
    click.echo(
        f"image {built.short_digest} {size(built.size_bytes)}, kernel {kernel.version}, root {root.short_digest}"
    )


@image.command("ls")
@click.option("--format", "style", type=click.Choice(["table", "json"]), default="table", show_default=True)
def list_assets(style: str) -> None:
    """List the guest images, newest first; KERNEL is the one that a virtual machine boots.

    \b
    Examples:
      katapy image ls
      katapy image ls --format json
    """
    images, image_errors = guest.list_images(_data_dir())
    kernels, kernel_errors = guest.list_kernels(_data_dir())
    roots, root_errors = list_roots(_data_dir())
    for error in (*image_errors, *kernel_errors, *root_errors):
        click.echo(f"katapy: {error}", err=True)
    if style == "json":
        shown = {"images": [*map(_image_json, images)], "kernels": [*map(_kernel_json, kernels)]}
        click.echo(json.dumps({**shown, "roots": [*map(_root_json, roots)]}))
        return
    try:
        kernel = guest.find_kernel(_data_dir()).version
    except KatapyError:
        kernel = "-"
    rows = [(one.short_digest, size(one.size_bytes), kernel, age(one.created)) for one in images]
    print_table([("DIGEST", "SIZE", "KERNEL", "AGE"), *rows])


@image.command("rm")
@click.argument("digests", metavar="DIGEST...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Remove all images, kernels and root file systems.")
def remove(digests: tuple[str, ...], everything: bool) -> None:
    """Remove guest images by the first digits of their digests. Virtual machines that run are not affected.

    A root file system that a sandbox uses stays.

    \b
    Examples:
      katapy image rm 3f2a
      katapy image rm --all
    """
    from katapy.cli import require_root

    if everything is bool(digests):
        raise click.UsageError("give either a DIGEST or --all")
    require_root("remove a guest image")
    # One by one: what is removed is told, also where a later one is not there.
    removed = (store.remove_image(_data_dir(), digest) for digest in digests)
    for name in _remove_everything() if everything else removed:
        click.echo(name)


def _remove_everything() -> Iterator[str]:
    from katapy.storage.image_root import remove_unused

    yield from store.remove_all(_data_dir())
    yield from remove_unused(_data_dir() / "roots")


def _data_dir() -> Path:
    settings = click.get_current_context().find_root().obj
    return DEFAULT_DATA_DIR if settings is None else Path(settings.config.runtime.data_dir)


def _image_json(one: guest.Image) -> dict[str, Any]:
    return {"digest": one.digest, "path": str(one.path), "size": one.size_bytes, "created": utc(one.created)}


def _kernel_json(one: guest.Kernel) -> dict[str, Any]:
    return {"version": one.version, "kind": one.kind, "path": str(one.kernel), "created": utc(one.created)}


def _root_json(one: Root) -> dict[str, Any]:
    return {"digest": one.digest, "path": str(one.path), "created": utc(one.created)}
