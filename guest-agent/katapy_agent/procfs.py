"""What /proc says about a process, for lists of processes. All of it is the container's to choose: data, bounded."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Final

COMMAND_MAX: Final = 4096
_PF_EXITING: Final = 0x4
_SIGKILL: Final = 1 << signal.SIGKILL - 1


@dataclass(frozen=True)
class ProcessFacts:
    """A process as its container's ``ps`` would show it."""

    pid: int
    container_pid: int
    uid: int
    command: str


def describe(pid: int, *, command_max: int = COMMAND_MAX) -> ProcessFacts | None:
    """Return the facts about ``pid`` (proc(5)), its command cut to ``command_max`` bytes; None if it is gone."""
    directory = Path("/proc", str(pid))
    try:
        status = (directory / "status").read_text(errors="replace")
        with (directory / "cmdline").open("rb") as file:
            command = file.read(command_max)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return parse(pid, status, command)


def is_ending(pid: int) -> bool:
    """Tell whether ``pid`` has ended, or the kernel is about to end it (proc(5), /proc/pid/stat)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return True
    return _is_ending(stat)


def _is_ending(stat: str) -> bool:
    # Its name is in parentheses, and may have some itself. Then fields from the third on: "flags" is the ninth,
    # "signal", what is pending, the 31st.
    fields = stat.rpartition(")")[2].split()
    return bool(int(fields[6]) & _PF_EXITING or int(fields[28]) & _SIGKILL)


def parse(pid: int, status: str, cmdline: bytes) -> ProcessFacts:
    """Return what ``status`` and ``cmdline`` (possibly cut) say; what has no command shows its name in brackets."""
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    command = b" ".join(cmdline.rstrip(b"\0").split(b"\0")).decode(errors="replace")
    return ProcessFacts(
        pid=pid,
        container_pid=int(fields["NSpid"].split()[-1]),
        uid=int(fields["Uid"].split()[0]),
        command=command or f"[{fields['Name'].strip()}]",
    )
