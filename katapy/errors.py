"""The exception tree of katapy and the one table of codes that every door speaks.

    KatapyError
      InvalidArgument        what the caller gave is wrong
      NotFound               the named thing does not exist
        CommandNotFound      the container has no such program (exit status 127)
      AlreadyExists          the name is taken
      InvalidState           the verb is not legal in this state
      PermissionDenied       the caller may not do this
        CommandNotExecutable the program cannot be executed (exit status 126)
      Timeout                a deadline passed
      Unsupported            katapy does not do this, and says so instead of ignoring it
      Unavailable            a part that is needed died or cannot be reached
        NotStarted           a sandbox could not start; safe to try again
        OutcomeUnknown       what runs a sandbox was lost, and with it what became of a command
      Internal               a bug in katapy

A message names the object and the stage, in lower case. It is printed once, where it is handled.
"""

from __future__ import annotations

from typing import Final, NamedTuple


class KatapyError(Exception):
    """Base of everything that katapy raises on purpose; its text is fit for a user."""


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


class NotStarted(Unavailable):
    """A sandbox could not start: nothing of it has run, so it is safe to try again."""


class OutcomeUnknown(Unavailable):
    """What runs a sandbox was lost: a command may have run, or not."""


class Internal(KatapyError):
    """A bug in katapy."""


class Codes(NamedTuple):
    """How one class of error is said at each door.

    ``exit_status`` is the command line's; ``rpc`` is the google.rpc.Code that gRPC and ttrpc share.
    """

    exit_status: int
    rpc: int


_CODES: Final[dict[type[KatapyError], Codes]] = {
    KatapyError: Codes(1, 2),
    InvalidArgument: Codes(1, 3),
    NotFound: Codes(1, 5),
    CommandNotFound: Codes(127, 5),
    AlreadyExists: Codes(1, 6),
    InvalidState: Codes(1, 9),
    PermissionDenied: Codes(1, 7),
    CommandNotExecutable: Codes(126, 7),
    Timeout: Codes(1, 4),
    Unsupported: Codes(1, 12),
    Unavailable: Codes(1, 14),
    NotStarted: Codes(1, 14),
    OutcomeUnknown: Codes(1, 14),
    Internal: Codes(1, 13),
}
_BY_NAME: Final = {cls.__name__: cls for cls in _CODES}
# Where several classes share a code, the first in the table is the general one.
_BY_RPC: Final = {codes.rpc: cls for cls, codes in reversed(_CODES.items())}


def codes_of(error: BaseException) -> Codes:
    """Return the codes of an exception; anything that is not a KatapyError is an internal error."""
    for cls in type(error).__mro__:
        if cls in _CODES:
            return _CODES[cls]
    return _CODES[Internal]


def from_wire(rpc: int, name: str, message: str) -> KatapyError:
    """Rebuild an error that came over gRPC or ttrpc.

    ``name`` is the sender's class name (untrusted; used only if it is one of ours and has this code),
    ``rpc`` the google.rpc.Code, ``message`` the text.
    """
    named = _BY_NAME.get(name)
    if named is not None and _CODES[named].rpc == rpc:
        return named(message)
    return _BY_RPC.get(rpc, KatapyError)(message)
