"""What is in deploy/: the manifests hold together, and the engines' files are those that `katapy install` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import node
import pytest
import yaml

from katapy.config import Hypervisor
from katapy.engines import ENGINES
from katapy.engines.change import Change
from katapy.engines.engine import Runtime
from katapy.engines.host import Host

SOURCE = Path(__file__).parents[2]
DEPLOY = SOURCE / "deploy"
UNITS = {"Mi": 1 << 20, "Gi": 1 << 30}
# A pod's processes on the host with nothing of the guest's memory, as measured: docs/kubernetes.md has the parts.
HOST_BYTES = 105 << 20
IDLE_MILLICORES = 3


def documents(name: str) -> dict[str, dict[str, Any]]:
    """Return the documents of a file by their kind."""
    return {each["kind"]: each for each in yaml.safe_load_all((DEPLOY / name).read_text())}


def planned(host: Host, engine: str) -> Change:
    change = ENGINES[engine].plan_install(host, Runtime(), ENGINES[engine].config.format(name="katapy"))
    assert change is not None
    assert change.after is not None
    return change


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_all_is_applied_that_is_there() -> None:
    """But for the pod, which is an example."""
    listed = documents("kustomization.yaml")["Kustomization"]
    assert {*listed["resources"], "kustomization.yaml", "pod.yaml"} == {path.name for path in DEPLOY.glob("*.yaml")}
    [image] = listed["images"]
    daemon_set = documents("daemonset.yaml")["DaemonSet"]
    assert image["name"] == daemon_set["spec"]["template"]["spec"]["containers"][0]["image"]
    assert f"NODE_IMAGE ?= {image['name']}\n" in (SOURCE / "Makefile").read_text()


def test_the_runtime_class() -> None:
    """Its handler is what `katapy install` writes, its label what the DaemonSet sets, its name what the pod names."""
    runtime_class = documents("runtimeclass.yaml")["RuntimeClass"]
    assert runtime_class["apiVersion"] == "node.k8s.io/v1"
    assert runtime_class["handler"] == Runtime().name
    assert runtime_class["scheduling"]["nodeSelector"] == {node.LABEL: "true"}
    assert documents("pod.yaml")["Pod"]["spec"]["runtimeClassName"] == runtime_class["metadata"]["name"]


def test_the_overhead_is_enough() -> None:
    """For all that the pod's cgroup holds beside what its containers may use: the guest's own part, and the host's."""
    fixed = documents("runtimeclass.yaml")["RuntimeClass"]["overhead"]["podFixed"]
    memory = int(fixed["memory"][:-2]) * UNITS[fixed["memory"][-2:]]
    needed = Hypervisor().overhead_memory + HOST_BYTES
    assert needed <= memory < needed * 1.25
    assert IDLE_MILLICORES <= int(fixed["cpu"].removesuffix("m")) <= 250
    page = (SOURCE / "docs/kubernetes.md").read_text()
    assert f"`{fixed['memory']}`" in page
    assert f"`{fixed['cpu']}`" in page


def test_the_daemon_set() -> None:
    """What deploy/node.py asks for is there, and its account may do what it does."""
    kinds = documents("daemonset.yaml")
    pod = kinds["DaemonSet"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert {each["name"] for each in container["env"]} == {"NODE_NAME", "INSTALL_PACKAGES", "RESTART_ENGINE"}
    assert container["volumeMounts"][0]["mountPath"] == "/host"
    assert pod["volumes"] == [{"name": "host", "hostPath": {"path": "/"}}]
    assert pod["hostPID"] is container["securityContext"]["privileged"] is True
    assert kinds["ClusterRole"]["rules"] == [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["patch"]}]
    account = kinds["ServiceAccount"]["metadata"]
    assert kinds["ClusterRoleBinding"]["subjects"] == [{"kind": "ServiceAccount", **account}]
    assert kinds["ClusterRoleBinding"]["roleRef"]["name"] == kinds["ClusterRole"]["metadata"]["name"]
    assert pod["serviceAccountName"] == account["name"]
    template = kinds["DaemonSet"]["spec"]["template"]
    assert kinds["DaemonSet"]["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]
    # What the pods of the runtime class select comes after the installation, not before.
    assert node.LABEL not in pod["nodeSelector"]


@pytest.mark.parametrize(
    ("engine", "before", "name"),
    [
        ("containerd", None, "containerd/config.toml"),
        ("containerd", b'version = 3\nimports = ["/etc/containerd/conf.d/*.toml"]\n', "containerd/conf.d/katapy.toml"),
        ("crio", None, "crio/crio.conf.d/10-katapy.conf"),
    ],
)
def test_the_engines_files(host: Host, engine: str, before: bytes | None, name: str) -> None:
    """Byte for byte what `katapy install` writes, in the place where it does."""
    if before is not None:
        (host.root / "etc/containerd").mkdir(parents=True)
        (host.root / "etc/containerd/config.toml").write_bytes(before)
    change = planned(host, engine)
    assert change.path == host.root / "etc" / name
    assert change.after == (DEPLOY / name).read_bytes()


# ---------------------------------------------------------------- deploy/node.py


@pytest.fixture
def payload(tmp_path: Path) -> Path:
    """Return what the image has, and make a node beside it, `node`."""
    payload = tmp_path / "payload"
    (payload / node.PROGRAMS / "bin").mkdir(parents=True)
    (payload / node.PROGRAMS / node.BUILD).write_text("one")
    (payload / node.PROGRAMS / "bin/katapy").symlink_to("../lib/katapy/bin/katapy")
    (payload / node.DATA / "image/abc").mkdir(parents=True)
    (payload / node.DATA / "image/abc/image.json").write_text("{}")
    (tmp_path / "node").mkdir()
    return payload


def test_a_node_gets_what_it_has_not(payload: Path, tmp_path: Path) -> None:
    """A container that starts again changes nothing under shims that run; another build takes the place."""
    host = tmp_path / "node"
    node.copy(payload, host)
    assert (host / node.PROGRAMS / "bin/katapy").readlink() == Path("../lib/katapy/bin/katapy")
    assert (host / node.DATA / "image/abc/image.json").read_text() == "{}"
    inode = (host / node.PROGRAMS).stat().st_ino
    node.copy(payload, host)
    assert (host / node.PROGRAMS).stat().st_ino == inode
    (payload / node.PROGRAMS / node.BUILD).write_text("two")
    (host / node.DATA / "image/abc/image.json").write_text("[]")
    node.copy(payload, host)
    assert (host / node.PROGRAMS / node.BUILD).read_text() == "two"
    assert (host / node.DATA / "image/abc/image.json").read_text() == "[]"
    assert [path.name for path in (host / "opt").iterdir()] == ["katapy"]


def test_a_node_is_told_what_it_lacks(payload: Path, tmp_path: Path) -> None:
    """And is not touched."""
    host = tmp_path / "node"
    with pytest.raises(node.Failure, match="neither containerd nor CRI-O runs here"):
        node.install({"NODE_NAME": "n1"}, payload, host)
    (host / "run/containerd").mkdir(parents=True)
    (host / "run/containerd/containerd.sock").touch()
    assert node.find_engine(host) == "containerd"
    for path in list(node.NEEDED)[1:]:
        (host / path).parent.mkdir(parents=True, exist_ok=True)
        (host / path).touch()
    with pytest.raises(node.Failure, match=r"apt-get install --no-install-recommends python3$"):
        node.install({"NODE_NAME": "n1", "INSTALL_PACKAGES": "false"}, payload, host)
    assert not (host / "opt").exists()


@pytest.mark.parametrize("value", ["true", None])
def test_how_a_label_is_asked_for(value: str | None) -> None:
    """A merge patch, in which null removes (RFC 7386)."""
    request = node.label_request("https://10.0.0.1:443", "secret", "n1", value)
    assert (request.method, request.full_url) == ("PATCH", "https://10.0.0.1:443/api/v1/nodes/n1")
    assert isinstance(request.data, bytes)
    assert json.loads(request.data) == {"metadata": {"labels": {"katapy.dev/runtime": value}}}
    assert request.headers["Content-type"] == "application/merge-patch+json"
    assert request.headers["Authorization"] == "Bearer secret"
