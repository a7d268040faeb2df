"""The configuration of katapy on this host: TOML files -> one frozen Config, checked whole before anything starts.

/etc/katapy/katapy.toml, then /etc/katapy/conf.d/*.toml in the order of their names, each overriding single keys of
the ones before; `--config FILE` or KATAPY_CONFIG stands for all of them. The keys, their meaning and their defaults
are the fields below and nothing else; docs/configuration.md shows them. What a key leads to is for the layer above.

A file says which programs run as root, so only root (or the calling user) may be able to write it.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Self

from katapy.errors import InvalidArgument, PermissionDenied
from katapy.jsonfile import printable, read, shown

DEFAULT_FILE: Final = Path("/etc/katapy/katapy.toml")
DEFAULT_DIRECTORY: Final = Path("/etc/katapy/conf.d")
ENVIRONMENT_VARIABLE: Final = "KATAPY_CONFIG"
VIRTIOFSD_PATHS: Final = (Path("/usr/lib/qemu/virtiofsd"), Path("/usr/libexec/virtiofsd"))

# A configuration is a few kilobytes; a bound keeps a wrong path from filling memory.
_LIMIT: Final = 1 << 20
_MIB: Final = 1 << 20
_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str) -> int:
    """Return a size in bytes: digits, and K, M, G or T for powers of 1024. Raises ValueError."""
    match = re.fullmatch(r"([0-9]{1,15})([KMGT]?)", text)
    if match is None:
        raise ValueError(f'{shown(text)} is not a size such as "256M"')
    return int(match[1]) * _UNITS[match[2]]


def format_size(size: int) -> str:
    """Return a size in bytes as the configuration writes it, in the largest unit that divides it."""
    unit = next(unit for unit in ("T", "G", "M", "K", "") if size % _UNITS[unit] == 0)
    return f"{size // _UNITS[unit]}{unit}"


def _key(check: Callable[[object], Any], doc: str) -> dict[str, Any]:
    """Metadata of a key: ``check`` turns what TOML gave into the field's value or raises ValueError."""
    return {"check": check, "doc": doc}


def _choice(*choices: str) -> Callable[[object], str]:
    def check(value: object) -> str:
        if value not in choices or not isinstance(value, str):
            raise ValueError(f"{_value(value)} is none of {', '.join(choices)}")
        return value

    return check


def _number(low: int, high: int) -> Callable[[object], int]:
    def check(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError("expected an integer")
        if not low <= value <= high:
            raise ValueError(f"{value} is not between {low} and {high}")
        return value

    return check


def _size(low: int, high: int) -> Callable[[object], int]:
    def check(value: object) -> int:
        size = parse_size(_text(value))
        if not low <= size <= high:
            raise ValueError(f"{value} is not between {format_size(low)} and {format_size(high)}")
        return size

    return check


def _rate(value: object) -> int:
    match = re.fullmatch(r"([0-9]{1,12})([kMG]?)", _text(value))
    rate = int(match[1]) * {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}[match[2]] if match else -1
    if rate != 0 and not 1000 <= rate <= 10**12:
        raise ValueError(f'{_value(value)} is not a rate from "1k" to "1000G"')
    return rate


def _seconds(value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError("expected a number of seconds")
    if not 1 <= value <= 3600:
        raise ValueError(f"{value} is not between 1 and 3600")
    return float(value)


def _seconds_or_none(value: object) -> float:
    return 0.0 if value == 0 and not isinstance(value, bool) else _seconds(value)


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("expected a string")
    return value


def _path(value: object) -> Path:
    text = _text(value)
    if not text.startswith("/") or "\0" in text or len(text.encode()) > 4095:
        raise ValueError(f"{shown(text)} is not an absolute path")
    return Path(text)


def _name(value: object) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.+~-]{1,128}", _text(value)):
        raise ValueError(f"{_value(value)} is not a name")
    return _text(value)


def _path_or_auto(value: object) -> Path | None:
    return None if value == "auto" else _path(value)


def _kernel_params(value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError("expected an array of strings")
    params = tuple(_text(item) for item in value)
    for param in params:
        # A space would end the parameter and start another on the kernel's command line.
        if not re.fullmatch(r"[!-~]{1,256}", param):
            raise ValueError(f"{shown(param)} is not one kernel parameter")
    if sum(map(len, params)) > 1024:
        raise ValueError("longer than 1024 characters together")
    return params


def _value(value: object) -> str:
    return shown(value) if isinstance(value, str) else shown(repr(value))


@dataclass(frozen=True)
class Hypervisor:
    """Section ``[hypervisor]``; sizes in bytes, a path of None is found automatically."""

    qemu: Path = field(default=Path("/usr/bin/qemu-system-x86_64"), metadata=_key(_path, "The QEMU program."))
    accel: str = field(
        default="auto",
        metadata=_key(
            _choice("auto", "kvm", "tcg"),
            "`kvm`; `tcg`, emulation: slow, no isolation to rely on; or `auto`: KVM where it really works, else TCG.",
        ),
    )
    require_kvm: bool = field(
        default=False, metadata=_key(_flag, "Refuse to run where hardware virtualization does not work.")
    )
    vcpus: int = field(default=1, metadata=_key(_number(1, 255), "vCPUs of a VM whose container has no CPU limit."))
    memory: int = field(
        default=256 * _MIB,
        metadata=_key(_size(128 * _MIB, 1 << 42), "Memory of a VM whose container has no memory limit, all included."),
    )
    overhead_memory: int = field(
        default=128 * _MIB,
        metadata=_key(
            _size(32 * _MIB, 1 << 36),
            "What a VM gets on top of the container's memory limit, for the guest's kernel and agent.",
        ),
    )
    kernel: str = field(
        default="auto",
        metadata=_key(
            _name, "The guest's kernel: `debian`, `tuned`, a version, or `auto`: the tuned one where it was built."
        ),
    )
    image: str = field(
        default="auto",
        metadata=_key(_name, "The guest's root image: the start of its digest, or `auto`: the newest that was built."),
    )
    kernel_params: tuple[str, ...] = field(
        default=(), metadata=_key(_kernel_params, "More parameters for the guest's kernel, one in each string.")
    )
    template: bool = field(
        default=True,
        metadata=_key(
            _flag, "Restore VMs from templates, made by the first start of each shape; `false`: boot each VM."
        ),
    )
    templates_max: int = field(
        default=16, metadata=_key(_number(1, 1024), "How many templates are kept; those used last stay.")
    )
    templates_size: int = field(
        default=4 << 30, metadata=_key(_size(_MIB, 1 << 50), "What all templates may take of the disk.")
    )
    vsock: str = field(
        default="auto",
        metadata=_key(
            _choice("auto", "kernel", "user"),
            "`kernel`, the host's vhost-vsock; `user`, katapy's own process; or `auto`: `kernel` where it works.",
        ),
    )


@dataclass(frozen=True)
class Storage:
    """Section ``[storage]``; a path of None is found automatically."""

    virtiofsd: Path | None = field(
        default=None,
        metadata=_key(
            _path_or_auto, f"The virtiofsd program, or `auto`: {' or '.join(f'`{path}`' for path in VIRTIOFSD_PATHS)}."
        ),
    )

    @property
    def virtiofsd_paths(self) -> tuple[Path, ...]:
        """Where to look for virtiofsd, in order."""
        return VIRTIOFSD_PATHS if self.virtiofsd is None else (self.virtiofsd,)


@dataclass(frozen=True)
class Network:
    """Section ``[network]``; rates in bits a second, 0: no limit."""

    model: str = field(
        default="tcfilter",
        metadata=_key(
            _choice("tcfilter", "macvtap", "none"),
            "How the interfaces of a pod's network namespace get into its VM: by taps beside them, `tcfilter`, or by "
            "`macvtap`, for which the kernel needs that driver; `none`: loopback only.",
        ),
    )
    spoofing: bool = field(
        default=False,
        metadata=_key(_flag, "Let guests send what does not bear their own addresses, as pods that route must."),
    )
    metadata: bool = field(
        default=False, metadata=_key(_flag, "Let guests reach the metadata service of a cloud, 169.254.169.254.")
    )
    ingress_rate: int = field(
        default=0, metadata=_key(_rate, "Bits a second that a pod may receive: `10M`; `0` is no limit.")
    )
    egress_rate: int = field(
        default=0, metadata=_key(_rate, "Bits a second that a pod may send: `10M`; `0` is no limit.")
    )
    vhost: bool = field(
        default=True, metadata=_key(_flag, "Move packets in the host's kernel (/dev/vhost-net), where it can.")
    )
    forward_loopback: bool = field(
        default=True,
        metadata=_key(
            _flag,
            "Relay connections to the loopback of a pod's network namespace to the guest's, as `kubectl port-forward` "
            "needs it.",
        ),
    )


@dataclass(frozen=True)
class Runtime:
    """Section ``[runtime]``; times in seconds."""

    data_dir: Path = field(
        default=Path("/var/lib/katapy"),
        metadata=_key(_path, "Where guest images, kernels, root file systems and templates are kept."),
    )
    boot_timeout: float = field(
        default=120.0,
        metadata=_key(_seconds, "Seconds that a VM has to boot; a busy machine without KVM may need many."),
    )
    agent_timeout: float = field(
        default=120.0,
        metadata=_key(
            _seconds_or_none,
            "Seconds that a VM's agent may be silent before the VM is taken for dead and killed; `0`: any time.",
        ),
    )


SECTIONS: Final = {"hypervisor": Hypervisor, "storage": Storage, "network": Network, "runtime": Runtime}


@dataclass(frozen=True)
class Config:
    """The whole configuration."""

    hypervisor: Hypervisor = Hypervisor()
    storage: Storage = Storage()
    network: Network = Network()
    runtime: Runtime = Runtime()

    @classmethod
    def load(cls, file: Path | None = None) -> Self:
        """Read the configuration; ``file``, else the one that KATAPY_CONFIG names, replaces the host's own files.

        Raises NotFound when a named file does not exist, InvalidArgument when one is wrong, PermissionDenied when
        others could have written it; the message names file and key.
        """
        named = file or os.environ.get(ENVIRONMENT_VARIABLE)
        sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
        for path in [Path(named)] if named else _default_files():
            name = f"configuration {printable(str(path))}"
            data = read(str(path), what=name, limit=_LIMIT, check_status=check_owner)
            for section, keys in parse_toml(data, what=name).items():
                sections[section].update(keys)
        return cls(**{name: SECTIONS[name](**keys) for name, keys in sections.items()})


def parse_toml(data: bytes, *, what: str) -> dict[str, dict[str, Any]]:
    """Parse one configuration file and return the checked values that it sets, by section and key.

    ``what`` names the file in errors. Raises InvalidArgument.
    """
    import tomllib  # most hosts have no file

    try:
        document = tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"{what}: not UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        detail = str(error)[:1].lower() + str(error)[1:]
        raise InvalidArgument(f"{what}: not TOML: {detail}") from error
    checked: dict[str, dict[str, Any]] = {}
    for name, table in document.items():
        if name not in SECTIONS:
            raise InvalidArgument(f"{what}: unknown section {_value(name)}{_nearest(name, list(SECTIONS))}")
        if not isinstance(table, dict):
            raise InvalidArgument(f"{what}: {name}: expected a section [{name}]")
        checked[name] = _check_section(SECTIONS[name], name, table, what)
    return checked


def _check_section(section: Any, name: str, table: dict[str, object], what: str) -> dict[str, Any]:
    checks = {key.name: key.metadata["check"] for key in fields(section)}
    checked = {}
    for key, value in table.items():
        if key not in checks:
            raise InvalidArgument(f"{what}: unknown key {_value(key)} in [{name}]{_nearest(key, list(checks))}")
        try:
            checked[key] = checks[key](value)
        except ValueError as error:
            raise InvalidArgument(f"{what}: {name}.{key}: {error}") from error
    return checked


def _nearest(name: str, known: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name[:64], known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"


def _default_files() -> list[Path]:
    # conf.d is sorted by name in code points, whatever the locale, so that 10-site.toml comes before 20-host.toml.
    files = sorted(DEFAULT_DIRECTORY.glob("*.toml"))
    return [DEFAULT_FILE, *files] if DEFAULT_FILE.exists() else files


def check_owner(status: os.stat_result, name: str) -> None:
    """Refuse, with PermissionDenied, a file that others than root and the calling user own or may write."""
    if status.st_uid not in (0, os.geteuid()):
        raise PermissionDenied(f"{name}: belongs to uid {status.st_uid}, not to root")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionDenied(f"{name}: others than its owner may write it (chmod go-w)")
