"""Decides whether hardware virtualization really works here.

That /dev/kvm exists proves nothing: under a paravirtual KVM a guest runs a hundred times too slowly, or never gets
through its start. So the cheap signs come first, every time: the CPU's flag, the device, the API version. Then a
small guest is timed (``kvm_probe``, in a process with a deadline), and that verdict is remembered for this boot.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import secrets
import stat
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, Protocol

from katapy import run
from katapy.errors import KatapyError, Unavailable

CACHE_DIR: Final = Path("/run/katapy")
KVM_DEVICE: Final = Path("/dev/kvm")
# Beside the containers' directories, and '~' is in no id.
_CACHE_NAME: Final = "~acceleration.json"
_CACHE_BYTES: Final = 4096
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_CPUINFO: Final = Path("/proc/cpuinfo")
# The first processor's block, where the flags are; a large machine's file is slow to read to its end.
_CPUINFO_BYTES: Final = 8192
_KVM_GET_API_VERSION: Final = 0xAE00
_KVM_API_VERSION: Final = 12
# The loop takes under 1 ms on hardware and over 100 ms without.
_SLOWEST_LOOP: Final = 0.020
_PROBE: Final = (sys.executable, "-I", "-S", str(Path(__file__).with_name("kvm_probe.py")))
_BEGUN: Final = b"begun\n"
# For the probe to be loaded, however busy the host, or slow its disk, is: that says nothing of KVM.
_BEGIN_DEADLINE: Final = 60.0
_DEADLINE: Final = 10.0
_KILL_DEADLINE: Final = 1.0


class Kind(StrEnum):
    """What executes the guest's instructions."""

    KVM = "kvm"
    TCG = "tcg"


@dataclass(frozen=True)
class Acceleration:
    """What executes the guest's instructions, and why; ``reason`` is fit for a user."""

    kind: Kind
    reason: str


class Wanted(Protocol):
    """What the configuration asks for: ``accel`` is auto, kvm or tcg."""

    @property
    def accel(self) -> str: ...

    @property
    def require_kvm(self) -> bool: ...


def require(found: Acceleration, wanted: Wanted) -> Acceleration:
    """Return the acceleration to use, given what ``probe`` found and the configuration wants.

    Raises Unavailable where KVM is wanted and does not work, or is required and ``accel = "tcg"`` excludes it.
    """
    chosen = found
    if wanted.accel == Kind.TCG:
        chosen = Acceleration(Kind.TCG, 'accel = "tcg" is configured')
    needed = wanted.require_kvm or wanted.accel == Kind.KVM
    if needed and chosen.kind is not Kind.KVM:
        setting = "require_kvm = true" if wanted.require_kvm else 'accel = "kvm"'
        raise Unavailable(f"cannot use KVM, which the configuration demands ({setting}): {chosen.reason}")
    return chosen


async def probe(cache_dir: Path = CACHE_DIR) -> Acceleration:
    """Return KVM where it really works, else TCG with the reason.

    Takes under a millisecond where the cheap signs or ``cache_dir`` answer, else up to a few seconds, once per boot.
    """
    obstacle = find_obstacle(os.uname().machine, _read_start(_CPUINFO, _CPUINFO_BYTES), KVM_DEVICE)
    if obstacle is not None:
        return Acceleration(Kind.TCG, obstacle)
    boot_id = _BOOT_ID.read_text().strip()
    remembered = recall(cache_dir, boot_id)
    if remembered is not None:
        return remembered
    try:
        verdict = judge(await measure(_PROBE, _DEADLINE))
    except KatapyError as error:
        # Not remembered: another hypervisor may hold the CPU's extension just now.
        return Acceleration(Kind.TCG, f"/dev/kvm failed its test: {error}")
    remember(cache_dir, boot_id, verdict)
    return verdict


def find_obstacle(machine: str, cpuinfo: str, kvm: Path) -> str | None:
    """Return what rules KVM out before any guest has run, or None.

    ``machine`` is uname's, ``cpuinfo`` the start of /proc/cpuinfo, ``kvm`` the device.
    """
    if machine != "x86_64":
        return f"KVM is used on x86-64 only, this is {machine}"
    flags = next((line.split() for line in cpuinfo.splitlines() if line.startswith("flags")), [])
    if not {"svm", "vmx"}.intersection(flags):
        return "the CPU shows no hardware virtualization (neither svm nor vmx)"
    try:
        fd = os.open(kvm, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"{kvm} cannot be opened: {(error.strerror or str(error)).lower()}"
    try:
        version = fcntl.ioctl(fd, _KVM_GET_API_VERSION, 0)
    except OSError:
        return f"{kvm} is not a KVM device"
    finally:
        os.close(fd)
    return None if version == _KVM_API_VERSION else f"{kvm} has API version {version}, not {_KVM_API_VERSION}"


def judge(seconds: float | None) -> Acceleration:
    """Return the verdict on a test guest that took ``seconds``, None if it never ended."""
    if seconds is None:
        return Acceleration(Kind.TCG, f"/dev/kvm hangs: a small test guest did not end within {_DEADLINE:g} s")
    took = f"a test guest took {seconds * 1000:.3g} ms"
    if seconds > _SLOWEST_LOOP:
        return Acceleration(Kind.TCG, f"/dev/kvm is no hardware virtualization: {took}, under 1 is right")
    return Acceleration(Kind.KVM, f"/dev/kvm works: {took}")


async def measure(argv: Sequence[str], deadline: float) -> float | None:
    """Run the probe and return the seconds that it prints, None if it did not end ``deadline`` seconds after it began.

    Raises Unavailable if it prints an error, which is KVM's refusal, or does not begin.
    """
    reader, writer = os.pipe()
    try:
        try:
            process = run.start(argv, name="the KVM probe", stdout=writer)
        finally:
            os.close(writer)
        try:
            await _await_begin(reader)
            async with asyncio.timeout(deadline):
                await process.wait()
        except TimeoutError:
            await _abandon(process)
            return None
        except BaseException:
            await _abandon(process)
            raise
        return parse_answer(os.read(reader, 256).decode(errors="replace"))
    finally:
        os.close(reader)


async def _await_begin(reader: int) -> None:
    try:
        async with asyncio.timeout(_BEGIN_DEADLINE):
            await run.readable(reader)
    except TimeoutError:
        raise Unavailable(f"the probe has not begun after {_BEGIN_DEADLINE:g} s") from None
    if os.read(reader, len(_BEGUN)) != _BEGUN:
        raise Unavailable("the probe does not begin")


async def _abandon(process: run.Process) -> None:
    """Kill without insisting: what spins inside the kernel may not see even SIGKILL."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_KILL_DEADLINE):
            await process.stop(grace=0)


def parse_answer(answer: str) -> float:
    """Return the seconds that ``kvm_probe`` printed; raises Unavailable where it printed something else."""
    try:
        return float(answer)
    except ValueError:
        raise Unavailable(answer.removeprefix("error: ") or "no answer") from None


def recall(cache_dir: Path, boot_id: str) -> Acceleration | None:
    """Return the verdict saved during this boot; a file that is corrupt or not ours counts as none."""
    try:
        fd = os.open(cache_dir / _CACHE_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if not _trusted(os.stat(cache_dir)) or not _trusted(found := os.fstat(fd)) or not stat.S_ISREG(found.st_mode):
            return None
        saved = json.loads(os.read(fd, _CACHE_BYTES))
        if saved["boot_id"] != boot_id or not isinstance(saved["reason"], str):
            return None
        return Acceleration(Kind(saved["kind"]), saved["reason"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    finally:
        os.close(fd)


def remember(cache_dir: Path, boot_id: str, verdict: Acceleration) -> None:
    """Save the verdict for this boot; where that is not possible, the next start measures again."""
    temporary = cache_dir / f".{_CACHE_NAME}.{secrets.token_hex(8)}"
    with contextlib.suppress(OSError):
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "w") as file:
                json.dump({"boot_id": boot_id, **asdict(verdict)}, file)
            temporary.rename(cache_dir / _CACHE_NAME)
        finally:
            temporary.unlink(missing_ok=True)


def _trusted(found: os.stat_result) -> bool:
    """Whether only the caller can have written this."""
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _read_start(path: Path, limit: int) -> str:
    with path.open("rb") as file:
        return file.read(limit).decode(errors="replace")
