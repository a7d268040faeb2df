"""docs/commands.md names every verb and every option that the command line has, and no other verb."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click

from katapy.cli import cli

PAGE = (Path(__file__).parents[2] / "docs/commands.md").read_text()


def _commands(group: click.Group, prefix: str) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from _commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def test_every_verb_and_option_is_documented() -> None:
    for name, command in _commands(cli, "katapy"):
        # In all its forms, each with the lines that continue it.
        usage = "".join(re.findall(rf"^.*{re.escape(name)}\b.*\n(?:  .*\n)*", PAGE, re.MULTILINE))
        assert usage, f"{name} is missing"
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.opts[0] in usage, f"{name} {parameter.opts[0]} is missing"


def test_every_global_option_is_documented() -> None:
    for parameter in cli.params:
        assert f"`{parameter.opts[0]}" in PAGE


def test_no_verb_is_invented() -> None:
    known = {name for name, _ in _commands(cli, "katapy")}
    shown = re.findall(r"^katapy ((?:(?:image|template) )?[a-z]+)", PAGE, re.MULTILINE)
    assert shown
    assert {f"katapy {verb}" for verb in shown} <= known
