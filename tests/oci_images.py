"""Makes OCI image layouts, good ones and hostile ones: layers member by member, blobs, manifests, indexes."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
REF_NAME = "org.opencontainers.image.ref.name"
PLATFORM = {"os": "linux", "architecture": "amd64"}

Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, data: bytes = b"", **fields: Any) -> Member:
    """Return a member of a layer: a file unless ``type`` says otherwise; other fields are those of tarfile.TarInfo."""
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(data), 0o644, 1_000_000_000
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def directory(name: str, **fields: Any) -> Member:
    """Return a directory."""
    return member(name, type=tarfile.DIRTYPE, **{"mode": 0o755, **fields})


def symlink(name: str, target: str, **fields: Any) -> Member:
    """Return a symbolic link."""
    return member(name, type=tarfile.SYMTYPE, linkname=target, **fields)


def hard_link(name: str, target: str) -> Member:
    """Return a hard link to another member."""
    return member(name, type=tarfile.LNKTYPE, linkname=target)


def tar(members: Iterable[Member], *, format: int = tarfile.PAX_FORMAT) -> bytes:  # noqa: A002 - tarfile's own word
    """Return a tar archive."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format, encoding="utf-8", errors="surrogateescape") as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def digest_of(data: bytes, algorithm: str = "sha256") -> str:
    """Return the digest of a blob."""
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


class Layout:
    """An image layout in a directory."""

    def __init__(self, path: Path, algorithm: str = "sha256") -> None:
        self.path = path
        self.algorithm = algorithm
        self.manifests: list[dict[str, Any]] = []
        (path / "blobs" / algorithm).mkdir(parents=True)
        self.write("oci-layout", {"imageLayoutVersion": "1.0.0"})
        self.write("index.json", {"schemaVersion": 2, "manifests": []})

    def write(self, name: str, document: object) -> None:
        """Write a document of the layout."""
        (self.path / name).write_text(json.dumps(document))

    def blob(self, data: bytes | object, media_type: str, **fields: Any) -> dict[str, Any]:
        """Write a blob, or a document as one, and return its descriptor."""
        content = data if isinstance(data, bytes) else json.dumps(data).encode()
        digest = digest_of(content, self.algorithm)
        (self.path / "blobs" / digest.replace(":", "/")).write_bytes(content)
        return {"mediaType": media_type, "digest": digest, "size": len(content), **fields}

    def manifest(
        self,
        layers: Iterable[bytes],
        *,
        compressed: bool = True,
        config: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> dict[str, Any]:
        """Write an image of these tar archives and return its manifest's descriptor."""
        archives = list(layers)
        document = {
            **PLATFORM,
            "config": {"Cmd": ["/bin/sh"]},
            "rootfs": {"type": "layers", "diff_ids": [digest_of(archive, self.algorithm) for archive in archives]},
            **(config or {}),
        }
        descriptors = [
            self.blob(gzip.compress(archive, 1), f"{LAYER}+gzip") if compressed else self.blob(archive, LAYER)
            for archive in archives
        ]
        manifest = {"schemaVersion": 2, "config": self.blob(document, CONFIG), "layers": descriptors}
        return self.blob(manifest, MANIFEST, **fields)

    def add(self, descriptor: Mapping[str, Any], tag: str | None = None, **fields: Any) -> str:
        """Put a manifest or an index into index.json, and return its digest."""
        annotations = {"annotations": {REF_NAME: tag}} if tag is not None else {}
        self.manifests.append({**descriptor, **annotations, **fields})
        self.write("index.json", {"schemaVersion": 2, "manifests": self.manifests})
        return str(descriptor["digest"])

    def add_image(self, *layers: Iterable[Member], tag: str | None = None, **options: Any) -> str:
        """Add an image with these layers, and return its digest."""
        return self.add(self.manifest(map(tar, layers), **options), tag)

    def archive(self, path: Path) -> Path:
        """Write the layout as a tar archive."""
        with tarfile.open(path, "w") as archive:
            for child in sorted(self.path.iterdir()):
                archive.add(child, child.name)
        return path
