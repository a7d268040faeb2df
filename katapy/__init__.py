"""katapy: every pod in its own virtual machine, behind the interface of an OCI runtime, and ``Sandbox``."""

__version__ = "0.1.0"
__all__ = ["Sandbox", "__version__"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from katapy.sdk.sandbox import Sandbox


def __getattr__(name: str) -> object:
    """Load the SDK when it is asked for: the command line has no use for it."""
    if name == "Sandbox":
        from katapy.sdk.sandbox import Sandbox

        return Sandbox
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
