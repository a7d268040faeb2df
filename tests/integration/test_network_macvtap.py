"""What is different where a macvtap takes an interface over; its traffic is tested with that of taps."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from network_frames import OTHER, OTHER_IP, OWN_IP, ipv4
from network_lab import Lab, nothing_left, send, until_frame

from katapy.errors import AlreadyExists, Unsupported
from katapy.network.pod import Settings, clean

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

# A supervisor that dies when it is told to.
OWNER = """
import asyncio, os, sys
from katapy.network.pod import Helper, PodNetwork, Settings
async def main():
    network = PodNetwork(os.open(sys.argv[1], os.O_RDONLY), Settings(vhost=False, model="macvtap", egress_rate=10**6))
    await network.connect(Helper())
    print("connected", flush=True)
    sys.stdin.read()
asyncio.run(main())
"""


@pytest.fixture
def lab() -> Iterator[Lab]:
    with nothing_left(), ExitStack() as stack:
        made = Lab(stack, model="macvtap")
        made.veth("eth0", "p0", f"{OWN_IP}/24")
        made.require_model()
        yield made


async def test_the_namespace_is_left_as_it_was(lab: Lab) -> None:
    before = lab.snapshot()
    connection = await lab.connect(Settings(vhost=False, egress_rate=10**6))
    assert "katapy0@eth0" in lab.ip("-br link")
    assert "tbf" in lab.tc("qdisc show dev katapy0")
    connection.close()
    assert lab.snapshot() == before


async def test_what_a_killed_owner_leaves_is_cleaned(lab: Lab) -> None:
    """A macvtap does not go with its descriptors."""
    before = lab.snapshot()
    for again in (False, True):
        argv = [sys.executable, "-c", OWNER, str(lab.path)]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:  # noqa: ASYNC220
            assert owner.stdout
            assert owner.stdout.readline() == "connected\n"
            await clean(lab.path)  # not while it lives
            assert "katapy0@eth0" in lab.ip("-br link")
            with pytest.raises(AlreadyExists, match="the VM of another pod"):
                await lab.connect()
            owner.send_signal(signal.SIGKILL)
        assert "katapy0@eth0" in lab.ip("-br link")
        if again:  # by whoever comes next
            (await lab.connect()).close()
        else:
            await clean(lab.path)
        assert lab.snapshot() == before


async def test_what_the_pod_receives_cannot_be_limited(lab: Lab) -> None:
    before = lab.snapshot()
    with pytest.raises(Unsupported, match="cannot limit what eth0 receives"):
        await lab.connect(Settings(vhost=False, ingress_rate=10**6))
    assert lab.snapshot() == before


async def test_two_queues(lab: Lab) -> None:
    connection = await lab.connect(Settings(vhost=False, queues=2))
    (nic,) = connection.nics
    assert len({os.fstat(fd).st_rdev for fd in nic.tap_fds}) == 1
    assert len(nic.tap_fds) == 2
    wire, frame = lab.capture("p0"), ipv4(OWN_IP, OTHER_IP)
    for fd in nic.tap_fds:
        send(fd, frame)
        until_frame(wire, frame)


async def test_an_interface_that_cannot_be_taken_over_is_named(lab: Lab) -> None:
    """The kernel takes one over once."""
    lab.ip("link add taken link eth0 type macvlan mode bridge")
    before = lab.snapshot()
    with pytest.raises(Exception, match="cannot connect eth0 to a VM"):
        await lab.connect()
    assert lab.snapshot() == before
    assert OTHER not in lab.ip("link")
