"""The agent's server as pid 1 of private namespaces on this machine, its two vsock ports played by unix sockets.

Run as root: ``agent_on_host.py DIRECTORY CGROUP``. Listens on DIRECTORY/control and DIRECTORY/stdio, makes its
containers' cgroups below CGROUP, a name, writes a line to its standard output when it serves, and is gone with the
process that started it.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

from katapy_agent import cgroups, linux, machine, storage
from katapy_agent.launcher import start_launcher


def main(directory: Path, cgroup: str) -> None:
    flags = linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWUTS | linux.CLONE_NEWIPC | linux.CLONE_NEWNET
    linux.unshare(flags)
    pid = os.fork()
    if pid:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    try:
        _serve(directory, cgroup)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _serve(directory: Path, cgroup: str) -> None:
    # A VM is the agent's alone; here others have cgroups of that name, and their files are not to be waited for.
    cgroups._PARENT = cgroup  # type: ignore[misc]
    os.sync = lambda: None
    linux.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    recursive_private = ctypes.c_ulong(0x4000 | linux.MS_PRIVATE)
    ctypes.CDLL(None).mount(None, b"/", None, recursive_private, None)
    storage.mount("proc", Path("/proc"))
    storage.mount("cgroup2", Path("/sys/fs/cgroup"))
    storage.mount("tmpfs", Path("/run"))
    storage.RUN.mkdir()
    machine.loopback_up()
    launcher = start_launcher()
    from katapy_agent.server import serve

    def listen(name: str) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        listener.bind(str(directory / name))
        listener.listen(64)
        return listener

    asyncio.run(
        serve(
            launcher=launcher,
            control=listen("control"),
            stdio=listen("stdio"),
            ready=lambda: os.write(1, b"ready\n"),
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
