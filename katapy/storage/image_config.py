"""The configuration of an image: what it runs, as whom and where (image-spec v1.1, config.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from katapy import jsonfile
from katapy.errors import Unsupported
from katapy.jsonfile import shown
from katapy.oci.node import Node, absolute_path, array, matching, one_of, text

_DIFF_ID: Final = matching("sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}", "a digest by sha256 or sha512")
_USER_MAX: Final = 512


@dataclass(frozen=True)
class ImageConfig:
    """What a container of the image runs unless it is told otherwise.

    ``user`` is empty, or user or uid, with group or gid behind a colon, by the image's own /etc/passwd. ``env`` are
    KEY=VALUE. ``diff_ids`` are the digests of the layers' tar archives.
    """

    entrypoint: tuple[str, ...]
    cmd: tuple[str, ...]
    env: tuple[str, ...]
    working_dir: str
    user: str
    diff_ids: tuple[str, ...]

    @property
    def args(self) -> tuple[str, ...]:
        """The command: entry point and what it is given."""
        return self.entrypoint + self.cmd


def parse_image_config(data: bytes, *, what: str) -> ImageConfig:
    """Parse and check the document; ``what`` names it in errors.

    Raises InvalidArgument for what makes no sense, Unsupported for an image of another platform than linux/amd64.
    """
    node = Node(jsonfile.parse(data, what=what), what)
    platform = f"{node.need('os', text)}/{node.need('architecture', text)}"
    if platform != "linux/amd64":
        raise Unsupported(f"{what}: an image for {shown(platform)}, and katapy runs those for linux/amd64")
    rootfs = node.child("rootfs")
    rootfs.need("type", one_of(("layers",)))
    config = node.get("config", lambda each: each, Node({}, what, "config"))
    config.members()
    return ImageConfig(
        entrypoint=config.each("Entrypoint", text),
        cmd=config.each("Cmd", text),
        env=config.each("Env", _variable),
        working_dir=config.get("WorkingDir", _working_dir, "/"),
        user=config.get("User", _user, ""),
        diff_ids=rootfs.need("diff_ids", array(_DIFF_ID)),
    )


def _variable(node: Node) -> str:
    entry = text(node)
    if not entry.partition("=")[0] or "=" not in entry:
        node.fail(f"{shown(entry)} is not KEY=VALUE")
    return entry


def _working_dir(node: Node) -> str:
    return absolute_path(node) if text(node) else "/"


def _user(node: Node) -> str:
    user = text(node)
    if len(user) > _USER_MAX or any(character.isspace() for character in user):
        node.fail(f"{shown(user)} is not a user")
    return user
