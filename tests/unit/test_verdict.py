"""Verdicts as JSON and as isolate's meta file, read back as a judge reads it."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from katapy.verdict import KilledBy, Verdict

CLEAN = Verdict(
    exit_code=0,
    signal=None,
    killed_by=KilledBy.NONE,
    trusted=True,
    wall_seconds=1.5,
    cpu_seconds=0.25,
    peak_memory_bytes=3 << 20,
    host_cpu_seconds=0.75,
    accelerator="tcg",
)
USAGE = {"time": "0.250", "time-wall": "1.500", "max-rss": "3072", "cg-mem": "3072"}
KEYS = {*USAGE, "cg-oom-killed", "exitcode", "exitsig", "killed", "status", "message"}


def parse(meta: str) -> dict[str, str]:
    """Read a meta file as the grammar says: lines of key:value, each key once."""
    assert meta.endswith("\n")
    pairs = [(key, value) for key, _, value in (line.partition(":") for line in meta.splitlines())]
    parsed = dict(pairs)
    assert len(parsed) == len(pairs), "a key is given twice"
    return parsed


def ended(killed_by: KilledBy, *, exit_code: int | None = None, signal: int | None = None) -> dict[str, str]:
    """Return the lines of a verdict other than what the run took."""
    meta = parse(replace(CLEAN, killed_by=killed_by, exit_code=exit_code, signal=signal).to_meta())
    assert {key: meta.pop(key) for key in USAGE} == USAGE
    return meta


def test_a_success_has_no_status() -> None:
    assert ended(KilledBy.NONE, exit_code=0) == {"exitcode": "0"}


def test_an_error_is_re() -> None:
    assert ended(KilledBy.NONE, exit_code=3) == {
        "exitcode": "3",
        "status": "RE",
        "message": "Exited with error status 3",
    }


@pytest.mark.parametrize("killed_by", [KilledBy.NONE, KilledBy.SIGNAL])
def test_a_signal_is_sg(killed_by: KilledBy) -> None:
    assert ended(killed_by, signal=11) == {"exitsig": "11", "status": "SG", "message": "Caught fatal signal 11"}


@pytest.mark.parametrize(
    ("killed_by", "message"),
    [(KilledBy.WALL, "Time limit exceeded (wall clock)"), (KilledBy.CPU, "Time limit exceeded")],
)
@pytest.mark.parametrize("end", [{}, {"exit_code": 0}, {"signal": 9}])
def test_a_time_limit_is_to_however_the_program_ended(killed_by: KilledBy, message: str, end: dict[str, int]) -> None:
    assert ended(killed_by, **end) == {"status": "TO", "message": message, "killed": "1"}


def test_out_of_memory_is_told_by_its_own_key_beside_the_end() -> None:
    told = {"cg-oom-killed": "1", "message": "Memory limit exceeded"}
    assert ended(KilledBy.MEMORY, signal=9) == {**told, "exitsig": "9", "status": "SG"}
    assert ended(KilledBy.MEMORY, exit_code=1) == {**told, "exitcode": "1", "status": "RE"}
    # A child was killed and the program went on: isolate leaves the status out then.
    assert ended(KilledBy.MEMORY, exit_code=0) == {**told, "exitcode": "0"}
    assert ended(KilledBy.MEMORY) == {**told, "exitsig": "9", "status": "SG"}


@pytest.mark.parametrize(
    ("killed_by", "what"), [(KilledBy.PIDS, "Process"), (KilledBy.DISK, "Disk"), (KilledBy.OUTPUT, "Output")]
)
def test_other_limits_are_killed_unless_the_program_ended_by_itself(killed_by: KilledBy, what: str) -> None:
    message = {"message": f"{what} limit exceeded"}
    killed = {**message, "exitsig": "9", "status": "SG", "killed": "1"}
    assert ended(killed_by) == killed
    assert ended(killed_by, signal=9) == killed
    assert ended(killed_by, exit_code=2) == {**message, "exitcode": "2", "status": "RE"}


def test_a_dead_vm_is_xx() -> None:
    verdict = replace(CLEAN, exit_code=None, killed_by=KilledBy.VM_DIED, cpu_seconds=None, peak_memory_bytes=None)
    assert parse(verdict.to_meta()) == {
        "time": "0.750",
        "time-wall": "1.500",
        "status": "XX",
        "message": "The virtual machine died",
    }


def test_what_nobody_measured_is_left_out() -> None:
    verdict = replace(CLEAN, cpu_seconds=None, host_cpu_seconds=None, peak_memory_bytes=None)
    assert parse(verdict.to_meta()) == {"time-wall": "1.500", "exitcode": "0"}


def test_what_only_the_guest_says_is_marked() -> None:
    verdict = replace(CLEAN, exit_code=None, signal=9, killed_by=KilledBy.MEMORY, trusted=False)
    assert parse(verdict.to_meta())["message"] == "Memory limit exceeded, says the guest"


def test_a_run_ends_in_one_way() -> None:
    with pytest.raises(ValueError, match="status 0 and by signal 9"):
        replace(CLEAN, signal=9)


def test_json_has_every_field() -> None:
    assert json.loads(json.dumps(replace(CLEAN, killed_by=KilledBy.CPU, exit_code=None).to_json())) == {
        "exit_code": None,
        "signal": None,
        "killed_by": "cpu",
        "trusted": True,
        "wall_seconds": 1.5,
        "cpu_seconds": 0.25,
        "peak_memory_bytes": 3145728,
        "host_cpu_seconds": 0.75,
        "accelerator": "tcg",
    }


ENDS = st.one_of(
    st.just((None, None)),
    st.tuples(st.integers(0, 255), st.none()),
    st.tuples(st.none(), st.integers(1, 64)),
)
SECONDS = st.floats(0, 1e9)
BYTES = st.integers(0, 1 << 60)


@given(ENDS, st.sampled_from(KilledBy), st.booleans(), SECONDS, st.none() | SECONDS, st.none() | BYTES)
def test_every_verdict_is_in_the_grammar(
    end: tuple[int | None, int | None],
    killed_by: KilledBy,
    trusted: bool,
    wall: float,
    cpu: float | None,
    peak: int | None,
) -> None:
    verdict = Verdict(
        exit_code=end[0],
        signal=end[1],
        killed_by=killed_by,
        trusted=trusted,
        wall_seconds=wall,
        cpu_seconds=cpu,
        peak_memory_bytes=peak,
        host_cpu_seconds=cpu,
        accelerator="kvm",
    )
    meta = parse(verdict.to_meta())
    assert meta.keys() <= KEYS
    for key in ("time", "time-wall"):
        assert key not in meta or re.fullmatch(r"\d+\.\d{3}", meta[key])
    for key in ("max-rss", "cg-mem", "exitcode", "exitsig"):
        assert key not in meta or meta[key].isdecimal()
    assert meta.get("status") in (None, "RE", "SG", "TO", "XX")
    assert ("exitsig" in meta) == (meta.get("status") == "SG")
    assert ("exitcode" in meta) == (meta.get("status") in (None, "RE"))
    assert (meta.get("status") is None) == (meta.get("exitcode") == "0")
