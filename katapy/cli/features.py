"""The verb ``features``: what of the runtime-spec is honoured, for engines that ask before they use it."""

from __future__ import annotations

import json

import click


@click.command("features")
def features() -> None:
    """Print what katapy honours of config.json as JSON (runtime-spec, "Features").

    \b
    Example:
      katapy features
    """
    from katapy.oci.features import features as known

    click.echo(json.dumps(known(), indent=2))
