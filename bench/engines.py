"""Engines: pods through containerd's CRI plugin, made as a kubelet makes them, with katapy and with runc.

One daemon, the one of the functional tests, has both as runtime handlers. A pod is a sandbox and one container in it,
and has started when the plugin has written the container's first line of output to its log.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple

from containers import DEADLINE, run_timed
from context import Bench
from figures import BenchError, Recorder, Unit
from memory import SETTLE, pod_memory, tree_memory

from katapy.client import launch
from katapy.client.observe import ShimClient

# The daemon and a client of its plugin.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests/functional"))

from containerd_daemon import CONTAINERD, CTR, IMAGE, SHIM, Containerd
from cri import Cri, load_messages, start_plugin

_CNI: Final = Path("/usr/lib/cni/ptp")
_RUNC_SHIM: Final = Path("/usr/bin/containerd-shim-runc-v2")
_KATAPY: Final = "katapy"
_RUNC: Final = "runc"
_HANDLERS: Final = (_KATAPY, _RUNC)
_STEPS: Final = ("RunPodSandbox", "CreateContainer", "StartContainer", "its first line")
_LINE: Final = "here"
# What the shim notes of its answers to the engine.
_ANSWERS: Final = ("answer Create", "answer Start")


class Pod(NamedTuple):
    """A pod that runs: the ids of its sandbox and of its container."""

    sandbox: str
    container: str


def measure(bench: Bench) -> Recorder:
    """Measure the group."""
    recorder = Recorder("engines")
    if missing := [path for path in (CONTAINERD, CTR, _CNI, _RUNC_SHIM) if not path.exists()]:
        recorder.note(f"not measured: {missing[0]} is missing: scripts/setup bench-tools")
        return recorder
    directory = bench.directory / "engines"
    directory.mkdir()
    with start_plugin(directory, bench.bundles.rootfs) as daemon, _client(daemon) as cri:
        for handler in _HANDLERS:
            with _pod(cri, daemon, handler):
                pass  # the template is made, and all that it takes is in memory
        for _ in range(bench.plan.runs):
            for handler in _HANDLERS:
                _measure_start(recorder, bench, cri, daemon, handler)
        for handler in _HANDLERS:
            _measure_memory(recorder, cri, daemon, handler, bench.plan.engine_pods)
    return recorder


@contextmanager
def _client(daemon: Containerd) -> Iterator[Cri]:
    import grpc

    with grpc.insecure_channel(f"unix://{daemon.directory}/containerd.sock") as channel:
        yield Cri(channel, load_messages(daemon.directory), IMAGE)


@contextmanager
def _pod(cri: Cri, daemon: Containerd, handler: str, took: dict[str, float] | None = None) -> Iterator[Pod]:
    """Run a pod while the context lasts; ``took`` gets the seconds of each step of its start."""
    took = {} if took is None else took
    name = f"pod{time.monotonic_ns()}"
    config = cri.pod_config(name, daemon.directory)
    with ExitStack() as stack:
        times = [time.time()]
        sandbox = cri.run_pod(config, handler)
        stack.callback(cri.pod, "RemovePodSandbox", sandbox)
        stack.callback(cri.pod, "StopPodSandbox", sandbox)
        times.append(time.time())
        container = cri.create(sandbox, config, name, ("sh", "-c", f"echo {_LINE}; exec sleep 100000"))
        times.append(time.time())
        cri.container("StartContainer", container)
        times.append(time.time())
        # It may have come before the answer to StartContainer.
        times.append(max(times[-1], _first_line(daemon.directory / f"{name}.log")))
        took.update(zip(_STEPS, (end - start for start, end in pairwise(times)), strict=True))
        yield Pod(sandbox, container)


def _first_line(log: Path) -> float:
    """Return when the plugin has read the first line of output, in seconds since 1970; it writes that beside it."""
    deadline = time.monotonic() + DEADLINE
    while not (log.exists() and (text := log.read_text()).endswith("\n")):
        if time.monotonic() > deadline:
            raise BenchError(f"{log} stays empty")
        time.sleep(0.001)
    return parse_first_line(text)


def parse_first_line(log: str) -> float:
    """Return when the first line of a container's log was read, in seconds since 1970. Raises BenchError.

    Source: Kubernetes, CRI logging format: time (RFC 3339), stream, tag and what was printed.
    """
    try:
        stamp, _stream, _tag, line = log.splitlines()[0].split(" ", 3)
        read = datetime.fromisoformat(stamp).timestamp()
    except (ValueError, IndexError) as error:
        raise BenchError(f"cannot read the log of a container: {log[:100]!r}") from error
    if line != _LINE:
        raise BenchError(f"a container has printed {line[:100]!r}, not {_LINE!r}")
    return read


def _measure_start(recorder: Recorder, bench: Bench, cri: Cri, daemon: Containerd, handler: str) -> None:
    took: dict[str, float] = {}
    with _pod(cri, daemon, handler, took) as pod:
        whole = f"pod to its first line, {handler}"
        recorder.add(whole, sum(took.values()), beside=f"pod to its first line, {_RUNC}")
        for step, seconds in took.items():
            recorder.add(f"{whole}: {step}", seconds, beside=f"pod to its first line, {_RUNC}: {step}")
        started = _time_shim(bench, handler)
        recorder.add(f"shim start, {handler}", started, beside=f"shim start, {_RUNC}")
        if handler == _KATAPY:
            ours = started + _answering(daemon, pod)
            recorder.add(f"{whole}: of that katapy's shim", ours, beside=whole)
            recorder.add(f"{whole}: of that containerd and CNI", sum(took.values()) - ours, beside=whole)
        began = time.monotonic()
        if cri.execute(pod.container, "true")[0] != 0:
            raise BenchError(f"true fails in a container of {handler}")
        recorder.add(f"ExecSync true, {handler}", time.monotonic() - began, beside=f"ExecSync true, {_RUNC}")
        began = time.monotonic()
    recorder.add(f"stop and remove, {handler}", time.monotonic() - began, beside=f"stop and remove, {_RUNC}")


def _answering(daemon: Containerd, pod: Pod) -> float:
    """Return for how many seconds containerd has waited for the shim's answers that made this pod."""
    with launch.connect(daemon.root / pod.sandbox) as client:
        phases = ShimClient(client).timing()
    return sum(phase.end - phase.start for phase in phases if phase.name in _ANSWERS)


def _time_shim(bench: Bench, handler: str) -> float:
    """Return how many seconds the start of a shim takes, which the engine waits for; it is ended at once."""
    bundle = bench.bundles.make("true")
    program = SHIM if handler == _KATAPY else _RUNC_SHIM
    flags = ["-namespace", "bench", "-address", f"{bench.directory}/engines.sock", "-publish-binary", "/bin/true"]
    argv: list[str | Path] = [program, *flags, "-id", bundle.name]
    began = time.monotonic()
    done = subprocess.run([*argv, "start"], stdin=subprocess.DEVNULL, capture_output=True, cwd=bundle, timeout=DEADLINE)
    took = time.monotonic() - began
    if done.returncode:
        raise BenchError(f"{program}: {done.stderr.decode(errors='replace')}")
    if handler == _KATAPY:
        run_timed([*argv, "-bundle", bundle, "delete"])
    else:
        # One that nobody has asked for anything may have ended by itself.
        if (shim := _find_runc_shim(bundle.name)) is not None:
            os.kill(shim, signal.SIGKILL)
        Path(done.stdout.decode().strip().removeprefix("unix://")).unlink(missing_ok=True)
    return took


def _measure_memory(recorder: Recorder, cri: Cri, daemon: Containerd, handler: str, counts: tuple[int, ...]) -> None:
    """Measure what a pod takes when it is alone, and one of many; it has a sandbox and a container."""
    with ExitStack() as stack:
        pods: list[Pod] = []
        for count in counts:
            pods += [stack.enter_context(_pod(cri, daemon, handler)) for _ in range(count - len(pods))]
            time.sleep(SETTLE)
            name = "memory of {}, {} alive"
            for pod in pods:
                recorder.add(
                    name.format(handler, count),
                    _memory(daemon, handler, pod),
                    beside=name.format(_RUNC, count),
                    unit=Unit.BYTES,
                )


def _memory(daemon: Containerd, handler: str, pod: Pod) -> int:
    """Return the PSS in bytes of a pod's shim and of all that it has started."""
    if handler == _KATAPY:
        return pod_memory(daemon.root, pod.sandbox).total()
    shim = _find_runc_shim(pod.sandbox)
    if shim is None:
        raise BenchError(f"{_RUNC_SHIM.name} of {pod.sandbox} has gone")
    return tree_memory({shim: "shim"}).total()


def _find_runc_shim(container_id: str) -> int | None:
    """Return the pid of the shim of runc that was started for a container, if it is alive."""
    wanted = f"\0-id\0{container_id}\0".encode()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            line = entry.read_bytes()
            if line.startswith(bytes(_RUNC_SHIM)) and wanted in line:
                return int(entry.parent.name)
    return None
