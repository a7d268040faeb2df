"""The root file system of a sandbox: a directory, an OCI bundle, an OCI image, or the default one with Python."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from katapy.assets.root import hold_root
from katapy.config import Config
from katapy.errors import InvalidArgument, NotFound
from katapy.sdk.document import ROOT, User


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
        from katapy.storage.image_user import find_user

        with open_image(wanted.image, cache=Config.load(config).runtime.data_dir / "roots") as image:
            said, path = image.config, str(image.path)
            environment = dict(variable.partition("=")[::2] for variable in said.env)
            user = find_user(image.path, said.user)
            whom = User(user.uid, user.gid, user.additional_gids)
            yield Root(path, said.args, {"HOME": user.home, **environment}, said.working_dir, whom)
    else:
        with hold_root(Config.load(config).runtime.data_dir) as root:
            yield Root(str(root.path))


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
        User(process.user.uid, process.user.gid, process.user.additional_gids),
        kept,
        mounts,
    )
