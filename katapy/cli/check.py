"""The verb ``check``: what this host has and lacks."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

import click

from katapy.cli import Settings
from katapy.errors import KatapyError

if TYPE_CHECKING:
    from katapy.config import Config

_UNSHARE: Final = "/usr/bin/unshare"


class Finding(NamedTuple):
    """One line: ``ok`` is False where katapy cannot run because of it, None where that does not matter."""

    name: str
    ok: bool | None
    detail: str


@click.command("check")
@click.option("--format", "style", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.pass_obj
def check(settings: Settings, style: str) -> int:
    """Say what this host has and lacks; exit 1 where katapy cannot run.

    The last lines are the engines, and which of them have katapy; `katapy install` makes it their runtime.

    \b
    Examples:
      katapy check
      katapy check --format json
    """
    findings = [*_findings(settings.config), *_engines()]
    if style == "json":
        click.echo(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            mark = {True: "ok", False: "MISSING", None: "-"}[finding.ok]
            click.echo(f"{mark.ljust(7)} {finding.name.ljust(width)}  {finding.detail}")
    return 1 if any(finding.ok is False for finding in findings) else 0


def _findings(config: Config) -> Iterator[Finding]:
    probes: dict[str, Callable[[Config], str]] = {
        "user": _user,
        "mounts": _mounts,
        "accelerator": _accelerator,
        "qemu": _qemu,
        "virtiofsd": _virtiofsd,
        "vsock": _vsock,
        "network": _network,
        "port-forward": _port_forward,
        "setpriv": _setpriv,
        "kernel": _kernel,
        "image": _image,
    }
    for name, probe in probes.items():
        try:
            yield Finding(name, True, probe(config))
        except KatapyError as error:
            yield Finding(name, False, str(error))


def _user(_config: Config) -> str:
    from katapy.cli import require_root

    require_root("run containers")
    return "root"


def _mounts(_config: Config) -> str:
    from katapy import run
    from katapy.errors import NotFound, Unavailable

    try:
        # Makes its mounts private, too, which some hosts forbid even where the namespace is allowed.
        run.output([_UNSHARE, "--mount", "/bin/true"])
    except NotFound as error:
        raise NotFound(f"{_UNSHARE} is missing; apt-get install util-linux") from error
    except Unavailable as error:
        hint = "katapy needs CAP_SYS_ADMIN; a container that it runs in must be a privileged one"
        raise Unavailable(f"cannot make a mount namespace: {error}; {hint}") from error
    return "a mount namespace of its own"


def _accelerator(config: Config) -> str:
    from katapy.cli import emulation
    from katapy.hypervisor.accel import Kind, probe, require

    found = require(asyncio.run(probe()), config.hypervisor)
    if found.kind is Kind.KVM:
        return f"kvm: {found.reason}"
    emulation.remember()
    return f"tcg (emulation: slower, and isolates less): {found.reason}"


def _qemu(config: Config) -> str:
    from katapy import run
    from katapy.errors import NotFound, Unavailable

    path = str(config.hypervisor.qemu)
    try:
        lines = run.output([path, "--version"]).splitlines()
    except NotFound as error:
        raise NotFound(f"{path} is missing; apt-get install qemu-system-x86") from error
    except OSError as error:
        raise Unavailable(f"cannot run {path}: {(error.strerror or str(error)).lower()}") from error
    if not lines:
        raise Unavailable(f"{path} has no version: is it QEMU?")
    return f"{lines[0]} ({path})"


def _virtiofsd(config: Config) -> str:
    from katapy.storage.virtiofs import find_virtiofsd

    return str(find_virtiofsd(config.storage.virtiofsd_paths))


def _vsock(config: Config) -> str:
    from katapy.transport.vsock import VsockKind, find_kind

    if find_kind(config.hypervisor.vsock) is VsockKind.KERNEL:
        return "kernel (vhost-vsock)"
    return "user (katapy's own device: the kernel's vhost-vsock is not there)"


def _network(config: Config) -> str:
    from katapy.errors import KatapyError
    from katapy.network.pod import probe

    if config.network.model == "none":
        return "none: network.model says so"
    try:
        probe()
    except KatapyError as error:
        return f"none, and pods that have one are refused: {error}"
    where = "in the kernel (vhost-net)" if config.network.vhost and os.path.exists("/dev/vhost-net") else "in QEMU"
    return f"{config.network.model}, packets are moved {where}"


def _port_forward(config: Config) -> str:
    from katapy.errors import KatapyError
    from katapy.network.pod import probe_loopback

    if config.network.model == "none" or not config.network.forward_loopback:
        return f"none: network.{'model' if config.network.model == 'none' else 'forward_loopback'} says so"
    try:
        probe_loopback()
    except KatapyError as error:
        return f"none, a pod's loopback on the host is not its guest's: {error}"
    return "the loopback of a pod's network namespace leads to its guest"


def _setpriv(_config: Config) -> str:
    from katapy.errors import NotFound
    from katapy.run import SETPRIV

    if not os.access(SETPRIV, os.X_OK):
        raise NotFound(f"{SETPRIV} is missing; apt-get install util-linux")
    return SETPRIV


def _kernel(config: Config) -> str:
    from katapy.assets.guest import find_kernel

    kernel = find_kernel(config.runtime.data_dir, config.hypervisor.kernel)
    return f"{kernel.version} ({kernel.kind})"


def _image(config: Config) -> str:
    from katapy.assets.guest import find_image

    image = find_image(config.runtime.data_dir, config.hypervisor.image)
    return f"{image.digest[:12]}, {image.size_bytes >> 20} MiB"


def _engines() -> Iterator[Finding]:
    from katapy.engines import ENGINES
    from katapy.engines.host import Host

    host = Host()
    for engine in ENGINES.values():
        if host.find_program(engine.program) is None:
            yield Finding(engine.name, None, "not installed")
            continue
        version = ".".join(map(str, host.version(engine.program)))
        try:
            names = engine.names(host)
        except KatapyError as error:
            yield Finding(engine.name, None, f"{version}, has a configuration that cannot be read: {error}")
            continue
        has = f"has katapy as {', '.join(names)}" if names else f"katapy is not set up: katapy install --{engine.name}"
        yield Finding(engine.name, True if names else None, f"{version}, {has}")
