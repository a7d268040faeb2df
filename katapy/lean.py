"""Keeps out of a process what its libraries import without need: a tenth of the time that a start takes on the host."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType


def skip_python_messages() -> None:
    """Import protobuf, whose messages are C here, without its pure Python ones. Call before anything imports it."""
    unused = "google.protobuf.internal.python_message"
    sys.modules.setdefault(unused, ModuleType(unused))


def skip_ssl() -> None:
    """Import asyncio, and let others be imported later, without ssl: no connection of katapy's is encrypted.

    asyncio does without it; qemu.qmp wants the name of one class. Call before anything imports either.
    """
    if "ssl" not in sys.modules:
        sys.modules["ssl"] = None  # type: ignore[assignment]
        importlib.import_module("asyncio")
        stub = sys.modules["ssl"] = ModuleType("ssl")
        stub.SSLContext = type("SSLContext", (), {})  # type: ignore[attr-defined]
