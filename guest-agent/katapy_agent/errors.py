"""The exception tree of the guest agent and its one table of gRPC status numbers.

The names are those of the host's tree, for they travel: a container process names the class of its failure on its
control socket, and the server puts it beside the gRPC status. Turning an error into a gRPC call's end is the server's.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import Final


class KatapyError(Exception):
    """Base of everything that the agent raises on purpose; its text is fit for a user."""


class InvalidArgument(KatapyError):
    """What the caller gave is wrong."""


class NotFound(KatapyError):
    """The named thing does not exist."""


class CommandNotFound(NotFound):
    """The container has no such program."""


class AlreadyExists(KatapyError):
    """The name is taken."""


class InvalidState(KatapyError):
    """The verb is not legal in this state."""


class PermissionDenied(KatapyError):
    """The caller may not do this."""


class CommandNotExecutable(PermissionDenied):
    """The program is there and cannot be executed."""


class Timeout(KatapyError):
    """A deadline passed."""


class Unsupported(KatapyError):
    """katapy does not do this, and says so instead of ignoring it."""


class Unavailable(KatapyError):
    """A part that is needed died or cannot be reached."""


class Internal(KatapyError):
    """A bug in katapy."""


# google.rpc.Code
_RPC: Final[dict[type[KatapyError], int]] = {
    KatapyError: 2,
    InvalidArgument: 3,
    NotFound: 5,
    CommandNotFound: 5,
    AlreadyExists: 6,
    InvalidState: 9,
    PermissionDenied: 7,
    CommandNotExecutable: 7,
    Timeout: 4,
    Unsupported: 12,
    Unavailable: 14,
    Internal: 13,
}
_BY_NAME: Final = {cls.__name__: cls for cls in _RPC}
_BY_ERRNO: Final[dict[int, type[KatapyError]]] = {
    errno.EPERM: PermissionDenied,
    errno.EACCES: PermissionDenied,
    errno.EROFS: PermissionDenied,
    errno.ENOENT: NotFound,
    errno.EEXIST: AlreadyExists,
    errno.EINVAL: InvalidArgument,
    errno.ENOTDIR: InvalidArgument,
    errno.EISDIR: InvalidArgument,
    errno.ELOOP: InvalidArgument,
    errno.EXDEV: InvalidArgument,
    errno.ERANGE: InvalidArgument,
    errno.ENETUNREACH: InvalidArgument,
    errno.EHOSTUNREACH: InvalidArgument,
    errno.ENETDOWN: InvalidState,
    errno.ESRCH: InvalidState,  # of a container that ends meanwhile
    errno.ENODEV: Unsupported,
    errno.ENOSYS: Unsupported,
    errno.EOPNOTSUPP: Unsupported,
    errno.ENOMEM: Unavailable,
    errno.ENOSPC: Unavailable,
    errno.EAGAIN: Unavailable,
}


def rpc_code(error: BaseException) -> int:
    """Return the google.rpc.Code of an exception; anything that is not a KatapyError is an internal error."""
    return next((_RPC[cls] for cls in type(error).__mro__ if cls in _RPC), _RPC[Internal])


def by_name(name: str) -> type[KatapyError]:
    """Return the class that a container process named on its control socket; an unknown name is Internal."""
    return _BY_NAME.get(name, Internal)


def from_os(action: str, error: OSError) -> KatapyError:
    """Return the error that says that ``action`` ("mount /proc") failed, and why."""
    reason = (error.strerror or str(error)).lower()
    return _BY_ERRNO.get(error.errno or 0, Internal)(f"cannot {action}: {reason}")


@contextlib.contextmanager
def doing(action: str) -> Iterator[None]:
    """Name the object and the stage of what fails inside: an OSError becomes ``cannot <action>: <reason>``."""
    try:
        yield
    except OSError as error:
        raise from_os(action, error) from error
