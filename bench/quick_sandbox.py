"""What the bench tells quick-sandbox, a VM sandbox from PyPI; the Python of its own virtual environment runs this.

Its image of Alpine is part of its packages, and has no Python: it prints with the shell, which is less than is asked of
the others. It takes KVM for there where it finds a module of that name, so it is told what katapy has found. The one
line that is printed is a JSON object of seconds, ``first`` and ``next``; it is there while standard input is open.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from quicksand import Sandbox  # type: ignore[import-not-found]


async def main(accelerator: str) -> None:
    """Start one, run the command twice, and wait."""
    began = time.monotonic()
    async with Sandbox(image="alpine", accel=accelerator) as sandbox:
        took = {}
        for name in ("first", "next"):
            result = await sandbox.execute("echo 1")
            if (result.exit_code, result.stdout) != (0, "1\n"):
                sys.exit(f"quick-sandbox: {result!r}")
            took[name] = time.monotonic() - began
            began = time.monotonic()
        print(json.dumps(took), flush=True)
        await asyncio.to_thread(sys.stdin.buffer.read)


asyncio.run(main(sys.argv[1]))
