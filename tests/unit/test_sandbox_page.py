"""docs/sandbox.md is complete and true: limits with their parameters and attacks, verdicts, errors."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import katapy
from katapy.cli.sandbox import sandbox
from katapy.sdk.limits import Limits
from katapy.sdk.sandbox import RunOptions, Sandbox
from katapy.verdict import KilledBy

TOP = Path(__file__).parents[2]
PAGE = (TOP / "docs/sandbox.md").read_text()


def _table(title: str) -> list[list[str]]:
    """Return the rows of the first table below a title."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows[2:] if "---" not in row]


def test_each_limit_is_there_with_its_parameter_its_option_and_its_default() -> None:
    parameters = inspect.signature(Sandbox).parameters
    options = {name: option for option in sandbox.params for name in option.opts}
    named = set()
    for _, names, default, *_ in _table("Limits"):
        parameter, option = re.findall(r"`([^`]+)`", names)
        value = parameters[parameter].default
        assert option in options
        if isinstance(value, int | float):
            assert default.split()[0] == f"{value:g}"
        elif isinstance(value, str):
            assert default == value.replace("M", " MiB")
        named.add(parameter)
    assert named == {*Limits.__dataclass_fields__, "timeout", "cpu_time", "network"}


def test_each_attack_is_there() -> None:
    files = [TOP / f"tests/functional/test_sandbox_{name}.py" for name in ("attacks", "runs")]
    found = set(re.findall(r"^def (test_\w+)", "\n".join(file.read_text() for file in files), re.MULTILINE))
    for limit, *_, attacks in _table("Limits"):
        named = set(re.findall(r"`(\w+)`", attacks))
        assert named, limit
        assert named <= found


def test_each_verdict_is_there() -> None:
    named = {name for row in _table("The verdict") for name in re.findall(r"`(\w+)`", row[0])}
    assert set(KilledBy) <= named


def test_each_error_is_there() -> None:
    named = {name for row in _table("Errors") for name in re.findall(r"`(\w+)`", row[0])}
    assert named <= set(katapy.__all__)
    classes = {name: getattr(katapy, name) for name in katapy.__all__ if name[0].isupper()}
    errors = {name for name, each in classes.items() if issubclass(each, katapy.KatapyError)}
    # The base of all, and what only a second pool in one place meets.
    assert errors - named == {"KatapyError", "AlreadyExists"}


def test_each_option_of_a_run_is_there() -> None:
    section = PAGE.split("\n### Run a command\n")[1].split("\n### ")[0]
    named = set(re.findall(r"`(\w+)`", section))
    signature = {name for name in inspect.signature(Sandbox.run).parameters if name not in ("self", "options")}
    assert RunOptions.__annotations__.keys() | signature - {"text"} <= named
