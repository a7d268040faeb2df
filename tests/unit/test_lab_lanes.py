"""Two labs side by side: all that is selected runs in one of them, and what one says and does is not lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import lanes
import pytest
from features import FEATURES, HARDWARE


def test_each_test_is_in_one_lane() -> None:
    selected = {lane: {test for run in lanes.runs_of(lane)[:1] for test in run.selected} for lane in lanes.LANES}
    first, second = selected.values()
    assert not first & second
    assert first | second == {test for tests in (FEATURES | HARDWARE).values() for test in tests}
    again = [run for lane in lanes.LANES for run in lanes.runs_of(lane) if run.vsock == "user"]
    assert len(again) == 1
    assert set(again[0].selected) < first | second


@pytest.mark.parametrize(("statuses", "expected"), [((0, 0), 0), ((0, 3), 3), ((-9, 0), -9), ((1, 0), 1)])
def test_both_are_waited_for(
    capfdbinary: pytest.CaptureFixture[bytes], statuses: tuple[int, int], expected: int
) -> None:
    script = f"""
import os, sys
lane = sys.argv[1].partition("=")[2]
print(lane, *sys.argv[2:], flush=True)
print("error of", lane, file=sys.stderr)
status = dict(zip({lanes.LANES}, {statuses}))[lane]
os.kill(os.getpid(), -status) if status < 0 else sys.exit(status)
"""
    assert lanes.run_beside([sys.executable, "-u", "-c", script], ["--release", "x"]) == expected
    lines = capfdbinary.readouterr().out.decode().splitlines()
    for lane in lanes.LANES:
        said = [line.partition("| ")[2] for line in lines if line.partition(" ")[0] == lane]
        assert said == [f"{lane} --release x", f"error of {lane}"]


def test_they_end_with_what_waits_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt reaches both, and nothing is left."""
    waited_for, wait = threading.Event(), subprocess.Popen.wait

    def noted(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        waited_for.set()
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", noted)
    fifo = tmp_path / "pids"
    os.mkfifo(fifo)
    said = os.open(fifo, os.O_RDWR)
    script = f"import os, signal; open({str(fifo)!r}, 'w').write(f'{{os.getpid()}}\\n'); signal.pause()"
    found = bytearray()

    def interrupt() -> None:
        while found.count(b"\n") < len(lanes.LANES):
            found.extend(os.read(said, 100))
        waited_for.wait()
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        lanes.run_beside([sys.executable, "-c", script], [])
    thread.join()
    os.close(said)
    assert len(found.split()) == len(lanes.LANES)
    for pid in found.split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
