"""Finds an image in an OCI image layout, or in what `docker save` writes: its manifest, its configuration, its layers.

What is read (image-spec v1.1, image-layout.md) is bounded, and verified by its digest before it is believed. Reading it
is image_source's business, unpacking the layers image_root's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeVar

from katapy import jsonfile
from katapy.errors import InvalidArgument, NotFound, Unsupported
from katapy.jsonfile import printable, shown
from katapy.oci.node import UINT64_MAX, Node, array, integer, mapping, matching, text
from katapy.storage.image_config import ImageConfig, parse_image_config
from katapy.storage.image_source import Source, Verified
from katapy.storage.unpack import Limits

_T = TypeVar("_T")

_REF_NAME: Final = "org.opencontainers.image.ref.name"
_CONTAINERD_NAME: Final = "io.containerd.image.name"
_INDEXES: Final = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
_MANIFESTS: Final = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_CONFIGS: Final = ("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")
_LAYER: Final = re.compile(
    r"application/vnd\.(?:oci\.image\.layer\.(?:nondistributable\.)?v1\.tar|"
    r"docker\.image\.rootfs\.(?:foreign\.)?diff\.tar)(?:[+.](gzip|zstd))?"
)
_DIGEST: Final = matching("sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}", "a digest by sha256 or sha512")
_LAYOUT_VERSION: Final = matching(r"1\.\d{1,5}\.\d{1,5}", "a version that katapy knows (1.0.0)")
_PLATFORM: Final = ("linux", "amd64")
_NESTED_MAX: Final = 4
_CHUNK: Final = 1 << 20
_SHOWN_NAMES: Final = 8


@dataclass(frozen=True)
class Layer:
    """One layer: the blob ``name`` of the source, of ``size`` bytes if that is told, and its ``digest`` likewise.

    ``compression`` is gzip, empty, or None where nothing says it; ``diff_id`` is the digest of the tar archive in it.
    """

    name: str
    digest: str | None
    size: int | None
    compression: str | None
    diff_id: str


@dataclass(frozen=True)
class Image:
    """An image of a layout; ``digest`` is its manifest's, or its configuration's where nothing else has one."""

    digest: str
    config: ImageConfig
    layers: tuple[Layer, ...]


def find_image(source: Source, what: str, tag: str | None, limits: Limits) -> Image:
    """Return the image of this tag, or the only one, for linux/amd64. ``what`` names the layout in errors.

    Raises NotFound, InvalidArgument for a layout that makes no sense, Unsupported for one that katapy cannot use.
    """
    try:
        layout = _read_json(source, "oci-layout", f"{what}: oci-layout")
    except NotFound:
        return _find_saved(source, what, tag, limits)
    layout.need("imageLayoutVersion", _LAYOUT_VERSION)
    index = _read_json(source, "index.json", f"{what}: index.json")
    digest, manifest = _choose(source, index, what, tag, nested=0)
    return _parse_manifest(source, manifest, digest, what, limits)


def _read_json(source: Source, name: str, what: str, *, prefix: bytes = b"", suffix: bytes = b"") -> Node:
    with source.open(name) as file:
        data = file.read(jsonfile.MAX_BYTES + 1)
    return Node(jsonfile.parse(prefix + data + suffix, what=what), what)


@dataclass(frozen=True)
class _Descriptor:
    """What one document says of another (image-spec, descriptor.md)."""

    media_type: str
    digest: str
    size: int
    platform: tuple[str, str] | None
    names: tuple[str, ...]

    @property
    def blob(self) -> str:
        """The path of what it describes."""
        return f"blobs/{self.digest.replace(':', '/', 1)}"


def _descriptor(node: Node) -> _Descriptor:
    platform = node.find("platform", lambda each: (each.need("os", text), each.need("architecture", text)))
    annotations = node.get("annotations", mapping, {})
    names = (annotations.get(_REF_NAME), annotations.get(_CONTAINERD_NAME))
    return _Descriptor(
        media_type=node.need("mediaType", text),
        digest=node.need("digest", _DIGEST),
        size=node.need("size", integer(0, UINT64_MAX)),
        platform=platform,
        names=tuple(name for name in names if name),
    )


def _read_blob(source: Source, descriptor: _Descriptor, what: str) -> bytes:
    what = f"{what}: {descriptor.digest}"
    if descriptor.size > jsonfile.MAX_BYTES:
        raise InvalidArgument(f"{what}: larger than {jsonfile.MAX_BYTES} bytes")
    with source.open(descriptor.blob) as file:
        stream = Verified(file, descriptor.digest, descriptor.size, what)
        data = b"".join(iter(lambda: stream.read(_CHUNK), b""))
        stream.finish()
    return data


def _choose(source: Source, index: Node, what: str, tag: str | None, *, nested: int) -> tuple[str, Node]:
    """Return the digest and the document of the manifest that an index leads to."""
    descriptors = index.need("manifests", array(_descriptor))
    found = [one for one in descriptors if one.media_type in (*_INDEXES, *_MANIFESTS)]
    if tag is not None:
        found = [one for one in found if any(_names(name, tag) for name in one.names)]
    found = [one for one in found if one.platform in (None, _PLATFORM)]
    # One that does not say for what it is comes after one that does: it may be a signature.
    found = [one for one in found if one.platform] or found
    found = list({one.digest: one for one in found}.values())
    if len(found) != 1:
        raise _not_one(len(found), [name for one in descriptors for name in one.names], what, tag)
    data = _read_blob(source, found[0], what)
    document = Node(jsonfile.parse(data, what=f"{what}: {found[0].digest}"), f"{what}: {found[0].digest}")
    if found[0].media_type in _MANIFESTS:
        return found[0].digest, document
    if nested >= _NESTED_MAX:
        raise InvalidArgument(f"{what}: indexes in indexes, more than {_NESTED_MAX} deep")
    return _choose(source, document, what, None, nested=nested + 1)


def _names(name: str, tag: str) -> bool:
    """Return whether ``tag`` is meant for ``name``: all of it, or what is behind a colon or a slash."""
    return name == tag or name.endswith((f":{tag}", f"/{tag}"))


def _not_one(count: int, names: list[str], what: str, tag: str | None) -> Exception:
    listed = ", ".join(shown(name) for name in list(dict.fromkeys(names))[:_SHOWN_NAMES])
    which = f"image {shown(tag)}" if tag is not None else "image"
    there = f"; there is: {listed}" if listed else ""
    if count:
        return InvalidArgument(
            f"{what}: {count} images of that name or of none: give another tag, as LAYOUT:TAG{there}"
        )
    return NotFound(f"{what}: no {which} for {'/'.join(_PLATFORM)}{there}")


def _parse_manifest(source: Source, manifest: Node, digest: str, what: str, limits: Limits) -> Image:
    if manifest.need("schemaVersion", integer(0, 1000)) != 2:
        manifest.fail("a manifest of another version than 2", Unsupported)
    config = manifest.need("config", _descriptor)
    if config.media_type not in _CONFIGS:
        manifest.child("config").fail(f"{shown(config.media_type)} is not an image to run", Unsupported)
    nodes = manifest.need("layers", array(_same, at_most=limits.layers))
    data = _read_blob(source, config, what)
    parsed = parse_image_config(data, what=f"{what}: {config.digest}")
    layers = []
    for node, diff_id in _with_diff_ids(nodes, parsed, what):
        descriptor = _descriptor(node)
        match = _LAYER.fullmatch(descriptor.media_type)
        if match is None:
            node.fail(f"{shown(descriptor.media_type)} is not a layer", Unsupported)
        if match[1] == "zstd":
            node.fail("compressed with zstd, which katapy does not read: push the image again with gzip", Unsupported)
        layers.append(Layer(descriptor.blob, descriptor.digest, descriptor.size, match[1] or "", diff_id))
    return Image(digest, parsed, tuple(layers))


def _same(node: Node) -> Node:
    return node


def _with_diff_ids(layers: tuple[_T, ...], config: ImageConfig, what: str) -> Iterator[tuple[_T, str]]:
    if len(layers) != len(config.diff_ids):
        raise InvalidArgument(f"{what}: {len(layers)} layers, and {len(config.diff_ids)} in the configuration")
    return zip(layers, config.diff_ids, strict=True)


# What `docker save` writes (moby, image/spec/v1.2.md)


@dataclass(frozen=True)
class _Saved:
    config: str
    names: tuple[str, ...]
    layers: tuple[str, ...]


def _find_saved(source: Source, what: str, tag: str | None, limits: Limits) -> Image:
    try:
        # At the top is an array, which the border does not take.
        document = _read_json(source, "manifest.json", f"{what}: manifest.json", prefix=b'{"":', suffix=b"}")
    except NotFound as error:
        raise InvalidArgument(f"{what}: neither an OCI image layout nor what docker saves") from error
    images = document.need("", array(lambda node: _saved(node, limits)))
    found = [one for one in images if tag is None or any(_names(name, tag) for name in one.names)]
    if len(found) != 1:
        raise _not_one(len(found), [name for one in images for name in one.names], what, tag)
    with source.open(found[0].config) as file:
        data = file.read(jsonfile.MAX_BYTES + 1)
    config = parse_image_config(data, what=f"{what}: {printable(found[0].config)}")
    layers = [Layer(name, None, None, None, diff_id) for name, diff_id in _with_diff_ids(found[0].layers, config, what)]
    return Image(f"sha256:{hashlib.sha256(data).hexdigest()}", config, tuple(layers))


def _saved(node: Node, limits: Limits) -> _Saved:
    return _Saved(
        config=node.need("Config", text),
        names=node.each("RepoTags", text),
        layers=node.need("Layers", array(text, at_most=limits.layers)),
    )
