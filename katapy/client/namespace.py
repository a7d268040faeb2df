"""The network namespace that a container asks for: how what stands for it on the host comes to be in it."""

from __future__ import annotations

import os
from typing import Final

from katapy import linux
from katapy.errors import InvalidArgument, NotFound
from katapy.oci.spec import Spec

_NSENTER: Final = "/usr/bin/nsenter"
_UNSHARE: Final = "/usr/bin/unshare"


def network_command(spec: Spec) -> list[str]:
    """Return the command that executes another in the network namespace that ``spec`` asks for; empty for none.

    What stands for the container on the host has to be in it: hooks and network plugins look there.
    """
    namespace = spec.linux.namespace("network")
    if namespace is None:
        return []
    if namespace.path:
        os.close(_open_network(namespace.path))
    return [_NSENTER, f"--net={namespace.path}", "--"] if namespace.path else [_UNSHARE, "--net", "--"]


def enter_network(spec: Spec) -> None:
    """Move this process into the network namespace that ``spec`` asks for; what it has started stays where it is."""
    namespace = spec.linux.namespace("network")
    if namespace is not None and namespace.path:
        fd = _open_network(namespace.path)
        try:
            linux.setns(fd, linux.CLONE_NEWNET)
        except OSError as error:
            raise InvalidArgument(f"cannot join {namespace.path}: {error.strerror}: not a network namespace") from error
        finally:
            os.close(fd)
    elif namespace is not None:
        linux.unshare(linux.CLONE_NEWNET)


def _open_network(path: str) -> int:
    """Return a descriptor of the network namespace at ``path``. Raises NotFound, InvalidArgument."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise NotFound(f"cannot open the network namespace {path}: {error.strerror}") from error
    # Where namespaces are: what is bound elsewhere is a file of the same file system.
    if os.fstat(fd).st_dev != os.stat("/proc/self/ns/net").st_dev:
        os.close(fd)
        raise InvalidArgument(f"cannot join {path}: not a network namespace")
    return fd
