"""containerd as the functional tests run it: a daemon with everything that it keeps below one directory."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import Done
from harness import DEADLINE, KATAPY, descendants

CONTAINERD = Path("/usr/bin/containerd")
CTR = Path("/usr/bin/ctr")
SHIM = KATAPY.with_name("containerd-shim-katapy-v2")
IMAGE = "localhost/busybox:test"
RUNTIME = "io.containerd.katapy.v2"
# By its name are cgroups made: other tests may run at the same time.
NAMESPACE = f"katapy-{os.getpid()}"
CONFIG = """
version = 2
root = "{directory}/root"
state = "{directory}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = "{directory}/containerd.sock"
[debug]
level = "debug"
"""


@dataclass
class Containerd:
    """A daemon that runs, in the network namespace ``network``; ``namespace`` is containerd's own notion."""

    directory: Path
    process: subprocess.Popen[bytes] | None = None
    namespace: str = NAMESPACE
    network: str = ""

    @property
    def env(self) -> dict[str, str]:
        """The environment of the daemon, which is that of its shims, and of its clients."""
        config = os.environ.get("KATAPY_CONFIG")
        return {
            "PATH": f"{SHIM.parent}:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.directory),
            "CONTAINERD_ADDRESS": f"{self.directory}/containerd.sock",
            "CONTAINERD_NAMESPACE": self.namespace,
            **({"KATAPY_CONFIG": config} if config else {}),
        }

    @property
    def root(self) -> Path:
        """The state directories of katapy's containers."""
        return self.directory / "katapy" / self.namespace

    @property
    def bundles(self) -> Path:
        """The bundles of containers, each by its id, that containerd has shims for."""
        return self.directory / "state/io.containerd.runtime.v2.task" / self.namespace

    @property
    def log(self) -> str:
        """What the daemon has logged."""
        return (self.directory / "containerd.log").read_text(errors="replace")

    def __call__(
        self, *args: str | Path, stdin: str | None = None, check: bool = True, timeout: float = DEADLINE
    ) -> Done:
        """Run ``ctr`` to its end."""
        done = subprocess.run(
            [CTR, *map(str, args)],
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=timeout,
            env=self.env,
        )
        assert not check or done.returncode == 0, f"{args}: status {done.returncode}: {done.stderr}"
        return Done(done.returncode, done.stdout, done.stderr)

    def run(self, *args: str | Path, stdin: str | None = None, check: bool = True) -> Done:
        """Run ``ctr run`` with katapy: options, then IMAGE, the container's id and its command."""
        return self("run", "--runtime", RUNTIME, *args, stdin=stdin, check=check)

    def start(self) -> None:
        """Start the daemon and wait until it answers. Raises RuntimeError with its last words where it does not."""
        with (self.directory / "containerd.log").open("ab") as log:
            # Not `ip netns exec`, which hides /sys/fs/cgroup.
            command = ["nsenter", f"--net=/run/netns/{self.network}", "--"] if self.network else []
            command += [str(CONTAINERD), "--config", f"{self.directory}/config.toml"]
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.env)
        deadline = time.monotonic() + DEADLINE
        while self("version", check=False).status:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"containerd does not start: {' | '.join(self.log.splitlines()[-3:])}")
            time.sleep(0.05)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End the daemon; containers live on."""
        process, self.process = self.process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def shim(self, container_id: str) -> int:
        """Return the pid of the shim of a container."""
        return int(self.saved(container_id)["shim"]["pid"])

    def helper(self, container_id: str, program: str) -> int:
        """Return the pid of one of the processes that a container's VM runs on."""
        return int(next(each["pid"] for each in self.saved(container_id)["helpers"] if each["name"] == program))

    def saved(self, container_id: str) -> dict[str, Any]:
        """Return what katapy has saved of a container."""
        state: dict[str, Any] = json.loads((self.root / container_id / "state.json").read_text())
        return state


@contextlib.contextmanager
def start_containerd(
    directory: Path, rootfs: Path, config: str = CONFIG, *, network: str = "", namespace: str = NAMESPACE
) -> Iterator[Containerd]:
    """Run a daemon with an image of ``rootfs``, IMAGE; nothing of it is left afterwards.

    Raises RuntimeError with the last words of a daemon that does not start.
    """
    containerd = Containerd(directory, namespace=namespace, network=network)
    (directory / "config.toml").write_text(config.format(directory=directory))
    known = descendants()
    try:
        containerd.start()
        archive = directory / "image.tar"
        write_image(archive, rootfs)
        containerd("images", "import", "--no-unpack", archive)
        yield containerd
    finally:
        containerd.stop()
        # The shims of containers that a failed test has left.
        for pid in descendants().keys() - known.keys():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for top in (Path("/sys/fs/cgroup"), *Path("/sys/fs/cgroup").iterdir()):
            with contextlib.suppress(OSError):
                (top / containerd.namespace).rmdir()
        shutil.rmtree(directory / "state", ignore_errors=True)


def write_image(archive: Path, rootfs: Path, name: str = IMAGE, command: tuple[str, ...] = ("sh",)) -> None:
    """Write an image of one layer, the directory ``rootfs``, as an archive (OCI image-spec, image-layout.md)."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        tar.add(rootfs, ".")
    blobs: dict[str, bytes] = {}

    def blob(data: bytes, kind: str) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}

    def document(content: object, kind: str) -> dict[str, object]:
        return blob(json.dumps(content).encode(), f"{kind}.v1+json")

    described = blob(layer.getvalue(), "layer.v1.tar")
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Cmd": list(command), "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [described["digest"]]},
    }
    manifest = document({"schemaVersion": 2, "config": document(config, "config"), "layers": [described]}, "manifest")
    manifest["annotations"] = {"io.containerd.image.name": name}
    files = {f"blobs/sha256/{digest}": data for digest, data in blobs.items()}
    files["oci-layout"] = b'{"imageLayoutVersion": "1.0.0"}'
    files["index.json"] = json.dumps({"schemaVersion": 2, "manifests": [manifest]}).encode()
    with tarfile.open(archive, "w") as tar:
        for path, data in files.items():
            member = tarfile.TarInfo(path)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
