"""SIGKILL and SIGSTOP for what a pod runs on, and for containerd: the CRI tells the truth, and nothing is left."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from containerd_daemon import Containerd
from cri import EXITED, MISSING, RUNNING, SLEEP, Cri, own_network, pod, start_client, start_plugin, state
from harness import await_true

pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
# Not more often: each line starts a program, and there are ten of them on an emulated machine.
COUNT = ("sh", "-c", "i=0; while true; do i=$((i+1)); echo $i; sleep 0.2; done")


@dataclass
class Plugin:
    """A daemon that may be killed, and a client of it, which is another one after each start."""

    daemon: Containerd
    messages: object

    def restart(self) -> None:
        """Kill the daemon, and start it again; it serves the CRI once it has found what there is."""
        self.daemon.stop(signal.SIGKILL)
        self.daemon.start()
        with start_client(self.daemon, self.messages) as cri:
            await_true(lambda: serves(cri))

    def __call__(self, do: Callable[[Cri], object]) -> None:
        """Do something; whether it succeeds is the moment's affair."""
        with start_client(self.daemon, self.messages) as cri, suppress(grpc.RpcError):
            do(cri)


def serves(cri: Cri) -> bool:
    """Tell whether the plugin answers."""
    with suppress(grpc.RpcError):
        cri.pods()
        return True
    return False


@pytest.fixture(scope="module")
def _networks() -> None:
    """Have what the first network namespace of a name leaves for all others, which is not a test's."""
    with own_network():
        pass


@pytest.fixture
def plugin(busybox: Path, cri_messages: object, _networks: None, host: None) -> Iterator[Plugin]:
    with tempfile.TemporaryDirectory(prefix="katapy-") as name, start_plugin(Path(name), busybox) as containerd:
        yield Plugin(containerd, cri_messages)
        assert list(containerd.root.iterdir()) == []


VICTIMS = ("shim", "QEMU", "virtiofsd", "containerd")
VERBS = ("run", "create", "start", "exec", "stop")
# For each verb and each victim; all of them are the long test's.
FEW = (("QEMU", "create"), ("containerd", "start"), ("shim", "exec"), ("virtiofsd", "stop"))


def strike(plugin: Plugin, tmp_path: Path, victim: str, verb: str, moment: float) -> None:
    """Kill something ``moment`` seconds after a verb has begun; see the truth, and remove the pod."""
    with ThreadPoolExecutor(1) as threads:
        with start_client(plugin.daemon, plugin.messages) as cri:
            config = cri.pod_config("p1", tmp_path)
            known = {path.name for path in plugin.daemon.root.iterdir()}
            if verb != "run":
                sandbox = cri.run_pod(config)
            if verb in ("start", "exec", "stop"):
                container = cri.create(sandbox, config, "c1", SLEEP)
            if verb in ("exec", "stop"):
                cri.container("StartContainer", container)
        verbs: dict[str, Callable[[Cri], object]] = {
            "run": lambda cri: cri.run_pod(config),
            "create": lambda cri: cri.create(sandbox, config, "c1", SLEEP),
            "start": lambda cri: cri.container("StartContainer", container),
            "exec": lambda cri: cri.execute(container, "sleep", "5"),
            "stop": lambda cri: cri.stop(container),
        }
        doing = threads.submit(plugin, verbs[verb])
        if verb == "run":
            await_true(lambda: bool(begun(plugin.daemon, known, victim)))
            sandbox = begun(plugin.daemon, known, victim)
        time.sleep(moment)
        if victim == "containerd":
            plugin.restart()
        else:
            end(plugin.daemon, sandbox, victim)
        doing.result()
    with start_client(plugin.daemon, plugin.messages) as cri:
        for left in [left for name, left in cri.pods().items() if name == "p1"]:
            if verb in ("exec", "stop"):
                check(cri, plugin.daemon, container, victim)
            cri.pod("StopPodSandbox", left)
            cri.pod("RemovePodSandbox", left)
        await_true(lambda: {path.name for path in plugin.daemon.root.iterdir()} == known)


def check(cri: Cri, daemon: Containerd, container: str, victim: str) -> None:
    """See that a container is said to run only while it does, or until the plugin has taken in that it has ended."""
    if victim != "containerd":
        await_true(lambda: state(cri, container)[0] == EXITED)
    await_true(lambda: state(cri, container)[0] != RUNNING or answers(cri, container))
    found = state(cri, container)
    # 255 is the plugin's own word for what it could not hear from a shim.
    assert found[0] == RUNNING or found in ((EXITED, 137), (EXITED, 255))


def answers(cri: Cri, container: str) -> bool:
    """Tell whether a container does what a running one does."""
    with suppress(grpc.RpcError):
        return cri.execute(container, "echo", "alive")[1] == "alive\n"
    return False


def begun(daemon: Containerd, known: set[str], victim: str) -> str:
    """Return the id of a pod that is being made, once the victim is there."""
    for path in daemon.root.iterdir():
        if path.name not in known and not path.name.startswith("~"):
            with suppress(FileNotFoundError):
                saved = daemon.saved(path.name)
                if victim in (saved["shim"]["name"], "containerd", *(each["name"] for each in saved["helpers"])):
                    return path.name
    return ""


def end(daemon: Containerd, sandbox: str, victim: str) -> None:
    """Kill one of the processes of a pod, which may have ended."""
    with suppress(FileNotFoundError, ProcessLookupError, StopIteration):
        os.kill(daemon.shim(sandbox) if victim == "shim" else daemon.helper(sandbox, victim), signal.SIGKILL)


def matrix(plugin: Plugin, tmp_path: Path, cases: Iterator[tuple[str, str, float]]) -> None:
    """Strike at each of the moments, beside pods that are not to notice anything."""
    with witnesses(plugin, tmp_path, 2) as answer:
        for victim, verb, moment in cases:
            strike(plugin, tmp_path, victim, verb, moment)
            answer()


@contextmanager
def witnesses(plugin: Plugin, tmp_path: Path, count: int) -> Iterator[Callable[[], None]]:
    """Run pods that write all the time; what is yielded sees that they do, and answer. At the end no line is lost."""
    names = [f"w{number}" for number in range(count)]
    with start_client(plugin.daemon, plugin.messages) as cri, ThreadPoolExecutor(4) as threads:

        def run(name: str) -> tuple[str, str]:
            config = cri.pod_config(name, tmp_path)
            sandbox = cri.run_pod(config)
            return sandbox, cri.start(sandbox, config, name, *COUNT)

        pods = list(threads.map(run, names))

    def answer() -> None:
        lines = {name: len(written(tmp_path, name)) for name in names}
        with start_client(plugin.daemon, plugin.messages) as cri:
            for name, (_, container) in zip(names, pods, strict=True):
                assert cri.execute(container, "echo", "alive")[1] == "alive\n"
                await_true(lambda name=name: len(written(tmp_path, name)) > lines[name])  # type: ignore[misc]

    yield answer
    with start_client(plugin.daemon, plugin.messages) as cri:
        for sandbox, _ in pods:
            cri.pod("StopPodSandbox", sandbox)
            cri.pod("RemovePodSandbox", sandbox)
    for name in names:
        numbers = written(tmp_path, name)
        assert numbers == [str(number + 1) for number in range(len(numbers))], name


def written(tmp_path: Path, name: str) -> list[str]:
    """Return what a container has written, without what the CRI adds."""
    return [line.split()[-1] for line in (tmp_path / f"{name}.log").read_text().splitlines()]


def test_killed_in_the_middle(plugin: Plugin, tmp_path: Path) -> None:
    """Each of the processes, in one of the verbs; also containerd, with three pods."""
    matrix(plugin, tmp_path, ((victim, verb, 0.05) for victim, verb in FEW))


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("victim", VICTIMS)
def test_killed_at_many_moments(plugin: Plugin, tmp_path: Path, victim: str) -> None:
    moments = (0, 0.02, 0.05, 0.1, 0.2, 0.4)
    matrix(plugin, tmp_path, ((victim, verb, moment) for verb in VERBS for moment in moments))


def test_pods_that_do_not_answer(cri: Cri, cri_daemon: Containerd, tmp_path: Path) -> None:
    """SIGKILL for one container of a VM that does not answer ends all of the pod; another pod never notices."""
    with pod(cri, tmp_path, "p2") as (other, config):
        witness = cri.start(other, config, "w1", *SLEEP)
        with pod(cri, tmp_path) as (sandbox, config):
            containers = [cri.start(sandbox, config, name, *SLEEP) for name in ("c1", "c2")]
            os.kill(cri_daemon.helper(sandbox, "QEMU"), signal.SIGSTOP)
            began = time.monotonic()
            assert {state(cri, each)[0] for each in containers} == {RUNNING}
            found = cri.call("ListContainerStats", cri.messages.ListContainerStatsRequest()).stats
            assert witness in {each.attributes.id for each in found}
            assert time.monotonic() - began < 30
            cri.stop(containers[0], 1)
            assert time.monotonic() - began < 60
            for container in containers:
                await_true(lambda container=container: state(cri, container) == (EXITED, 137))  # type: ignore[misc]
        assert cri.execute(witness, "echo", "alive")[1] == "alive\n"


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_containerd_is_started_again_with_ten_pods(plugin: Plugin, tmp_path: Path) -> None:
    with witnesses(plugin, tmp_path, 10) as answer:
        for _ in range(3):
            plugin.restart()
            answer()
