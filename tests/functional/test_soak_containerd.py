"""Many pods and tasks of one containerd: every one comes up, and of none anything is left. `make soak`."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from containerd_daemon import IMAGE, Containerd
from cri import MISSING, SLEEP, Cri
from ctr import sockets
from harness import DEADLINE, await_true, descendants

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]
PODS, TASKS = 50, 20


def held(daemon: Containerd) -> dict[str, int]:
    """Count what could pile up in a daemon and in its network namespace; the rest the fixtures look after."""
    assert daemon.process is not None
    pid = daemon.process.pid
    return {
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "interfaces": len(Path(f"/proc/{pid}/net/dev").read_text().splitlines()),
        "sockets": len(sockets(daemon)),
    }


def settle(daemon: Containerd, before: dict[str, int]) -> None:
    """Wait until a daemon holds no more than it did."""
    deadline = time.monotonic() + DEADLINE
    while more := {name: count for name, count in held(daemon).items() if count > before[name]}:
        assert time.monotonic() < deadline, (before, more)
        time.sleep(0.1)


def memory(pids: list[int]) -> int:
    """Return how many bytes of memory processes have, what is shared divided among those that share it."""
    total = 0
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


def test_fifty_pods(cri: Cri, cri_daemon: Containerd, tmp_path: Path) -> None:
    """Four at a time; then all run at once, each answers, and all are removed."""

    def run(number: int) -> tuple[str, str]:
        config = cri.pod_config(f"p{number}", tmp_path)
        sandbox = cri.run_pod(config)
        return sandbox, cri.start(sandbox, config, f"c{number}", *SLEEP)

    def remove(sandbox: str) -> None:
        cri.pod("StopPodSandbox", sandbox)
        cri.pod("RemovePodSandbox", sandbox)

    known = descendants()
    # What the first pod makes that stays is the daemon's.
    remove(run(PODS)[0])
    before = held(cri_daemon)

    with ThreadPoolExecutor(4) as threads:
        began = time.monotonic()
        pods = list(threads.map(run, range(PODS)))
        up = time.monotonic()
        answers = list(threads.map(lambda pod: cri.execute(pod[1], "hostname")[1], pods))
        answered = time.monotonic()
        networks = [cri_daemon.saved(sandbox)["network"] for sandbox, _ in pods]
        used = memory([pid for pid in descendants() if pid not in known])
        list(threads.map(remove, [sandbox for sandbox, _ in pods]))
        gone = time.monotonic()
    print(
        f"{PODS} pods: up in {up - began:.1f} s, answered in {answered - up:.1f} s, "
        f"removed in {gone - answered:.1f} s; {used / PODS / (1 << 20):.0f} MiB each"
    )
    assert answers == [f"p{number}\n" for number in range(PODS)]
    assert not [path for path in networks if os.path.exists(path)]
    settle(cri_daemon, before)


def test_twenty_tasks_at_once(containerd: Containerd) -> None:
    """All are begun in one moment."""
    known, before = descendants(), held(containerd)
    names = [f"c{number}" for number in range(TASKS)]
    began = time.monotonic()
    with ThreadPoolExecutor(TASKS) as threads:
        outputs = list(threads.map(lambda name: containerd.run("--rm", IMAGE, name, "echo", name).out, names))
    print(f"{TASKS} tasks in {time.monotonic() - began:.1f} s")
    assert outputs == [f"{name}\n" for name in names]
    await_true(lambda: not [pid for pid, name in descendants().items() if pid not in known and "katapy" in name])
    settle(containerd, before)
