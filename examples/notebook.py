#!/usr/bin/env python3
"""A notebook's session: cells that share their names, in one process in a VM, each with its time.

    examples/notebook.py        # runs the cells below

A cell that takes too long is interrupted, as by Ctrl-C, and the session goes on. One that does not heed that is killed
with the session, and the next cell begins a new one: what was in memory is lost, files are not. To be run as root.
"""

from __future__ import annotations

import json
import secrets
import signal
import time
from typing import Any, NamedTuple

from katapy import Process, Sandbox, Timeout

# What runs in the sandbox: takes cells as lines of JSON, prints what they print, and after each its mark and its end.
DRIVER = """
import ast, json, os, signal, sys, traceback
os.dup2(1, 2)
signal.signal(signal.SIGINT, signal.SIG_IGN)
names = {"__name__": "__main__"}
for line in sys.stdin:
    cell, how = json.loads(line), "done"
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            body = ast.parse(cell["code"], "<cell>").body
            last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
            exec(compile(ast.Module(body, []), "<cell>", "exec"), names)
            value = last and eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
            if value is not None:
                print(repr(value))
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    except KeyboardInterrupt:
        how = "interrupted"
    except BaseException as error:
        print(*traceback.format_exception_only(error), sep="", end="")
        how = "failed"
    print(cell["mark"] + how, flush=True)
"""


class Cell(NamedTuple):
    """What became of a cell: ``how`` is done, failed, interrupted, or lost, and then its session is, too."""

    output: str
    how: str


class Notebook:
    """A session; a context manager that ends it."""

    def __init__(self, **options: Any) -> None:
        """``options`` are those of a Sandbox."""
        self._sandbox = Sandbox(**options)
        self._process: Process | None = None

    def __enter__(self) -> Notebook:
        self._sandbox.open()
        return self

    def __exit__(self, *_: object) -> None:
        self._sandbox.close()

    def run(self, code: str, *, timeout: float = 60, grace: float = 10) -> Cell:
        """Run a cell. After ``timeout`` seconds it is interrupted, and killed if it goes on for ``grace`` seconds."""
        if self._process is None:
            self._process = self._sandbox.start(["python3", "-u", "-c", DRIVER], timeout=None)
        mark = f"\0{secrets.token_hex(16)} "
        self._process.write(json.dumps({"code": code, "mark": mark}).encode() + b"\n")
        output, ends = b"", [time.monotonic() + timeout, time.monotonic() + timeout + grace]
        while not output.endswith(b"\n") or mark.encode() not in output:
            try:
                chunk = self._process.read(max(ends[0] - time.monotonic(), 0))
            except Timeout:
                del ends[0]
                if ends:
                    self.interrupt()
                    continue
                self._process.kill()
                chunk = None
            if chunk is None:  # it has ended
                self._process = None
                return Cell(output.decode(errors="replace"), "lost")
            output += chunk.data
        text, _, how = output.decode(errors="replace").rpartition(mark)
        return Cell(text, how.rstrip())

    def interrupt(self) -> None:
        """Interrupt the cell that runs, as Ctrl-C does; any thread may do that."""
        if self._process is not None:
            self._process.send_signal(signal.SIGINT)


def main() -> None:
    """Run some cells."""
    cells: list[tuple[str, float]] = [
        ("x = 6\nwith open('/note', 'w') as note: print('kept', end='', file=note)", 60),
        ("x * 7", 60),
        ("import time\nprint('waiting')\ntime.sleep(1000)", 8),
        ("x / 0", 60),
        ("while True:\n    try: time.sleep(1000)\n    except KeyboardInterrupt: print('no')", 8),
        ("x", 60),
        ("open('/note').read()", 60),
    ]
    with Notebook(memory="256M") as notebook:
        for number, (code, seconds) in enumerate(cells, 1):
            cell = notebook.run(code, timeout=seconds)
            print(f"[{number}] {cell.how}\n{cell.output}", end="")


if __name__ == "__main__":
    main()
