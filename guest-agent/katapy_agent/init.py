"""Pid 1: makes a usable system of the bare kernel, then serves the host until the VM is switched off.

The order is what a start costs: the launcher is forked while this process is small and has one thread, gRPC is
imported after that. Pid 1 must not end, so whatever goes wrong is written to the console and the VM is switched off.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import io
import os
import resource
import signal
import sys
import traceback
import tty
from pathlib import Path
from typing import Final, NoReturn

from katapy_agent import machine, storage, vsock
from katapy_agent.launcher import Launcher, start_launcher

_CONSOLES: Final = ("/dev/console", "/dev/ttyS0")
_READY: Final = "/dev/ttyS1"  # where the host waits for the agent
_WARM: Final = "katapy.warm"  # on the kernel's command line of a VM that becomes a template
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_FILES_MAX: Final = 65536
_RB_POWER_OFF: Final = 0x4321FEDC


def main() -> NoReturn:
    """Run as pid 1 of the guest; never returns."""
    try:
        _run()
    except BaseException as error:
        _report(error)
    finally:
        _power_off()


def _run() -> None:
    gc.disable()  # nothing that is made while starting is garbage
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.umask(0o022)
    os.chdir("/")
    os.environ.clear()
    os.environ["PATH"] = _PATH
    storage.mount_root_file_systems()
    _take_console()
    machine.loopback_up()
    machine.trust_addresses()
    machine.raise_pid_max()
    _write("/proc/self/oom_score_adj", b"-1000")
    gc.freeze()
    launcher = start_launcher()
    resource.setrlimit(resource.RLIMIT_NOFILE, (_FILES_MAX, _FILES_MAX))
    _serve(launcher)


def _serve(launcher: Launcher) -> None:
    control, stdio = vsock.listen(vsock.CONTROL_PORT), vsock.listen(vsock.STDIO_PORT)
    import asyncio

    from katapy_agent.server import serve

    gc.freeze()
    gc.enable()
    warm = _WARM in Path("/proc/cmdline").read_text().split()
    asyncio.run(serve(launcher=launcher, control=control, stdio=stdio, ready=_say_ready, warm=warm))


def _say_ready() -> None:
    fd = os.open(_READY, os.O_WRONLY | os.O_NOCTTY)
    try:
        tty.setraw(fd)  # the host reads these bytes, not a terminal's idea of them
        os.write(fd, b"ready\n")
    finally:
        os.close(fd)


def _take_console() -> None:
    """Make the console the standard streams: the kernel opened it for pid 1 only if it was there before /dev was."""
    console = os.open("/dev/console", os.O_RDWR | os.O_NOCTTY)
    for fd in (0, 1, 2):
        os.dup2(console, fd)
    os.close(console)
    faulthandler.enable(2)
    # Python made none where the kernel could not open the console.
    binary = io.FileIO(2, "w", closefd=False)
    sys.stdout = sys.stderr = io.TextIOWrapper(binary, encoding="utf-8", errors="backslashreplace", write_through=True)


def _report(error: BaseException) -> None:
    lines = traceback.format_exception(error)
    text = f"katapy-agent: fatal: {' '.join(str(error).split()) or type(error).__name__}\n{''.join(lines)}"
    for console in _CONSOLES:
        try:
            _write(console, text.encode(errors="backslashreplace"))
        except OSError:
            continue
        return
    os.write(2, text.encode(errors="backslashreplace"))


def _power_off() -> NoReturn:
    os.sync()
    while True:
        ctypes.CDLL(None).reboot(ctypes.c_uint(_RB_POWER_OFF))
        signal.pause()


def _write(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_NOCTTY)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
