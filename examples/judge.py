#!/usr/bin/env python3
"""A judge: runs a program that somebody has submitted on each test's input, in a VM, and says what became of it.

    examples/judge.py examples/sum/submission.py examples/sum --cpu 5 --memory 64M --output 64K --meta /tmp/verdicts

A test is two files, NAME.in and NAME.out. With --meta there is a DIR/NAME.meta for each afterwards: in the grammar of
isolate's meta file, which contest systems read. To be run as root.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from katapy import Result, Sandbox


def main() -> None:
    """Judge one program."""
    parser = argparse.ArgumentParser(description="Judge a Python program.")
    parser.add_argument("submission", type=Path)
    parser.add_argument("tests", type=Path)
    parser.add_argument("--cpu", type=float, default=5, help="seconds of CPU time for a test")
    parser.add_argument("--memory", default="64M")
    parser.add_argument("--output", default="64K")
    parser.add_argument("--meta", type=Path, metavar="DIR")
    options = parser.parse_args()

    # With fresh=True each test has a VM of its own, so that none can leave anything for the next.
    sandbox = Sandbox(
        ro={options.submission: "/submission.py"},
        fresh=True,
        user="65534:65534",
        cpu_time=options.cpu,
        timeout=10 * options.cpu,  # also a program that only sleeps comes to an end
        memory=options.memory,
        output=options.output,
        processes=16,
        disk="16M",
    )
    for test in sorted(options.tests.glob("*.in")):
        result = sandbox.run(["python3", "/submission.py"], input=test.read_bytes())
        status, message = judge(result, test.with_suffix(".out").read_text())
        print(f"{test.stem:10} {status}  {message}".rstrip())
        if options.meta:
            options.meta.mkdir(parents=True, exist_ok=True)
            (options.meta / f"{test.stem}.meta").write_text(result.verdict.to_meta())


def judge(result: Result[str], wanted: str) -> tuple[str, str]:
    """Return OK, WA (wrong answer), or isolate's RE, SG, TO or XX, and why."""
    meta = dict(line.split(":", 1) for line in result.verdict.to_meta().splitlines())
    if "status" in meta:
        return meta["status"], meta["message"]
    if result.stdout.split() != wanted.split():
        return "WA", f"{result.stdout.strip()[:40]!r} instead of {wanted.strip()[:40]!r}"
    return "OK", ""


if __name__ == "__main__":
    main()
