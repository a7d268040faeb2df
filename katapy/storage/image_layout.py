"""Finds an image in an OCI image layout, or in what `docker save` writes: its manifest, its configuration, its layers.

A layout is a directory, or a tar archive of one, also gzipped (image-spec v1.1, image-layout.md). All that is read is
bounded, and verified by its digest before it is believed; unpacking the layers is image_root's business.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import posixpath
import re
import stat
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol, TypeVar

from katapy import jsonfile, linux
from katapy.errors import InvalidArgument, NotFound, Unsupported
from katapy.jsonfile import printable, shown
from katapy.oci.node import UINT64_MAX, Node, array, integer, mapping, matching, text
from katapy.storage.image_config import ImageConfig, parse_image_config
from katapy.storage.tar import Kind, Stream, TarReader
from katapy.storage.unpack import Budget, Limits

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
_FILES_MAX: Final = 20_000
_NAME_MAX: Final = 4096
_NESTED_MAX: Final = 4
_GZIP: Final = b"\x1f\x8b"
_OTHER_ARCHIVES: Final = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
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
    config_document: bytes
    layers: tuple[Layer, ...]


class Source(Protocol):
    """The files of a layout, by their paths in it."""

    def open(self, name: str) -> BinaryIO:
        """Open a regular file. Raises NotFound, InvalidArgument."""


def split_reference(reference: str) -> tuple[Path, str | None]:
    """Split LAYOUT[:TAG] into a path that is there and the tag; a tag may have colons. Raises NotFound."""
    for end in (len(reference), *(at for at in range(len(reference) - 1, 0, -1) if reference[at] == ":")):
        if "\0" not in reference and os.path.exists(reference[:end]):
            return Path(reference[:end]), reference[end + 1 :] or None
    raise NotFound(f"{printable(reference)}: no such image layout; give a directory or an archive, and :TAG if need be")


@contextmanager
def open_source(path: Path, limits: Limits, *, temporary: Path) -> Iterator[Source]:
    """Open a layout; one in a gzipped archive is unzipped into ``temporary`` first, under no name.

    Raises NotFound, InvalidArgument, Unsupported for other compressions.
    """
    what = printable(str(path))
    with ExitStack() as stack:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise NotFound(f"{what}: no such image layout") from error
        except OSError as error:
            raise InvalidArgument(f"{what}: cannot be opened: {(error.strerror or '').lower()}") from error
        stack.callback(os.close, fd)
        mode = os.fstat(fd).st_mode
        if stat.S_ISDIR(mode):
            yield _Directory(fd, what)
            return
        if not stat.S_ISREG(mode):
            raise InvalidArgument(f"{what}: neither a directory nor an archive")
        start = os.pread(fd, 6, 0)
        for magic, name in _OTHER_ARCHIVES.items():
            if start.startswith(magic):
                raise Unsupported(f"{what}: compressed with {name}, which katapy does not read: unpack it, or use gzip")
        if start.startswith(_GZIP):
            unzipped = stack.enter_context(tempfile.TemporaryFile(dir=temporary))
            _unzip(fd, unzipped, Budget(limits, what))
            yield _Archive(unzipped.fileno(), what, limits)
        else:
            yield _Archive(fd, what, limits)


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


# Files of a layout


class _Directory:
    def __init__(self, fd: int, what: str) -> None:
        self._fd = fd
        self._what = what

    def open(self, name: str) -> BinaryIO:
        flags = os.O_RDONLY | os.O_NONBLOCK
        try:
            # Links are followed, as some tools share blobs, but not out of the layout: it may come from anybody.
            resolve = linux.RESOLVE_BENEATH | linux.RESOLVE_NO_MAGICLINKS
            fd = linux.openat2(self._fd, name, flags, resolve=resolve)
        except FileNotFoundError as error:
            raise NotFound(f"{self._what}: {name}: no such file") from error
        except OSError as error:
            raise InvalidArgument(
                f"{self._what}: {name}: cannot be opened: {(error.strerror or '').lower()}"
            ) from error
        # Looked at first: Python does not make a file of a directory, and leaves it open.
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise InvalidArgument(f"{self._what}: {name}: not a regular file")
        return os.fdopen(fd, "rb")


class _Archive:
    def __init__(self, fd: int, what: str, limits: Limits) -> None:
        self._fd = fd
        self._what = what
        self._files: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        # Layers have millions of members, layouts a few hundred: all of their names are remembered.
        budget = Budget(replace(limits, members=min(limits.members, _FILES_MAX)), what)
        stream = _Slice(fd, 0, os.fstat(fd).st_size)
        reader = TarReader(stream, what=what, count=budget.add_member)
        for member in reader:
            if max(len(member.name), len(member.link)) > _NAME_MAX:
                raise InvalidArgument(f"{what}: a name of {len(member.name)} bytes")
            name = posixpath.normpath(os.fsdecode(member.name))
            if member.kind is Kind.FILE and member.extents == ((0, member.size),):
                self._files[name] = (reader.position, member.size)
                # Not read for nothing: the layers are in here.
                reader.skip(member, stream.skip)
            elif member.kind is Kind.SYMLINK:
                # docker saves a layer once, and links to it.
                target = posixpath.join(posixpath.dirname(name), os.fsdecode(member.link))
                self._links[name] = posixpath.normpath(target)

    def open(self, name: str) -> BinaryIO:
        name = posixpath.normpath(name)
        place = self._files.get(self._links.get(name, name))
        if place is None:
            raise NotFound(f"{self._what}: {printable(name)}: no such file in the archive")
        return io.BufferedReader(_Slice(self._fd, *place), _CHUNK)


class _Slice(io.RawIOBase):
    """A part of an open file, which others may read at the same time."""

    def __init__(self, fd: int, start: int, size: int) -> None:
        self._fd = fd
        self._at = start
        self._end = start + size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: self._end - self._at]
        size = os.preadv(self._fd, [view], self._at) if view else 0
        self._at += size
        return size

    def skip(self, size: int) -> None:
        self._at = min(self._at + size, self._end)


def _unzip(fd: int, target: BinaryIO, budget: Budget) -> None:
    raw = Verified(_Slice(fd, 0, os.fstat(fd).st_size), None, None, budget.what)
    stream = Unpacked(raw, "gzip", budget, budget.what)
    while chunk := stream.read(_CHUNK):
        target.write(chunk)
    target.flush()


# Streams of layers


class Verified:
    """A stream that is counted, read to its end, and then compared with a digest and a size, unless these are None."""

    def __init__(self, stream: Stream, digest: str | None, size: int | None, what: str) -> None:
        self._digest = digest
        self._hash = hashlib.new(digest.partition(":")[0], usedforsecurity=False) if digest else None
        self._stream = stream
        self._size = size
        self._what = what
        self.count = 0

    def read(self, size: int, /) -> bytes:
        """Read. Raises InvalidArgument for more than there should be."""
        data = self._stream.read(size) or b""
        self.count += len(data)
        if self._size is not None and self.count > self._size:
            raise InvalidArgument(f"{self._what}: larger than the {self._size} bytes that it should have")
        if self._hash is not None:
            self._hash.update(data)
        return data

    def finish(self) -> None:
        """Read what is left. Raises InvalidArgument where it is not what it should be."""
        while self.read(_CHUNK):
            pass
        if self._size is not None and self.count != self._size:
            raise InvalidArgument(f"{self._what}: has {self.count} bytes, not {self._size}")
        if self._hash is not None and f"{self._hash.name}:{self._hash.hexdigest()}" != self._digest:
            raise InvalidArgument(f"{self._what}: is damaged: its {self._hash.name} is {self._hash.hexdigest()}")


class Unpacked:
    """What is in ``raw``, gzip or the empty string being its compression, as far as the budget goes."""

    def __init__(self, raw: Verified, compression: str, budget: Budget, what: str) -> None:
        self._raw = raw
        self._budget = budget
        self._what = what
        self._count = 0
        self._stream: Stream = raw
        if compression == "gzip":
            self._stream = gzip.GzipFile(fileobj=raw, mode="rb")  # type: ignore[call-overload]

    def read(self, size: int, /) -> bytes:
        """Read. Raises InvalidArgument beyond the budget, and where gzip has not made this."""
        try:
            data = self._stream.read(size)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise InvalidArgument(f"{self._what}: not what gzip makes: {str(error).lower()}") from error
        self._count += len(data)
        self._budget.add_bytes(len(data), unpacked=self._count, compressed=self._raw.count)
        return data


def sniff_compression(file: BinaryIO) -> str:
    """Return the compression of a layer by its first bytes, without reading them."""
    assert isinstance(file, io.BufferedReader)
    return "gzip" if file.peek(2)[:2] == _GZIP else ""


# Documents of a layout


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
    return Image(digest, parsed, data, tuple(layers))


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
    return Image(f"sha256:{hashlib.sha256(data).hexdigest()}", config, data, tuple(layers))


def _saved(node: Node, limits: Limits) -> _Saved:
    return _Saved(
        config=node.need("Config", text),
        names=node.each("RepoTags", text),
        layers=node.need("Layers", array(text, at_most=limits.layers)),
    )
