"""Tells the user, once per boot of the host, that virtual machines are emulated here, which isolates less."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Final

import click

from katapy.cli import DEFAULT_ROOT

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
# '~' is in no container's id.
_SAID: Final = Path(DEFAULT_ROOT, "~emulated")


def warn() -> None:
    """Say it on stderr, unless it was said since the host has booted."""
    boot_id = _BOOT_ID.read_text()
    with suppress(OSError, UnicodeDecodeError):
        if _SAID.read_text() == boot_id:
            return
    click.echo("katapy: warning: the VM is emulated, which isolates less; see: katapy check", err=True)
    remember()


def remember() -> None:
    """Note that it was said."""
    # Not being able to is no reason to fail: it is said again.
    with suppress(OSError):
        _SAID.parent.mkdir(mode=0o700, exist_ok=True)
        _SAID.write_text(_BOOT_ID.read_text())
