"""A bundle: a directory with a config.json and what it refers to (runtime-spec, bundle.md); and the ids of containers.

Loading reads config.json once, checks it and checks that root file system and bind sources are there, so that a
container with a mistake in it is refused before anything of it exists. Nothing is changed here.
"""

from __future__ import annotations

import os
import stat
from typing import Final, NamedTuple

from katapy.errors import InvalidArgument, NotFound, Unsupported
from katapy.jsonfile import printable, read
from katapy.oci.spec import Spec, parse_spec
from katapy.state import ProcessRef, State, Status, now
from katapy.tree import mounts_below

CONFIG: Final = "config.json"


class Bundle(NamedTuple):
    """``path`` is the bundle's directory and ``rootfs`` its root file system, both absolute without symbolic links."""

    path: str
    rootfs: str
    spec: Spec

    def new_state(self, container_id: str, owner: ProcessRef) -> State:
        """Return the state of a container that is being made of it; ``owner`` is who stands behind that."""
        return State(
            id=container_id,
            bundle=self.path,
            rootfs=self.rootfs,
            sandbox=self.spec.sandbox or container_id,
            status=Status.CREATING,
            created=now(),
            oci_version=self.spec.oci_version,
            owner=os.getuid(),
            annotations=self.spec.annotations,
            shim=owner,
        )


def load_bundle(path: str) -> Bundle:
    """Read and check the bundle in the directory ``path``.

    Raises NotFound where directory, config.json, root file system or the source of a bind mount is missing,
    InvalidArgument or Unsupported where config.json is wrong. What is mounted in a read-only root file system becomes
    a mount of the specification's.
    """
    directory = _resolve_directory(path, f"bundle {printable(path)}")
    file = f"{directory}/{CONFIG}"
    spec = parse_spec(read(file), bundle=directory, what=printable(file))
    rootfs = _resolve_directory(spec.rootfs, f"rootfs is missing or unusable: {printable(spec.rootfs)}")
    if not spec.root.path.startswith("/") and not f"{rootfs}/".startswith(f"{directory}/"):
        raise InvalidArgument(f"{printable(file)}: root.path: {printable(spec.root.path)} leads out of the bundle")
    for bind in spec.bind_mounts:
        if not os.path.exists(bind.source):
            raise NotFound(f"{printable(file)}: mounts[{bind.index}].source: no such path: {printable(bind.source)}")
    if spec.root.read_only and not spec.root_disk and (paths := _mounts_inside(rootfs)):
        # The guest puts an overlay over a read-only root, which shows nothing of what is mounted in it.
        if spec.linux.namespace("user"):
            problem = f"{printable(paths[0])} is a mount of its own, which is not supported in a user namespace"
            raise Unsupported(f"{printable(file)}: root.readonly: {problem}")
        spec = spec.with_root_mounts(rootfs, paths)
    return Bundle(directory, rootfs, spec)


def _mounts_inside(rootfs: str) -> list[str]:
    """Return the directories in a root file system, as paths from there, on which something is mounted: the topmost."""
    found: list[str] = []
    for path in sorted(set(mounts_below(rootfs))):
        if path != rootfs and os.path.isdir(path) and not any(path.startswith(f"{above}/") for above in found):
            found.append(path)
    return [path.removeprefix(rootfs) for path in found]


def _resolve_directory(path: str, what: str) -> str:
    try:
        resolved = os.path.realpath(path, strict=True)
        is_directory = stat.S_ISDIR(os.stat(resolved).st_mode)
    except FileNotFoundError as error:
        raise NotFound(f"{what}: no such directory") from error
    except OSError as error:
        raise InvalidArgument(f"{what}: {(error.strerror or str(error)).lower()}") from error
    except ValueError as error:  # NUL in a path
        raise InvalidArgument(f"{what}: not a valid path") from error
    if not is_directory:
        raise InvalidArgument(f"{what}: not a directory")
    return resolved
