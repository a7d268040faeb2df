"""katapy: every pod in its own virtual machine, behind the interface of an OCI runtime, and ``Sandbox``."""

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "Sandbox",
    "AsyncSandbox",
    "Process",
    "AsyncProcess",
    "Chunk",
    "Entry",
    "Result",
    "RunFailed",
    "Usage",
    "Verdict",
    "KilledBy",
    "KatapyError",
    "InvalidArgument",
    "NotFound",
    "CommandNotFound",
    "AlreadyExists",
    "InvalidState",
    "PermissionDenied",
    "CommandNotExecutable",
    "Timeout",
    "Unsupported",
    "Unavailable",
    "NotStarted",
    "OutcomeUnknown",
]

# Loaded when somebody asks for one: the command line has no use for most.
_MODULES = {
    "Sandbox": "katapy.sdk.sandbox",
    "AsyncSandbox": "katapy.sdk.aio",
    "AsyncProcess": "katapy.sdk.aio",
    "Process": "katapy.sdk.process",
    "Chunk": "katapy.sdk.process",
    "Entry": "katapy.sdk.files",
    "Result": "katapy.sdk.result",
    "RunFailed": "katapy.sdk.result",
    "Usage": "katapy.sdk.result",
    "Verdict": "katapy.verdict",
    "KilledBy": "katapy.verdict",
}

TYPE_CHECKING = False
if TYPE_CHECKING:
    from katapy.errors import (
        AlreadyExists,
        CommandNotExecutable,
        CommandNotFound,
        InvalidArgument,
        InvalidState,
        KatapyError,
        NotFound,
        NotStarted,
        OutcomeUnknown,
        PermissionDenied,
        Timeout,
        Unavailable,
        Unsupported,
    )
    from katapy.sdk.aio import AsyncProcess, AsyncSandbox
    from katapy.sdk.files import Entry
    from katapy.sdk.process import Chunk, Process
    from katapy.sdk.result import Result, RunFailed, Usage
    from katapy.sdk.sandbox import Sandbox
    from katapy.verdict import KilledBy, Verdict


def __getattr__(name: str) -> object:
    """Load what is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found: object = getattr(import_module(_MODULES.get(name, "katapy.errors")), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
