"""What a shim is told of the engine that started it, and where the two find each other.

Here is nothing but names: ``containerd-shim-katapy-v2 start`` and ``delete`` import it, and engines wait for those.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, NamedTuple

_DEFAULT_ADDRESS: Final = "/run/containerd/containerd.sock"
_SOCKETS: Final = Path("/run/containerd/s")


class Engine(NamedTuple):
    """``address`` and ``ttrpc`` are the engine's sockets, "" without; ``publisher`` is a program that tells it events.

    ``link`` is the address that the engine was given of the shim, ``log`` a fifo of the bundle that it reads.
    """

    namespace: str
    address: str
    ttrpc: str
    publisher: str
    link: str
    log: str


def state_root(address: str, namespace: str) -> Path:
    """Return the root of the state directories of an engine's containers: beside the socket of that engine.

    So ``katapy --root /run/containerd/katapy/default list`` shows what containerd runs in its namespace ``default``.
    """
    return Path(os.path.dirname(address.removeprefix("unix://") or _DEFAULT_ADDRESS), "katapy", namespace)


def socket_link(root: Path, sandbox_id: str) -> Path:
    """Return the short name of a shim's socket: that in its directory may be too long for a socket's address."""
    import hashlib

    return _SOCKETS / hashlib.sha256(os.fsencode(root / sandbox_id)).hexdigest()
