"""How the builders run programs and say what they do: one line on stderr for each step, one line for what failed.

Standard library only: the builders run before anything is installed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

# Fixed, so that what is built does not depend on who builds: only the way to the network is the caller's.
_CALLERS: Final = ("HOME", "TMPDIR", "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_ENVIRONMENT: Final = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
    "PYTHONHASHSEED": "0",
    "SOURCE_DATE_EPOCH": "0",
    "TZ": "UTC",
}


class BuildError(Exception):
    """The build cannot go on; its text is fit for a user."""


@contextmanager
def step(what: str) -> Iterator[None]:
    """Print how long ``what`` took, when it is done."""
    began = time.monotonic()
    yield
    print(f"  {what:<44} {time.monotonic() - began:5.1f} s", file=sys.stderr, flush=True)


def call(argv: Sequence[str | Path], *, cwd: Path = Path("/"), stdin: bytes = b"") -> str:
    """Run a program to its end and return its standard output. Raises BuildError with its last words."""
    program = str(argv[0])
    if shutil.which(program, path=_ENVIRONMENT["PATH"]) is None:
        raise BuildError(f"{program} is missing; run: scripts/setup packages")
    callers = {name: value for name, value in os.environ.items() if name in _CALLERS or name.startswith("PIP_")}
    # What it does is of no use to anybody when the builder is gone, killed or not.
    with subprocess.Popen(
        ["/usr/bin/setpriv", "--pdeathsig=TERM", "--", *map(str, argv)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=cwd,
        env=callers | _ENVIRONMENT,
    ) as process:
        output, errors = process.communicate(stdin)
    if process.returncode != 0:
        tail = "\n    ".join((errors or output).decode(errors="replace").strip().splitlines()[-8:])
        raise BuildError(f"{program} failed with status {process.returncode}:\n    {tail}")
    return output.decode(errors="replace")


def require_space(directory: Path, size: int) -> None:
    """Raise BuildError unless ``directory`` has ``size`` bytes to give."""
    free = shutil.disk_usage(directory).free
    if free < size:
        raise BuildError(f"{directory} has {free >> 20} MiB free, and {size >> 20} MiB are needed")


def run_main(main: Callable[[], None]) -> NoReturn:
    """Run a builder and exit: 0, or 1 after one line that says what failed."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        main()
    except BuildError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename or ''}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _terminate(number: int, _frame: FrameType | None) -> NoReturn:
    # katapy gives the builder a process group of its own: everything that runs in it ends and tidies up.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGTERM)
    sys.exit(128 + number)
