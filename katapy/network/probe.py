"""Whether the host's kernel has what connecting a pod takes; run in a network namespace that goes with it."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from socket import if_nametoindex

from katapy.errors import KatapyError
from katapy.network import loopback, rules, tap
from katapy.network.netlink import Netlink


def main() -> int:
    """Do all of it once, or with the argument ``loopback`` lead that to a listener; say what is missing on stderr."""
    return _try_loopback() if sys.argv[1:] == ["loopback"] else _try_network()


def _try_network() -> int:
    stage = "make a tap"
    try:
        with ExitStack() as stack:
            netlink = Netlink()
            indexes = []
            for name in ("katapy0", "katapy1"):
                tap.open_tap(name, queues=1, stack=stack)
                indexes.append(if_nametoindex(name))
                netlink.set_link(indexes[-1])
            stage = "make an ingress queueing discipline (modprobe sch_ingress)"
            netlink.add_ingress(indexes[0])
            stage = "hand frames over (modprobe cls_u32 act_mirred)"
            netlink.add_filter(indexes[0], "ingress", rules.incoming(1, indexes[1]))
    except (KatapyError, OSError) as error:
        return _lacks(f"cannot {stage}: {error.strerror if isinstance(error, OSError) else error}")
    return 0


def _try_loopback() -> int:
    try:
        with ExitStack() as stack:
            loopback.lead(stack)
    except OSError as error:
        return _lacks(loopback.reason(error))
    return 0


def _lacks(what: str) -> int:
    print(what, file=sys.stderr)  # noqa: T201
    return 1
