"""The program `katapy`: the usual forms of `state` and `list` are answered here, all else is the command line's.

Engines ask for the state all the time, and reading a file takes far less time than importing click does. Only what is
surely meant and goes well is answered here. At anything else, an option that is not known here, an error, a stream
that is closed, the command line begins anew, as if nothing had been tried.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final

# Global options that these verbs need not look into, and the values that are fine; None is any.
_OPTIONS: Final[dict[str, tuple[str, ...] | None]] = {
    "--root": None,
    "--log": None,
    "--log-format": ("text", "json"),
    "--rootless": ("auto", "false"),
    "--config": None,
}
_FLAGS: Final = ("--systemd-cgroup",)
_STARTERS: Final = ("run", "create")
_HELP: Final = frozenset(("-h", "--help"))
# What may follow `list`: the style, and whether only ids are wanted.
_LISTS: Final[dict[tuple[str, ...], tuple[str, bool]]] = {
    (): ("table", False),
    ("-q",): ("table", True),
    ("--quiet",): ("table", True),
    ("--format", "table"): ("table", False),
    ("--format", "json"): ("json", False),
    ("-f", "table"): ("table", False),
    ("-f", "json"): ("json", False),
}


def main() -> None:
    """Run the program and exit."""
    usual = sys.stdin and sys.stdout and sys.stderr and "_KATAPY_COMPLETE" not in os.environ
    text = quick_answer(sys.argv[1:]) if usual else None
    if text is None:
        _run(preloading=bool(usual) and needs_shim(sys.argv[1:]))
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has left; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)


def _run(*, preloading: bool) -> None:
    import signal  # what is answered quickly does without it

    from katapy import lean

    # Whoever started us may ignore it, as PID 1 of a container may: no status of a child would be known then.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    lean.skip_python_messages()
    if not preloading:
        from katapy.cli import main as command_line

        command_line()
        return
    from contextlib import suppress

    from katapy import preload
    from katapy.errors import KatapyError

    # Whoever needs it starts it again, and says why that cannot be.
    with suppress(KatapyError, OSError):
        preload.begin()
    try:
        from katapy.cli import main as command_line

        command_line()
    finally:
        preload.drop()


def needs_shim(arguments: Sequence[str]) -> bool:
    """Tell whether these are likely to start a shim: to load it meanwhile is worth it then."""
    _options, verb, rest = _split(arguments, flags=(*_FLAGS, "--debug"))
    return verb in _STARTERS and os.geteuid() == 0 and not _HELP.intersection(rest)


def quick_answer(arguments: Sequence[str]) -> str | None:
    """Return what `state` or `list` prints; None where the command line has to look at the arguments."""
    options, verb, rest = _split(arguments)
    is_state = verb == "state" and len(rest) == 1 and not rest[0].startswith("-")
    is_list = verb == "list" and rest in _LISTS
    if not (is_state or is_list):
        return None
    from katapy.errors import KatapyError
    from katapy.listing import list_text, state_text
    from katapy.state import DEFAULT_ROOT

    root = os.path.abspath(options.get("--root", DEFAULT_ROOT))
    try:
        _touch_log(options.get("--log"))
        if is_state:
            return state_text(root, rest[0])
        style, quiet = _LISTS[rest]
        text, errors = list_text(root, style=style, quiet=quiet)
    except (KatapyError, OSError, ValueError):
        return None
    return None if errors else text


def _split(
    arguments: Sequence[str],
    flags: Sequence[str] = _FLAGS,
) -> tuple[dict[str, str], str, tuple[str, ...]]:
    """Return the global options, the verb and what follows it; no verb where an option is not known here."""
    found: dict[str, str] = {}
    left = iter(arguments)
    for argument in left:
        if not argument.startswith("-"):
            return found, argument, tuple(left)
        if argument in flags:
            continue
        name, equals, value = argument.partition("=")
        if not equals:
            value = next(left, "")
        if name not in _OPTIONS or not value or value not in (_OPTIONS[name] or (value,)):
            break
        found[name] = value
    return found, "", ()


def _touch_log(path: str | None) -> None:
    """Make the log file, as every verb does that has one."""
    if path is not None:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY, 0o600))
