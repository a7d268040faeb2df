"""What a container may look at, to be compared under two runtimes; and commands on a terminal of their own."""

from __future__ import annotations

import difflib
import os
import select
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from harness import DEADLINE

# What a container may look at, as lines that must be the same with any runtime (/dev/core goes by the kernel).
FACTS = r"""
part() { echo "== $1"; }
part identity; id; grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp:|Umask|SigBlk)' /proc/self/status
part environment; env | sort
part place; pwd; stat -c '%a %u:%g' .; hostname; cat /etc/hostname; grep -c . /etc/hosts
part limits; grep -v 'pending signals' /proc/self/limits; cat /proc/self/oom_score_adj
part devices; stat -c '%A %u:%g %t:%T %N' /dev/* /dev/pts/* | grep -v /dev/core
part modes; stat -c '%a %u:%g %F %n' / /dev /dev/shm /dev/mqueue /proc /sys /run /tmp /var/tmp /new /ro /rw 2> /dev/null
part sizes; for place in /dev /dev/shm $(grep -o " /tmp " /proc/mounts); do
    df -k $place | tail -n 1 | awk '{print $2, $6}'
done
part options; while read -r _ place _ options _; do
    case $place in
    # Which of those to hide or protect there are, is the kernel's affair.
    /sys/* | /proc/acpi | /proc/asound | /proc/bus | /proc/fs | /proc/irq | /proc/kcore | /proc/keys) ;;
    /proc/latency_stats | /proc/sched_debug | /proc/scsi | /proc/sysrq-trigger | /proc/timer*) ;;
    *) echo "$place $(echo "$options" | tr ',' '\n' |
        grep -xE 'ro|rw|nosuid|noexec|relatime|noatime|(gid|ptmxmode)=.*' | tr '\n' ',')" ;;
    esac
done < /proc/mounts | sort
part hidden; for path in /proc/keys /proc/timer_list /proc/acpi /proc/scsi /sys/firmware; do
    [ -e $path ] && stat -c '%F %t:%T %n' $path && cat $path 2> /dev/null | head -c 1 | wc -c
done
part writable; for path in / /etc /dev /dev/shm /run /tmp /new /ro /rw /root /sys; do
    touch $path/probe 2> /dev/null && echo $path && rm $path/probe
done
part kernel; for path in sys/kernel/hostname sysrq-trigger irq bus fs; do
    grep -c " /proc/${path%%/*} ro," /proc/mounts; done; mount -t tmpfs x /tmp 2> /dev/null && echo mounted
part process; tr '\\0' ' ' < /proc/1/cmdline; ls /proc/self/fd | wc -l
"""
# A script for ``on_terminal``, which types what the status shall be.
TYPED = "test -t 0 && test -t 2 && tty; read x; exit $x"


class Host(Protocol):
    """Where programs run: as what, and in which directory."""

    directory: Path

    @property
    def env(self) -> Mapping[str, str]:
        """The environment."""


def difference(theirs: Sequence[str], ours: Sequence[str]) -> str:
    """Return what is not the same in the lines of FACTS as runc's container and katapy's have seen them."""
    return "\n".join(difflib.unified_diff(theirs, ours, "runc", "katapy", n=1, lineterm=""))


def on_terminal(host: Host, *argv: str | Path) -> int:
    """Run a command on a terminal of its own, answer ``6`` once it has said which, and return its status."""
    master, slave = os.openpty()
    with subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave, env=host.env, cwd=host.directory) as run:
        os.close(slave)
        seen = b""
        while b"/dev/pts/" not in seen and b"/dev/console" not in seen:
            assert select.select([master], [], [], DEADLINE)[0], f"nothing but {seen!r}"
            seen += os.read(master, 1024)
        os.write(master, b"6\r")
        with suppress(OSError):  # the last one has closed it
            while select.select([master], [], [], DEADLINE)[0] and os.read(master, 1024):
                pass
        os.close(master)
        return run.wait(DEADLINE)
