"""Small borders of the agent's core: who is the host, what /proc says, what a process reports, how errors travel."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from katapy_agent import agent_pb2 as pb
from katapy_agent import errors, launcher, procfs, sandbox, server
from katapy_agent.events import Events
from katapy_agent.launcher import Console, Control, Forked, Ready
from katapy_agent.machine import reseed, set_hostname, set_time
from katapy_agent.rpc import Server
from katapy_agent.vsock import is_host


@pytest.mark.parametrize(
    ("peer", "admitted"),
    [
        ((2, 1), True),
        ((2, 1023), True),
        ((2, 1024), False),
        ((2, 0xFFFFFFFF), False),
        ((1, 1023), False),
        ((3, 1023), False),
        ((0, 0), False),
        ("", False),
    ],
)
def test_only_the_hosts_reserved_ports_are_the_host(peer: object, admitted: bool) -> None:
    assert is_host(socket.AF_VSOCK, peer) is admitted


STATUS = "Name:\tsleep\nUmask:\t0022\nUid:\t1000\t0\t0\t0\nNSpid:\t77\t5\t1\n"


def test_process_facts() -> None:
    facts = procfs.parse(77, STATUS, b"sleep\x0010\0")
    assert (facts.pid, facts.container_pid, facts.uid, facts.command) == (77, 1, 1000, "sleep 10")
    assert procfs.parse(77, STATUS, b"").command == "[sleep]"
    assert procfs.parse(77, STATUS, b"\xff\0").command == "\ufffd"


def test_process_that_is_gone_has_no_facts() -> None:
    assert procfs.describe(2**22 + 1) is None


def test_process_that_is_about_to_end() -> None:
    """A container's init, whose end comes before the end of what is started in it, or after it."""
    living = Path("/proc/self/stat").read_text()
    fields = living.rpartition(")")[2].split()
    assert not procfs._is_ending(living)
    exiting = [*fields[:6], str(int(fields[6]) | 0x4), *fields[7:]]
    killed = [*fields[:28], "256", *fields[29:]]
    for ending in (exiting, killed):
        assert procfs._is_ending(f"1 (a) R b) {' '.join(ending)}")
    assert not procfs.is_ending(os.getpid())
    assert procfs.is_ending(2**22 + 1)


@pytest.fixture
async def control() -> AsyncIterator[tuple[Control, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    reports = Control(ours)
    with theirs:
        yield reports, theirs
    reports.close()


async def test_reports_of_a_process(control: tuple[Control, socket.socket]) -> None:
    reports, process = control
    process.send(b'{"pid": 44}')
    assert await reports.report() == Forked(44)
    null = os.open(os.devnull, os.O_RDWR)
    socket.send_fds(process, [b'{"console": true}'], [null])
    os.close(null)
    console = await reports.report()
    assert isinstance(console, Console)
    assert os.readlink(f"/proc/self/fd/{console.master}") == os.devnull
    assert not os.get_inheritable(console.master)
    os.close(console.master)
    process.send(b'{"ready": true}')
    assert await reports.report() == Ready()
    reports.start()
    assert process.recv(100) == b'{"start": true}'
    process.close()
    assert await reports.report() is None
    reports.start()


async def test_a_process_that_died_before_it_read(control: tuple[Control, socket.socket]) -> None:
    """It was told to start, and killed: what it has not read resets the connection."""
    reports, process = control
    reports.start()
    process.close()
    assert await reports.report() is None


def test_a_process_that_is_gone_is_a_matter_of_state() -> None:
    """An exec into a container that ended meanwhile was a bug of katapy's."""
    with pytest.raises(errors.InvalidState, match="cannot join it: no such process"), errors.doing("join it"):
        os.kill(2**22 + 1, 0)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (b'{"error": {"kind": "CommandNotFound", "message": "exec: x"}}', errors.CommandNotFound),
        (b'{"error": {"kind": "SystemExit", "message": "exec: x"}}', errors.Internal),
        (b'{"pid": 1}', errors.Internal),
        (b'{"pid": "7"}', errors.Internal),
        (b'{"console": true}', errors.Internal),
        (b"[]", errors.Internal),
        (b"\xff", errors.Internal),
    ],
)
async def test_error_reports(
    control: tuple[Control, socket.socket], message: bytes, kind: type[errors.KatapyError]
) -> None:
    reports, process = control
    process.send(message)
    with pytest.raises(kind) as error:
        await reports.report()
    assert type(error.value) is kind


def test_nobody_hears_that_there_is_no_room_for_a_process() -> None:
    """The launcher ended where the call had been given up, and the VM with it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.close()
    launcher._refuse(theirs.fileno(), "cannot fork")
    theirs.close()


async def test_descriptors_of_a_bad_report_are_closed(control: tuple[Control, socket.socket]) -> None:
    reports, process = control
    reading, writing = os.pipe()
    socket.send_fds(process, [b'{"ready": true}'], [writing])
    os.close(writing)
    with pytest.raises(errors.Internal):
        await reports.report()
    assert os.read(reading, 1) == b""
    os.close(reading)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\nb", "a\n", "x" * 129, "ü"])
def test_ids_that_cannot_be(name: str) -> None:
    with pytest.raises(errors.InvalidArgument):
        sandbox.check_id(name)


@pytest.mark.parametrize("name", ["-a", ".a", "...", "cgroup.procs", "+", "x" * 128])
def test_ids_that_the_host_takes(name: str) -> None:
    """Those that begin with a dot or a dash were refused here, after the VM had booted."""
    sandbox.check_id(name)


def test_machine_refuses_nonsense() -> None:
    calls: tuple[Callable[[], None], ...] = (
        lambda: reseed(b""),
        lambda: reseed(b"x" * 513),
        lambda: set_time(-1),
        lambda: set_hostname("a\nb"),
        lambda: set_hostname("x" * 65),
    )
    for refused in calls:
        with pytest.raises(errors.InvalidArgument):
            refused()


@pytest.mark.parametrize(
    ("error", "code", "details", "name"),
    [
        (errors.CommandNotFound("exec: x"), grpc.StatusCode.NOT_FOUND, "exec: x", "CommandNotFound"),
        (errors.InvalidState("two\nlines"), grpc.StatusCode.FAILED_PRECONDITION, "two lines", "InvalidState"),
        (ZeroDivisionError("a\nb"), grpc.StatusCode.INTERNAL, "ZeroDivisionError: a b", "Internal"),
        (errors.Internal("x" * 9999), grpc.StatusCode.INTERNAL, "x" * 2048, "Internal"),
    ],
)
def test_errors_become_statuses(
    error: Exception, code: grpc.StatusCode, details: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        raise error
    except Exception as raised:
        status = server.status_of(raised)
    assert status == (code.value[0], details, (("katapy-error", name),))
    assert ("Traceback" in capsys.readouterr().err) is not isinstance(error, errors.KatapyError)


def test_every_method_of_the_service_is_served() -> None:
    pod: Any = None
    Server(pb.DESCRIPTOR.services_by_name["Agent"], server.AgentService(pod, Events()), server.status_of)
