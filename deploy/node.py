"""Installs katapy on a Kubernetes node: what the container of deploy/daemonset.yaml runs.

The node's file system is at /host, and its namespaces are those of process 1. The programs of katapy go to /opt/katapy,
the guest's image and kernel to /var/lib/katapy. What a node lacks it is told, or given where INSTALL_PACKAGES says so.
With the argument `uninstall` all of that goes again, but for packages.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Final

LABEL: Final = "katapy.dev/runtime"
PROGRAMS: Final = Path("opt/katapy")
DATA: Final = Path("var/lib/katapy")
BUILD: Final = "build"  # a file among the programs: which build they are of
# What katapy needs where it runs, and the package that has it in the Debian that this image and the node are of.
NEEDED: Final = {
    f"usr/bin/python3.{sys.version_info.minor}": "python3",
    "usr/bin/qemu-system-x86_64": "qemu-system-x86",
    "usr/lib/qemu/virtiofsd": "qemu-system-common" if sys.version_info < (3, 12) else "virtiofsd",
    "usr/bin/setpriv": "util-linux",
    "usr/lib/x86_64-linux-gnu/libseccomp.so.2": "libseccomp2",
}
ENGINES: Final = {"containerd": "containerd", "crio": "crio"}  # of `katapy install`, and its service
_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class Failure(Exception):
    """What is wrong with the node, for who reads the log of the container."""


def missing_packages(host: Path) -> list[str]:
    """Return the packages that a node lacks."""
    return sorted({package for path, package in NEEDED.items() if not (host / path).exists()})


def copy(payload: Path, host: Path) -> None:
    """Put the programs, the guest's image and kernel on the node; what is there of the same build stays."""
    source, target = payload / PROGRAMS, host / PROGRAMS
    if not _same(source / BUILD, target / BUILD):
        # Shims that run have loaded what they need of the old ones.
        _replace(source, target)
    for asset in sorted((payload / DATA).glob("*/*")):
        place = host / DATA / asset.parent.name / asset.name
        if not place.exists():
            _replace(asset, place)


def _same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def _replace(source: Path, target: Path) -> None:
    """Copy a tree beside its place, and then move it there: a start of a pod finds the old one or the new."""
    fresh, old = (target.with_name(f".{target.name}.{kind}") for kind in ("new", "old"))
    for left in (fresh, old):
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(source, fresh, symlinks=True)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def on_node(*argv: str) -> str:
    """Run a program of the node in its namespaces and return what it prints. Raises Failure."""
    command = ["nsenter", "--target", "1", "--mount", "--uts", "--ipc", "--net", "--pid", "--", *argv]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    print(f"{' '.join(argv)}\n{done.stdout}{done.stderr}", end="", flush=True)
    if done.returncode != 0:
        raise Failure(f"{argv[0]} failed with status {done.returncode}")
    return done.stdout


def find_engine(host: Path) -> str:
    """Return the engine that runs the node's pods. Raises Failure."""
    sockets = {"containerd": "run/containerd/containerd.sock", "crio": "run/crio/crio.sock"}
    # A node of CRI-O's may have a containerd of docker's.
    for engine in ("crio", "containerd"):
        if (host / sockets[engine]).exists():
            return engine
    raise Failure("neither containerd nor CRI-O runs here")


def label_request(server: str, token: str, name: str, value: str | None) -> urllib.request.Request:
    """Return the request that sets the label of a node, or removes it (Kubernetes API, "Patch Node")."""
    body = json.dumps({"metadata": {"labels": {LABEL: value}}}).encode()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/merge-patch+json"}
    return urllib.request.Request(f"{server}/api/v1/nodes/{name}", body, headers, method="PATCH")


def label_node(name: str, value: str | None) -> None:
    """Set the label, or remove it, as the account of the pod."""
    server = f"https://{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}"
    request = label_request(server, (_ACCOUNT / "token").read_text(), name, value)
    context = ssl.create_default_context(cafile=str(_ACCOUNT / "ca.crt"))
    with urllib.request.urlopen(request, context=context, timeout=30):
        print(f"{name}: {LABEL}={value or ''}", flush=True)


def install(environment: Mapping[str, str], payload: Path = Path("/payload"), host: Path = Path("/host")) -> None:
    """Install katapy, configure the engine and label the node. Raises Failure."""
    engine = find_engine(host)
    if missing := missing_packages(host):
        if environment.get("INSTALL_PACKAGES") != "true":
            raise Failure(f"the node lacks packages: apt-get install --no-install-recommends {' '.join(missing)}")
        on_node("apt-get", "update")
        on_node(
            "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "--yes", "--no-install-recommends", *missing
        )
    copy(payload, host)
    katapy = f"/{PROGRAMS}/bin/katapy"
    on_node(katapy, "check")
    said = on_node(katapy, "install", f"--{engine}")
    if "nothing to do" not in said and environment.get("RESTART_ENGINE") == "true":
        on_node("systemctl", "restart", ENGINES[engine])
    label_node(environment["NODE_NAME"], "true")


def uninstall(environment: Mapping[str, str], host: Path = Path("/host")) -> None:
    """Take katapy off the node. Pods that use it must have gone. Raises Failure."""
    label_node(environment["NODE_NAME"], None)
    engine = find_engine(host)
    on_node(f"/{PROGRAMS}/bin/katapy", "install", f"--{engine}", "--uninstall")
    if environment.get("RESTART_ENGINE") == "true":
        on_node("systemctl", "restart", ENGINES[engine])
    for directory in (PROGRAMS, DATA):
        shutil.rmtree(host / directory, ignore_errors=True)


def main() -> None:
    """Do it, and then wait: the container of a DaemonSet must not end."""
    act = uninstall if sys.argv[1:] == ["uninstall"] else install
    try:
        act(os.environ)
    except (Failure, OSError) as error:
        sys.exit(f"{error}")
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    signal.sigwait([signal.SIGTERM, signal.SIGINT])


if __name__ == "__main__":
    main()
