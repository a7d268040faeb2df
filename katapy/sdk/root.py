"""The root file system of a sandbox: a directory, an OCI bundle, an OCI image, or the default one with Python."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from katapy.assets import hold_root
from katapy.config import Config
from katapy.errors import InvalidArgument, NotFound
from katapy.sdk.document import ROOT, User
from katapy.sdk.files import Files

# Of /etc/passwd and /etc/group of an image: bytes, and fields that both have.
_TABLE_MAX: Final = 1 << 20
_FIELDS: Final = 4


class Wanted(NamedTuple):
    """At most one of a directory, a bundle and an image layout."""

    rootfs: str | os.PathLike[str] | None
    bundle: str | os.PathLike[str] | None
    image: str | None


@dataclass(frozen=True)
class Root:
    """``path`` is absolute; the others are what a bundle or an image says that runs in it."""

    path: str
    args: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/"
    user: User = ROOT
    process: Mapping[str, Any] = field(default_factory=dict)
    mounts: Sequence[Mapping[str, Any]] = ()


@contextmanager
def open_root(wanted: Wanted, config: Path | None) -> Iterator[Root]:
    """Give a root file system, which stays there meanwhile. Raises NotFound, InvalidArgument, Unavailable."""
    if wanted.rootfs is not None:
        path = os.path.realpath(wanted.rootfs)
        if not os.path.isdir(path):
            problem = InvalidArgument if os.path.exists(path) else NotFound
            raise problem(f"rootfs: {os.fspath(wanted.rootfs)} is no directory")
        yield Root(path)
    elif wanted.bundle is not None:
        yield _of_bundle(os.fspath(wanted.bundle))
    elif wanted.image is not None:
        from katapy.storage.image_root import open_root as open_image

        with open_image(wanted.image, cache=Config.load(config).runtime.data_dir / "roots") as image:
            said, path = image.config, str(image.path)
            environment = dict(variable.partition("=")[::2] for variable in said.env)
            yield Root(path, said.args, environment, said.working_dir, find_user(path, said.user))
    else:
        with hold_root(Config.load(config).runtime.data_dir) as root:
            yield Root(str(root.path))


def find_user(root: str, text: str) -> User:
    """Return whom an image's "user[:group]" means, names by the root's own files; empty is root.

    Raises InvalidArgument for a name that is not there. Source: image-spec v1.1, config.md, "User".
    """
    user, _, group = text.partition(":")
    uid, gid = 0, 0
    if user:
        entry = _entry(root, "etc/passwd", user)
        if entry is None and not user.isdecimal():
            raise InvalidArgument(f"the image's user {user[:40]!r} is not in its /etc/passwd")
        uid, gid = (int(user), 0) if entry is None else (int(entry[2]), int(entry[3]))
    if group:
        entry = _entry(root, "etc/group", group)
        if entry is None and not group.isdecimal():
            raise InvalidArgument(f"the image's group {group[:40]!r} is not in its /etc/group")
        gid = int(group) if entry is None else int(entry[2])
    return User(uid, gid)


def _entry(root: str, path: str, name: str) -> list[str] | None:
    """Return the fields of the line for a name or a number; the file is the image's, and may be anything."""
    directory = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        text = Files(lambda: directory, (0, 0)).read_text(f"/{path}", max_bytes=_TABLE_MAX)
    except NotFound:
        return None
    finally:
        os.close(directory)
    for line in text.splitlines():
        fields = line.split(":")
        numbers = fields[2:4] if path == "etc/passwd" else fields[2:3]
        if len(fields) >= _FIELDS and name in (fields[0], fields[2]) and all(each.isdecimal() for each in numbers):
            return fields
    return None


def _of_bundle(path: str) -> Root:
    from katapy.jsonfile import parse, read
    from katapy.oci.bundle import CONFIG, load_bundle

    bundle = load_bundle(path)
    name = f"{bundle.path}/{CONFIG}"
    document = parse(read(name), what=name)
    process = bundle.spec.process
    mounts = [
        {**mount, "source": os.path.join(bundle.path, mount["source"])} if parsed.is_bind else mount
        for mount, parsed in zip(document.get("mounts") or (), bundle.spec.mounts, strict=True)
    ]
    environment = dict(variable.partition("=")[::2] for variable in process.env)
    kept = {key: value for key, value in process.document.items() if key not in ("args", "env", "rlimits", "terminal")}
    return Root(
        bundle.rootfs,
        tuple(process.args),
        environment,
        process.cwd,
        User(process.user.uid, process.user.gid),
        kept,
        mounts,
    )
