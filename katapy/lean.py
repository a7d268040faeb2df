"""Keeps out of a process what its libraries import without need: a tenth of the time that a start takes on the host."""

from __future__ import annotations

import sys
from types import ModuleType


def skip_python_messages() -> None:
    """Import protobuf, whose messages are C here, without its pure Python ones. Call before anything imports it."""
    unused = "google.protobuf.internal.python_message"
    sys.modules.setdefault(unused, ModuleType(unused))


def skip_openssl() -> None:
    """Import asyncio, and let others be imported later, without OpenSSL, whose library alone takes 3 MiB.

    No connection of katapy's is encrypted: asyncio does without ssl, and qemu.qmp wants the name of one class. Python
    has hashes of its own. Call before anything imports asyncio, hashlib or qemu.qmp.
    """
    if "ssl" not in sys.modules:
        sys.modules["ssl"] = None  # type: ignore[assignment]
        sys.modules.setdefault("_hashlib", None)  # type: ignore[arg-type]
        import asyncio  # noqa: F401

        stub = sys.modules["ssl"] = ModuleType("ssl")
        stub.SSLContext = type("SSLContext", (), {})  # type: ignore[attr-defined]


def skip_pyroute2_package() -> None:
    """Import single modules of pyroute2 without the package's own ``__init__``, which imports all that there are.

    Call before anything imports pyroute2.
    """
    if "pyroute2" not in sys.modules:
        import importlib.util

        found = importlib.util.find_spec("pyroute2")
        if found is None or found.submodule_search_locations is None:
            raise ModuleNotFoundError("No module named 'pyroute2'", name="pyroute2")
        stub = sys.modules["pyroute2"] = ModuleType("pyroute2")
        stub.__path__ = list(found.submodule_search_locations)
