"""The examples of the SDK run, and print exactly this."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness import DEADLINE

pytestmark = pytest.mark.usefixtures("host")
EXAMPLES = Path(__file__).parents[2] / "examples"


def _run(name: str, *args: str | Path, stdin: str = "") -> str:
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *args], input=stdin, capture_output=True, text=True, timeout=2 * DEADLINE
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_judge(tmp_path: Path) -> None:
    """What is said on stdout, and what isolate's readers are told."""
    assert _run("judge.py", EXAMPLES / "sum/submission.py", EXAMPLES / "sum", "--meta", tmp_path / "meta") == (
        "1-small    OK\n"
        "2-one      WA  '[5]' instead of '5'\n"
        "3-word     RE  Exited with error status 1\n"
        "4-large    TO  Time limit exceeded\n"
        "5-negative SG  Output limit exceeded\n"
        "6-many     SG  Memory limit exceeded, says the guest\n"
    )
    meta = {
        path.stem: dict(line.split(":", 1) for line in path.read_text().splitlines())
        for path in (tmp_path / "meta").iterdir()
    }
    measured = {"time", "time-wall", "max-rss", "cg-mem"}
    assert {
        name: {key: value for key, value in lines.items() if key not in measured} for name, lines in meta.items()
    } == {
        "1-small": {"exitcode": "0"},
        "2-one": {"exitcode": "0"},
        "3-word": {"exitcode": "1", "status": "RE", "message": "Exited with error status 1"},
        "4-large": {"status": "TO", "message": "Time limit exceeded", "killed": "1"},
        "5-negative": {"exitsig": "9", "status": "SG", "message": "Output limit exceeded", "killed": "1"},
        "6-many": {
            "cg-oom-killed": "1",
            "exitsig": "9",
            "status": "SG",
            "message": "Memory limit exceeded, says the guest",
        },
    }
    assert all({"time", "time-wall"} <= lines.keys() for lines in meta.values())
    # Of what the host has ended the guest may have been too slow to tell.
    assert all(measured <= lines.keys() for lines in meta.values() if "killed" not in lines)


def test_the_tool_of_an_agent() -> None:
    call = {"code": "print(open('in.txt').read().upper())", "files": {"in.txt": "text"}}
    assert json.loads(_run("agent_tool.py", stdin=json.dumps(call))) == {
        "ok": True,
        "exit_code": 0,
        "killed_by": "none",
        "stdout": "TEXT\n",
        "stderr": "",
    }
    answer = json.loads(_run("agent_tool.py", stdin=json.dumps({"code": "print('x' * 10000); 1 / 0"})))
    assert (answer["ok"], answer["exit_code"], answer["killed_by"]) == (False, 1, "none")
    assert answer["stdout"] == "x" * 2000 + "\n[…]\n" + "x" * 1999 + "\n"
    assert answer["stderr"].endswith("ZeroDivisionError: division by zero\n")


def test_the_tool_tells_a_model_what_it_got_wrong() -> None:
    answer = json.loads(_run("agent_tool.py", stdin='{"kode": "1"}'))
    assert not answer["ok"]
    # Newer Pythons say what may have been meant.
    assert answer["error"].startswith("run_python() got an unexpected keyword argument 'kode'")


def test_the_notebook() -> None:
    """A cell that heeds no interrupt takes the session with it; what it has written stays."""
    assert _run("notebook.py") == (
        "[1] done\n"
        "[2] done\n"
        "42\n"
        "[3] interrupted\n"
        "waiting\n"
        "[4] failed\n"
        "ZeroDivisionError: division by zero\n"
        "[5] lost\n"
        "no\n"
        "[6] failed\n"
        "NameError: name 'x' is not defined\n"
        "[7] done\n"
        "'kept'\n"
    )
