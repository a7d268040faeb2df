"""The VM of a sandbox as its caller sees it: the shim that holds it, the facts that only the host knows, its end."""

from __future__ import annotations

import json
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from katapy.client.leftovers import finish, gone
from katapy.client.pod import Launch, Pod
from katapy.errors import InvalidState, KatapyError, NotFound, NotStarted, Timeout, Unavailable
from katapy.oci.bundle import CONFIG, Bundle, load_bundle
from katapy.sdk.process import host_cpu_seconds
from katapy.state import ProcessRef, scratch
from katapy.storage.layer import DIRECTORY

if TYPE_CHECKING:
    from katapy.sdk.pool import Lease

_QEMU: Final = "QEMU"
# Below that nothing can be written any more.
_FULL_BYTES: Final = 8192
BUSYBOX: Final = "/bin/busybox"


class Vm:
    """A running VM with a container that holds it."""

    def __init__(self, launch: Launch, sandbox_id: str, pod: Pod, end: Callable[[], object]) -> None:
        """Take over one that was started; ``end`` removes it. Raises KatapyError."""
        self.launch, self.id = launch, sandbox_id
        self._pod, self._end = pod, end
        self._ended = False
        self._lock = threading.Lock()
        state = pod.state()
        self.accelerator = state.accelerator
        self._qemu = next(each for each in state.helpers if each.name == _QEMU)
        self._root = self._open_root(state.shim)

    @classmethod
    def start(cls, launch: Launch, document: Mapping[str, Any]) -> Vm:
        """Start one; ``document`` is the config.json of what holds it. Raises KatapyError; nothing is left then."""
        sandbox_id = f"sandbox-{secrets.token_hex(6)}"
        with written(launch.root, document) as bundle:
            pod = Pod.begin(launch, sandbox_id, bundle)
            try:
                pod.create(bundle, streams=False)
                pod.start()
                return cls(launch, sandbox_id, pod, pod.discard)
            except BaseException:
                pod.discard()
                raise

    @classmethod
    def take(cls, launch: Launch, lease: Lease) -> Vm:
        """Take over one of a pool's. Raises KatapyError, and the pool removes it."""
        try:
            pod = Pod.connect(launch.root, lease.id)
            try:
                return cls(launch, lease.id, pod, lease.close)
            except BaseException:
                pod.close()
                raise
        except BaseException:
            lease.close()
            raise

    def begin(self, container_id: str, bundle: Bundle) -> Pod:
        """Make the state of one more container. Raises KatapyError."""
        return Pod.begin(self.launch, container_id, bundle)

    def connect(self, container_id: str) -> Pod:
        """Connect to the shim of a container. Raises NotFound or Unavailable."""
        return Pod.connect(self.launch.root, container_id)

    @property
    def root(self) -> int:
        """The descriptor of the root file system with its writable layer. Raises InvalidState once it was closed."""
        if self._root < 0:
            raise InvalidState(f"{self.id} is closed")
        return self._root

    def cpu_seconds(self) -> float | None:
        """Return the CPU time that QEMU has taken."""
        return host_cpu_seconds(self._qemu.pid) if self._qemu.alive() else None

    def alive(self) -> bool:
        """Tell whether QEMU runs."""
        return self._qemu.alive()

    def kill(self) -> None:
        """End QEMU at once."""
        if (fd := self._qemu.open()) is not None:
            try:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(fd, signal.SIGKILL)
            finally:
                os.close(fd)

    def await_end(self, seconds: float) -> bool:
        """Tell whether QEMU has ended, or does within so many seconds."""
        return gone(self._qemu, seconds)

    def is_full(self) -> bool:
        """Tell whether its writable layer is."""
        facts = os.statvfs(self.root)
        return facts.f_bavail * facts.f_bsize < _FULL_BYTES or facts.f_favail == 0

    def close(self) -> None:
        """End the VM and all that is in it, and wait until nothing is left. Idempotent."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
        root, self._root = self._root, -1
        os.close(root)
        self._end()
        self._pod.close()

    def _open_root(self, shim: ProcessRef | None) -> int:
        """Open the writable layer, which is mounted in the shim's mount namespace and nowhere else."""
        if shim is None:
            raise Unavailable(f"{self.id} has no shim")
        directory = self.launch.root / self.id / DIRECTORY / "0" / "root"
        try:
            fd = os.open(f"/proc/{shim.pid}/root{directory}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise Unavailable(f"cannot open the files of {self.id}: {error.strerror}") from error
        if not shim.alive():
            os.close(fd)
            raise Unavailable(f"the shim of {self.id} died")
        return fd


@contextmanager
def written(root: Path, document: Mapping[str, Any]) -> Iterator[Bundle]:
    """Write a config.json below the state directory ``root`` and load it; it is gone when the context ends, by when the
    shim has read it.
    """
    with scratch(str(root)) as directory:
        Path(directory, CONFIG).write_text(json.dumps(document))
        yield load_bundle(directory)


@contextmanager
def starting(what: str) -> Iterator[None]:
    """Turn what is nobody's fault into NotStarted; what the caller gave stays what it is."""
    try:
        yield
    except (Unavailable, Timeout) as error:
        raise NotStarted(f"{what} could not start: {error}") from error
    except OSError as error:
        # No descriptor or no process is left, a disk is full.
        where = f": {error.filename}" if error.filename else ""
        raise NotStarted(f"{what} could not start: {error.strerror or error}{where}") from error


def find_busybox() -> str:
    """Return the static busybox of the host, which waits in the VM while nothing runs. Raises NotFound."""
    if not os.access(BUSYBOX, os.X_OK):
        raise NotFound(f"{BUSYBOX} is missing: apt-get install busybox-static")
    return BUSYBOX


def forget(vm: Vm, container_id: str) -> None:
    """Remove a container that has ended, or did not come to run. Where its shim has died, only its state is left."""
    with suppress(KatapyError), vm.connect(container_id) as pod:
        pod.remove(force=True)
    with suppress(KatapyError):
        finish(vm.launch.root, container_id)
