"""The verb ``spec``: a starting config.json."""

from __future__ import annotations

import json
from pathlib import Path

import click

from katapy.errors import AlreadyExists, NotFound, PermissionDenied


@click.command("spec")
@click.option(
    "--bundle", "-b", type=click.Path(path_type=Path), default=".", show_default=True, help="Where to write it."
)
@click.option("--rootless", is_flag=True, help="With a user namespace, in which the caller is root.")
def spec(bundle: Path, rootless: bool) -> None:
    """Write a starting config.json: a shell in ./rootfs, the same as runc's.

    \b
    Example:
      mkdir -p bundle/rootfs && katapy spec --bundle bundle
    """
    from katapy.oci.default import default_spec

    path = bundle / "config.json"
    text = json.dumps(default_spec(rootless=rootless), indent="\t") + "\n"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise AlreadyExists(f"{path} exists: remove it first") from error
    except FileNotFoundError as error:
        raise NotFound(f"{bundle}: no such directory") from error
    except OSError as error:
        raise PermissionDenied(f"cannot write {path}: {error.strerror}") from error
