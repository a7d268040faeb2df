"""Writes the table of docs/testing.md: which feature was seen to work on which sort of host.

feature_table.py [RESULTS...]. RESULTS are files of what tests did (tests/record.py), by default those that `make test`
and `make lab` have left in build/. A cell is the number of tests that passed there; what did not run has none. Where a
test failed nothing is written, and the exit status is 1.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

SOURCE: Final = Path(__file__).resolve().parents[1]
PAGE: Final = SOURCE / "docs/testing.md"
_RESULTS: Final = ("build/results/*.jsonl", "build/lab-results/*/events.jsonl")
_BETWEEN: Final = re.compile(r"(?<=<!-- features -->\n).*(?=<!-- /features -->)", re.DOTALL)
sys.path.insert(0, str(SOURCE / "tests"))

from features import FEATURES, HARDWARE, features_of  # noqa: E402


class Host(NamedTuple):
    """What a run of tests ran on."""

    accelerator: str
    vsock: str
    cgroup: str
    kernel: str

    def title(self) -> str:
        """Return the head of its column."""
        return f"{self.accelerator.upper()}, {self.vsock} vsock, cgroup {self.cgroup}, {self.kernel} kernel"


_VALUES: Final = (("tcg", "kvm"), ("user", "kernel"), ("v1", "v2"), ("debian", "tuned"))
Outcomes = dict[tuple[Host, str], str]


def parse(lines: Iterable[str]) -> Outcomes:
    """Return how each test ended on each host, the last time that it ran there."""
    outcomes: Outcomes = {}
    host = None
    for line in lines:
        event: dict[str, Any] = json.loads(line)
        if "host" in event:
            host = Host(**event["host"])
        elif "test" in event and host is not None:
            test = str(event["test"])
            # One that fails when all is over has passed before.
            outcomes[host, test] = str(event["outcome"])
    return outcomes


def render(outcomes: Outcomes) -> str:
    """Return the table, and which sorts of host have no column in it."""
    hosts = sorted({host for host, _ in outcomes}, key=_order)
    rows = [["feature", *(host.title() for host in hosts)], ["---"] * (len(hosts) + 1)]
    for feature in FEATURES | HARDWARE:
        passed = {
            host: sum(
                outcome == "passed" and feature in features_of(test)
                for (where, test), outcome in outcomes.items()
                if where == host
            )
            for host in hosts
        }
        rows.append([feature, *(str(passed[host] or "") for host in hosts)])
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    missing = [host.title() for host in map(Host._make, itertools.product(*_VALUES)) if host not in hosts]
    return f"\n{table}\nNo results from:\n\n" + "".join(f"* {title}\n" for title in missing) + "\n"


def _order(host: Host) -> list[int]:
    return [values.index(value) for values, value in zip(_VALUES, host, strict=True)]


def _lines(names: Iterable[str]) -> Iterator[str]:
    paths = [Path(name) for name in names] or sorted(path for each in _RESULTS for path in SOURCE.glob(each))
    for path in paths:
        yield from path.read_text().splitlines()


def main() -> None:
    """Write the table."""
    outcomes = parse(_lines(sys.argv[1:]))
    failed = sorted({test for (_, test), outcome in outcomes.items() if outcome == "failed" and features_of(test)})
    if failed or not outcomes:
        sys.exit(f"{PAGE} stays as it is: {'failed: ' + ', '.join(failed) if failed else 'there are no results'}")
    page, found = _BETWEEN.subn(lambda _: render(outcomes), PAGE.read_text())
    assert found == 1
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
