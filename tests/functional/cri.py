"""What Kubernetes says to containerd: a daemon with its CRI plugin, and a client.

The messages are generated from cri.proto when a test needs them.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from containerd_daemon import CTR, IMAGE, Containerd, start_containerd, write_image
from harness import DEADLINE, await_true, descendants

PLUGINS = Path("/usr/lib/cni")
MISSING = "" if CTR.exists() and (PLUGINS / "ptp").exists() else "containerd or CNI's plugins are not installed"
"""Why there is no daemon to test with."""
HANDLER = "katapy"
RUNNING, EXITED = 1, 2
SLEEP = ("sleep", "1000")
PAUSE = "localhost/pause:test"
CONFIG = """
version = 2
root = "{directory}/root"
state = "{directory}/state"
[grpc]
address = "{directory}/containerd.sock"
[debug]
level = "debug"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "%(pause)s"
restrict_oom_score_adj = true
disable_hugetlb_controller = true
stream_server_port = "0"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{directory}/cni"
[plugins."io.containerd.grpc.v1.cri".containerd]
default_runtime_name = "%(handler)s"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.%(handler)s]
runtime_type = "io.containerd.katapy.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
""" % {"pause": PAUSE, "handler": HANDLER}  # noqa: UP031 - braces are for the directory
NETWORK = """{{
  "cniVersion": "0.4.0", "name": "katapy-test",
  "plugins": [
    {{"type": "ptp", "ipMasq": false, "ipam": {{
      "type": "host-local", "subnet": "10.79.0.0/24", "dataDir": "{directory}/ipam", "routes": [{{"dst": "0.0.0.0/0"}}]
    }}}}
  ]
}}"""


@contextmanager
def start_plugin(directory: Path, rootfs: Path) -> Iterator[Containerd]:
    """Run a daemon with the plugin, in a network namespace of its own, as ``start_containerd`` does.

    It serves, and knows the images: of those that are imported it hears some time later.
    """
    with own_network() as network:
        (directory / "cni").mkdir()
        (directory / "cni/10-test.conflist").write_text(NETWORK.format(directory=directory))
        with start_containerd(directory, rootfs, CONFIG, network=network, namespace="k8s.io") as containerd:
            write_image(directory / "pause.tar", rootfs, PAUSE, SLEEP)
            containerd("images", "import", "--no-unpack", directory / "pause.tar")
            with start_client(containerd, load_messages(directory)) as client:
                await_true(lambda: client.knows(IMAGE, PAUSE))
            yield containerd


@contextmanager
def own_network() -> Iterator[str]:
    """Have a network namespace, so that what CNI makes is not the host's, and yield its name."""
    name = f"katapy-cri-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


@contextmanager
def start_client(daemon: Containerd, messages: Any) -> Iterator[Cri]:
    """Give a client."""
    with grpc.insecure_channel(f"unix://{daemon.directory}/containerd.sock") as channel:
        yield Cri(channel, messages, IMAGE)


@contextmanager
def connect(daemon: Containerd, messages: Any) -> Iterator[Cri]:
    """Give a client; afterwards there is no pod, and nothing of one."""
    known = descendants()
    with start_client(daemon, messages) as client:
        yield client
    assert list(daemon.root.iterdir()) == [], "state left behind"
    await_true(lambda: not [name for pid, name in descendants().items() if pid not in known and "shim" in name])


@contextmanager
def pod(cri: Cri, logs: Path, name: str = "p1", config: Any = None) -> Iterator[tuple[str, Any]]:
    """Run a pod while the context lasts; yield its id and its configuration."""
    config = config or cri.pod_config(name, logs)
    sandbox = cri.run_pod(config)
    try:
        yield sandbox, config
    finally:
        cri.pod("StopPodSandbox", sandbox)
        cri.pod("RemovePodSandbox", sandbox)


def state(cri: Cri, container: str) -> tuple[int, int]:
    """Return a container's state and exit code."""
    found = cri.container("ContainerStatus", container).status
    return found.state, found.exit_code


def load_messages(directory: Path) -> Any:
    """Generate the module of the messages in ``directory`` and return it."""
    from grpc_tools import protoc

    source = Path(__file__).parent
    assert protoc.main(["protoc", f"--proto_path={source}", f"--python_out={directory}", "cri.proto"]) == 0
    sys.path.insert(0, str(directory))
    try:
        return importlib.import_module("cri_pb2")
    finally:
        sys.path.remove(str(directory))


@dataclass
class Cri:
    """A client; ``messages`` is the generated module."""

    channel: grpc.Channel
    messages: Any
    image: str

    def call(self, method: str, request: Any, service_name: str = "RuntimeService") -> Any:
        """Make one call."""
        service = self.messages.DESCRIPTOR.services_by_name[service_name]
        answer = getattr(self.messages, service.methods_by_name[method].output_type.name)
        call: Callable[..., Any] = self.channel.unary_unary(
            f"/{service.full_name}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer.FromString,
        )
        return call(request, timeout=DEADLINE)

    def knows(self, *images: str) -> bool:
        """Tell whether the plugin serves, and knows these images."""
        with suppress(grpc.RpcError):
            found = self.call("ListImages", self.messages.ListImagesRequest(), "ImageService").images
            return {*images} <= {tag for image in found for tag in image.repo_tags}
        return False

    def pod_config(self, name: str, logs: Path) -> Any:
        """Describe a pod."""
        pb = self.messages
        return pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, uid=f"uid-{name}", namespace="default"),
            hostname=name,
            log_directory=str(logs),
            linux=pb.LinuxPodSandboxConfig(
                security_context=pb.LinuxSandboxSecurityContext(namespace_options=pb.NamespaceOption(pid=1))
            ),
        )

    def run_pod(self, config: Any, handler: str = HANDLER) -> str:
        """Start a pod and return its id."""
        request = self.messages.RunPodSandboxRequest(config=config, runtime_handler=handler)
        return str(self.call("RunPodSandbox", request).pod_sandbox_id)

    def pod(self, method: str, pod: str) -> Any:
        """Make a call that is about a pod."""
        return self.call(method, self.messages.PodSandboxRequest(pod_sandbox_id=pod))

    def namespace(self, pod: str) -> Path:
        """Return the network namespace of a pod, in which an engine forwards a port."""
        request = self.messages.PodSandboxRequest(pod_sandbox_id=pod, verbose=True)
        info = json.loads(self.call("PodSandboxStatus", request).info["info"])
        (path,) = (each["path"] for each in info["runtimeSpec"]["linux"]["namespaces"] if each["type"] == "network")
        return Path(path)

    def pods(self) -> dict[str, str]:
        """Return the ids of all pods, by their names."""
        found = self.call("ListPodSandbox", self.messages.Empty())
        return {item.metadata.name: item.id for item in found.items}

    def create(
        self,
        pod: str,
        config: Any,
        name: str,
        command: Sequence[str],
        *,
        memory: int = 0,
        mounts: Sequence[str] = (),
        stdin: bool = False,
    ) -> str:
        """Create a container in a pod and return its id; ``mounts`` are of the host's, /usr:/usr, to be read."""
        pb = self.messages
        pid = config.linux.security_context.namespace_options.pid
        container = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name),
            image=pb.ImageSpec(image=self.image),
            command=command,
            log_path=f"{name}.log",
            mounts=[
                pb.Mount(host_path=source, container_path=place, readonly=True)
                for source, _, place in (mount.partition(":") for mount in mounts)
            ],
            stdin=stdin,
            linux=pb.LinuxContainerConfig(
                resources=pb.LinuxContainerResources(memory_limit_in_bytes=memory),
                security_context=pb.LinuxContainerSecurityContext(namespace_options=pb.NamespaceOption(pid=pid)),
            ),
        )
        request = pb.CreateContainerRequest(pod_sandbox_id=pod, config=container, sandbox_config=config)
        return str(self.call("CreateContainer", request).container_id)

    def container(self, method: str, container: str) -> Any:
        """Make a call that is about a container."""
        return self.call(method, self.messages.ContainerRequest(container_id=container))

    def start(self, pod: str, config: Any, name: str, *command: str, **options: Any) -> str:
        """Run a container in a pod and return its id; ``options`` are those of ``create``."""
        container = self.create(pod, config, name, command, **options)
        self.container("StartContainer", container)
        return container

    def execute(self, container: str, *command: str) -> tuple[int, str, str]:
        """Run a command in a container; return its exit code and what it printed."""
        done = self.call("ExecSync", self.messages.ExecSyncRequest(container_id=container, cmd=command, timeout=60))
        return done.exit_code, done.stdout.decode(), done.stderr.decode()

    def stop(self, container: str, seconds: int = 0) -> None:
        """Stop a container."""
        self.call("StopContainer", self.messages.StopContainerRequest(container_id=container, timeout=seconds))
