"""The writable layer of a root file system: an overlay whose upper part is a tmpfs of bounded size.

Owns both mounts, in the shim's own mount namespace, so that what was written ends with the shim, however that ends.
The bounds are the host's: virtiofsd, which writes for the guest, gets ENOSPC from the host's kernel.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from katapy import linux
from katapy.errors import Unavailable
from katapy.oci.layer import LayerLimits

# Where it is in the sandbox's directory; one for each root, by number.
DIRECTORY: Final = "layers"
_FLAGS: Final = linux.MS_NOSUID | linux.MS_NODEV
# The tmpfs's root and what an overlay makes there are none of the caller's files.
_OWN_INODES: Final = 8


class WritableLayer:
    """A mounted layer; ``path`` is the root file system with it."""

    def __init__(self, directory: Path, lower: str, limits: LayerLimits) -> None:
        """Mount a layer over the directory ``lower`` in ``directory``, which is made. Raises Unavailable."""
        self._tmpfs, self.path = directory / "tmpfs", directory / "root"
        try:
            self.path.mkdir(mode=0o700, parents=True)
            self._tmpfs.mkdir(mode=0o700)
            options = f"mode=0700,size={limits.size_bytes},nr_inodes={limits.inodes + _OWN_INODES}"
            linux.mount("katapy-layer", str(self._tmpfs), "tmpfs", _FLAGS, options)
            self._overlay(lower)
        except OSError as error:
            self.close()
            raise Unavailable(f"cannot make a writable layer over {lower}: {error.strerror}") from error

    def close(self) -> None:
        """Take it away, with all that was written. Idempotent."""
        for mount in (self.path, self._tmpfs):
            # Not mounted any more (EINVAL), or never made: nothing to do.
            with suppress(OSError):
                linux.umount(str(mount), linux.MNT_DETACH | linux.UMOUNT_NOFOLLOW)

    def _overlay(self, lower: str) -> None:
        upper, work = self._tmpfs / "upper", self._tmpfs / "work"
        for directory in (upper, work):
            directory.mkdir()
        # By descriptors: a path may hold what separates options. Its root looks like that of the root below.
        fds = [os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC) for path in (lower, upper, work)]
        try:
            status = os.fstat(fds[0])
            os.chown(upper, status.st_uid, status.st_gid)
            upper.chmod(status.st_mode & 0o7777)
            names = zip(("lowerdir", "upperdir", "workdir"), fds, strict=True)
            options = ",".join(f"{name}=/proc/self/fd/{fd}" for name, fd in names)
            linux.mount("katapy-layer", str(self.path), "overlay", _FLAGS, options)
        finally:
            for fd in fds:
                os.close(fd)
