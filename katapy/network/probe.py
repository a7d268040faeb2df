"""Whether the host's kernel has what connecting a pod takes; run in a network namespace that goes with it."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from socket import if_nametoindex

from katapy.errors import KatapyError
from katapy.network import rules, tap
from katapy.network.netlink import Netlink


def main() -> int:
    """Do all of it once; say what is missing on stderr."""
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
        print(f"cannot {stage}: {error.strerror if isinstance(error, OSError) else error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0
