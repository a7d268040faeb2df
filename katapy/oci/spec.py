"""config.json of an OCI bundle, for Linux (runtime-spec 1.2), as a frozen Spec: the border of all bundles.

It judges the document alone. Whether root file system and sources exist is for ``bundle``; what the guest's kernel can
honour is for the guest agent, which gets the same document (``Spec.to_guest``) and refuses by name what it cannot do.

Members that the specification does not know are ignored, as it demands, and so are the sections of other systems
(windows, solaris, zos): one document may serve several. What katapy knows and does not do is Unsupported, by name.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

from katapy.errors import Internal, Unsupported
from katapy.jsonfile import dump, parse, shown
from katapy.oci.disk import ROOT_DISK, parse_root_disk
from katapy.oci.hooks import Hooks, parse_hooks
from katapy.oci.layer import LayerLimits, parse_layer
from katapy.oci.linux import (
    Device,
    IdMapping,
    IntelRdt,
    Namespace,
    Personality,
    Resources,
    TimeOffset,
    parse_device,
    parse_id_mappings,
    parse_intel_rdt,
    parse_namespaces,
    parse_personality,
    parse_propagation,
    parse_resources,
    parse_sysctl,
    parse_time_offsets,
)
from katapy.oci.node import (
    Node,
    absolute_path,
    array,
    boolean,
    mapping,
    matching,
    no_escape,
    required_text,
    text,
)
from katapy.oci.pod import is_sandbox, sandbox_of
from katapy.oci.pod_resources import PodResources, parse_pod_resources
from katapy.oci.process import ProcessSpec, Rlimit, process
from katapy.oci.seccomp import Seccomp, parse_seccomp

# What containers of a pod can have in common.
POD_NAMESPACES: Final = ("ipc", "uts", "network", "pid")
# Far above what engines write, far below the kernel's own 100,000 mounts of a namespace.
_MOUNTS_MAX: Final = 4096
_SEMVER: Final = matching(r"\d{1,5}\.\d{1,5}\.\d{1,5}([-+][0-9A-Za-z.+-]{1,64})?", "a version such as 1.2.0")
# 64 bytes is the kernel's; the characters are those that no file of the guest can be confused by.
_HOST_NAME: Final = matching("[A-Za-z0-9._-]{0,64}", "a host name of at most 64 letters, digits, '.', '_', '-'")


class Root(NamedTuple):
    """The root file system; ``path`` is absolute or relative to the bundle."""

    path: str
    read_only: bool


class Mount(NamedTuple):
    """A mount of the container."""

    destination: str
    type: str
    source: str
    options: tuple[str, ...]

    @property
    def is_bind(self) -> bool:
        """Whether the source is a path of the host."""
        return self.type == "bind" or "bind" in self.options or "rbind" in self.options

    @property
    def read_only(self) -> bool:
        """Whether the options make it read-only; the last one counts."""
        modes = [option for option in self.options if option in ("ro", "rw", "rro", "rrw")]
        return bool(modes) and modes[-1] in ("ro", "rro")


@dataclass(frozen=True)
class BindMount:
    """A bind mount: ``index`` in ``mounts``, ``source`` absolute on the host, ``destination`` in the container."""

    index: int
    source: str
    destination: str
    read_only: bool
    recursive: bool


class Linux(NamedTuple):
    """The ``linux`` section."""

    namespaces: tuple[Namespace, ...]
    uid_mappings: tuple[IdMapping, ...]
    gid_mappings: tuple[IdMapping, ...]
    time_offsets: dict[str, TimeOffset]
    devices: tuple[Device, ...]
    cgroups_path: str
    resources: Resources | None
    intel_rdt: IntelRdt | None
    sysctl: dict[str, str]
    seccomp: Seccomp | None
    rootfs_propagation: str
    masked_paths: tuple[str, ...]
    readonly_paths: tuple[str, ...]
    mount_label: str
    personality: Personality | None

    def namespace(self, kind: str) -> Namespace | None:
        """Return the namespace of this type; None where the container shares its surroundings'."""
        return next((namespace for namespace in self.namespaces if namespace.type == kind), None)


@dataclass(frozen=True)
class Spec:
    """A whole config.json; ``bundle`` is the absolute directory that relative paths start from.

    ``root_disk`` is the absolute path of the disk that is the root file system, empty where that is ``root.path``.
    """

    bundle: str
    oci_version: str
    root: Root
    process: ProcessSpec
    hostname: str
    domainname: str
    mounts: tuple[Mount, ...]
    hooks: Hooks
    annotations: dict[str, str]
    pod_resources: PodResources
    layer: LayerLimits | None
    root_disk: str
    linux: Linux
    _document: dict[str, Any] = field(repr=False)

    @property
    def rootfs(self) -> str:
        """The root file system as an absolute path of the host, not yet resolved."""
        return self._on_host(self.root.path)

    @property
    def sandbox(self) -> str:
        """The id of the pod's sandbox that this container joins; empty for one with a VM of its own."""
        return sandbox_of(self.annotations, shares=any(namespace.path for namespace in self.linux.namespaces))

    @property
    def is_sandbox(self) -> bool:
        """Whether this container is there for its pod, and uses next to nothing itself."""
        return is_sandbox(self.annotations)

    @property
    def joined_namespaces(self) -> tuple[str, ...]:
        """The types of the namespaces that a pod's container shares with its sandbox's."""
        return tuple(namespace.type for namespace in self.linux.namespaces if namespace.path) if self.sandbox else ()

    @property
    def resources(self) -> dict[str, Any]:
        """``linux.resources`` as plain JSON; empty where the document has none."""
        return (self._document.get("linux") or {}).get("resources") or {}

    @property
    def bind_mounts(self) -> tuple[BindMount, ...]:
        """The mounts whose source is on the host, in order; a relative source starts from the bundle, as in runc."""
        return tuple(
            BindMount(index, self._on_host(mount.source), mount.destination, mount.read_only, "rbind" in mount.options)
            for index, mount in enumerate(self.mounts)
            if mount.is_bind
        )

    def with_root_mounts(self, rootfs: str, paths: Sequence[str]) -> Spec:
        """Return this configuration with bind mounts, ahead of its own, of what is mounted on ``paths`` in the root.

        ``rootfs`` is the root file system on the host, ``paths`` start at it. Recursive and read-only, like the root.
        """
        added = [
            {"destination": path, "type": "bind", "source": f"{rootfs}{path}", "options": ["rbind", "rro"]}
            for path in paths
        ]
        mounts = [*added, *(self._document.get("mounts") or ())]
        return replace(
            self,
            mounts=Node({"mounts": mounts}, "the root's mounts").need("mounts", array(_mount)),
            _document={**self._document, "mounts": mounts},
        )

    def to_guest(self, *, root: str, sources: Mapping[int, str], rlimits: Sequence[Rlimit] = ()) -> bytes:
        """Return the config.json for the guest agent: the same document, with paths that are valid in the guest.

        ``root`` is the root file system's path in the guest, ``sources`` each bind mount's, by its index, ``rlimits``
        what the process has of those that ``process.rlimits`` does not name. Of the hooks it has those that run in the
        container. Raises Internal when ``sources`` does not name exactly the bind mounts.
        """
        indexes = {bind.index for bind in self.bind_mounts}
        if indexes != sources.keys():
            raise Internal(f"cannot write config.json: sources for {sorted(sources)}, bind mounts {sorted(indexes)}")
        document = {key: value for key, value in self._document.items() if key != "hooks"}
        if self.hooks.start_container:
            document["hooks"] = {"startContainer": self._document["hooks"]["startContainer"]}
        document["root"] = {**document["root"], "path": root}
        resources = self._document.get("linux", {}).get("resources") or {}
        if "blockIO" in resources:
            # Its devices are the host's, and so is whoever reads and writes them for the container.
            limits = {key: value for key, value in resources.items() if key != "blockIO"}
            document["linux"] = {**document["linux"], "resources": limits}
        if any(namespace.path for namespace in self.linux.namespaces):
            # The paths are the host's; which ones are joined in the guest is said beside the document.
            types = [{"type": namespace.type} for namespace in self.linux.namespaces]
            document["linux"] = {**document["linux"], "namespaces": types}
        if self.mounts:
            document["mounts"] = [
                {**given, "destination": mount.destination, **({"source": sources[index]} if index in sources else {})}
                for index, (given, mount) in enumerate(zip(document["mounts"], self.mounts, strict=True))
            ]
        document["process"] = self.process.with_limits(rlimits).document
        return dump(document)

    def _on_host(self, path: str) -> str:
        return os.path.normpath(f"{self.bundle}/{path}" if not path.startswith("/") else path)


def parse_spec(data: bytes, *, bundle: str, what: str = "config.json") -> Spec:
    """Parse a config.json; ``bundle`` is its absolute directory, ``what`` names the document in errors.

    Raises InvalidArgument, and Unsupported for what katapy knows and does not do; each names the JSON path.
    """
    node = Node(parse(data, what=what), what)
    version = node.need("ociVersion", _version)
    if node.child("vm").value is not None:
        node.child("vm").fail("choosing hypervisor, kernel or image here is not supported", Unsupported)
    annotations = node.get("annotations", _annotations, {})
    spec = Spec(
        bundle=bundle,
        oci_version=version,
        root=node.need("root", lambda root: Root(root.need("path", _root_path), root.get("readonly", boolean, False))),
        process=node.need("process", process),
        hostname=node.get("hostname", _HOST_NAME, ""),
        domainname=node.get("domainname", _HOST_NAME, ""),
        mounts=node.get("mounts", array(_mount, at_most=_MOUNTS_MAX), ()),
        hooks=node.get("hooks", parse_hooks, Hooks()),
        annotations=annotations,
        pod_resources=parse_pod_resources(node.child("annotations"), annotations) if annotations else PodResources(),
        layer=parse_layer(node.child("annotations"), annotations),
        root_disk=parse_root_disk(node.child("annotations"), annotations, bundle) if annotations else "",
        linux=_linux(node.child("linux")),
        _document=node.members(),
    )
    _check_joined(node.child("linux"), spec)
    if spec.root_disk and (spec.layer is not None or spec.sandbox):
        problem = "has no layer of bounded size" if spec.layer is not None else "is for the first container of a pod"
        node.child("annotations").child(ROOT_DISK).fail(f"a root that is a disk {problem}", Unsupported)
    return spec


def _check_joined(node: Node, spec: Spec) -> None:
    """Refuse namespaces of the host that cannot be had in a VM: only a pod's containers can share theirs.

    But the network is the VM's, which is connected to the namespace that is named. And CRI-O makes a pod's namespaces
    on the host, before its sandbox: nobody is in them, and what becomes of them are new ones in the VM.
    """
    fresh = ("network", "ipc", "uts") if is_sandbox(spec.annotations) else ("network",)
    for index, namespace in enumerate(spec.linux.namespaces):
        if not namespace.path or (namespace.type in fresh and not spec.sandbox):
            continue
        path = node.child("namespaces").items()[index].child("path")
        if not spec.sandbox:
            path.fail("joining another namespace is not supported yet", Unsupported)
        if namespace.type not in POD_NAMESPACES:
            path.fail(f"containers of a pod cannot share a {namespace.type} namespace", Unsupported)


def _version(node: Node) -> str:
    version = _SEMVER(node)
    if version.partition(".")[0] != "1":
        node.fail(f"{shown(version)} is not supported, only 1.x is")
    return version


def _root_path(node: Node) -> str:
    return absolute_path(node) if text(node).startswith("/") else no_escape(node)


def _mount(node: Node) -> Mount:
    for key in ("uidMappings", "gidMappings"):
        if node.child(key).value:
            node.child(key).fail("id-mapped mounts are not supported", Unsupported)
    mount = Mount(
        destination=node.need("destination", _destination),
        type=node.get("type", text, ""),
        source=node.get("source", text, ""),
        options=node.each("options", required_text),
    )
    if mount.is_bind and not mount.source:
        node.child("source").fail("a bind mount needs a source")
    return mount


def _destination(node: Node) -> str:
    # A relative one, of an old tool, starts from the root.
    path = f"/{no_escape(node)}" if not text(node).startswith("/") else absolute_path(node)
    if os.path.normpath(path).strip("/") == "":
        node.fail("cannot mount over the root file system")
    return path


def _annotations(node: Node) -> dict[str, str]:
    if "" in node.members():
        node.fail("a key is empty")
    return mapping(node)


def _linux(node: Node) -> Linux:
    # Absent, it is an empty one: a container without namespaces of its own but the VM's.
    if node.value is None:
        node = Node({}, node.what, node.path)
    return Linux(
        namespaces=node.get("namespaces", parse_namespaces, ()),
        uid_mappings=node.get("uidMappings", parse_id_mappings, ()),
        gid_mappings=node.get("gidMappings", parse_id_mappings, ()),
        time_offsets=node.get("timeOffsets", parse_time_offsets, {}),
        devices=node.each("devices", parse_device),
        cgroups_path=node.get("cgroupsPath", text, ""),
        resources=node.find("resources", parse_resources),
        intel_rdt=node.find("intelRdt", parse_intel_rdt),
        sysctl=node.get("sysctl", parse_sysctl, {}),
        seccomp=node.find("seccomp", parse_seccomp),
        rootfs_propagation=node.get("rootfsPropagation", parse_propagation, ""),
        masked_paths=node.each("maskedPaths", absolute_path),
        readonly_paths=node.each("readonlyPaths", absolute_path),
        mount_label=node.get("mountLabel", text, ""),
        personality=node.find("personality", parse_personality),
    )
