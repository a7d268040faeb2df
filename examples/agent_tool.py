#!/usr/bin/env python3
"""A tool for an agent: what a language model has written is run in a VM, and it is told what came of it.

    echo '{"code": "print(6 * 7)"}' | examples/agent_tool.py

``TOOL`` describes the function to the model; ``call_tool`` takes the arguments that the model gives, and returns what
goes back to it. To be run as root.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from katapy import Sandbox

# As much as is worth a model's attention.
SHOWN = 4000
TOOL = {
    "name": "run_python",
    "description": "Run Python 3 code, without network, in a machine that is thrown away afterwards.",
    "input_schema": {
        "type": "object",
        "properties": {
            "code": {"type": "string", "description": "The program; what it prints is the result."},
            "files": {
                "type": "object",
                "additionalProperties": {"type": "string"},
                "description": "Text files that it finds in its directory, by name.",
            },
        },
        "required": ["code"],
    },
}


def run_python(code: str, files: dict[str, str] | None = None) -> dict[str, Any]:
    """Run ``code``: whatever it does is an answer, and not an exception."""
    with Sandbox(memory="256M", timeout=60, cwd="/work", output="1M") as sandbox:
        for name, text in (files or {}).items():
            sandbox.files.write(f"/work/{name}", text)
        result = sandbox.run(["python3", "-c", code])
    return {
        "ok": result.ok,
        "exit_code": result.exit_code,
        "killed_by": result.killed_by,
        "stdout": shorten(result.stdout),
        "stderr": shorten(result.stderr),
    }


def call_tool(arguments: str) -> str:
    """Answer a call, JSON for JSON: a model may also get the arguments wrong."""
    try:
        answer = run_python(**json.loads(arguments))
    except (TypeError, ValueError) as error:
        answer = {"ok": False, "error": str(error)}
    return json.dumps(answer, indent=2)


def shorten(text: str) -> str:
    """Return the beginning and the end of a text."""
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]}\n[…]\n{text[-SHOWN // 2 :]}"


if __name__ == "__main__":
    print(call_tool(sys.stdin.read()))
