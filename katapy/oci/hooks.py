"""The ``hooks`` of config.json (runtime-spec 1.2, config.md, "POSIX-platform Hooks").

It says which programs run at which point of a container's life. Running those of the host is the sandbox's business;
``startContainer`` belongs to the container, so the guest agent gets these and runs them there.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from katapy.oci.node import Node, absolute_path, integer, matching, text

_ENTRY: Final = matching("[^=\0]+=[^\0]*", "an environment variable (NAME=VALUE)")
_TIMEOUT: Final = integer(1, 86_400)


class Hook(NamedTuple):
    """One program: ``args`` with its argv[0], ``env`` of None is the runtime's own, ``timeout`` in seconds."""

    path: str
    args: tuple[str, ...]
    env: tuple[str, ...] | None
    timeout: int | None


class Hooks(NamedTuple):
    """The hooks by the point at which they run, in order."""

    prestart: tuple[Hook, ...] = ()
    create_runtime: tuple[Hook, ...] = ()
    create_container: tuple[Hook, ...] = ()
    start_container: tuple[Hook, ...] = ()
    poststart: tuple[Hook, ...] = ()
    poststop: tuple[Hook, ...] = ()


def parse_hooks(node: Node) -> Hooks:
    """Parse ``hooks``. Raises InvalidArgument."""
    return Hooks(
        prestart=node.each("prestart", _hook),
        create_runtime=node.each("createRuntime", _hook),
        create_container=node.each("createContainer", _hook),
        start_container=node.each("startContainer", _hook),
        poststart=node.each("poststart", _hook),
        poststop=node.each("poststop", _hook),
    )


def _hook(node: Node) -> Hook:
    path = node.need("path", absolute_path)
    return Hook(
        path=path,
        # Like execv(3): argv[0] is what the caller says, not the path.
        args=node.each("args", text) or (path,),
        env=node.each("env", _ENTRY) or None,
        timeout=node.find("timeout", _TIMEOUT),
    )
