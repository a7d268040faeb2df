"""The table of docs/testing.md claims what ran, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import feature_table
from features import FEATURES, HARDWARE, features_of

SOURCE = Path(__file__).parents[2]
KVM = {"accelerator": "kvm", "vsock": "kernel", "cgroup": "v2", "kernel": "debian"}
TCG = {"accelerator": "tcg", "vsock": "user", "cgroup": "v1", "kernel": "debian"}
RUN = "tests/functional/test_run.py::test_create_then_start"


def lines(*events: dict[str, object]) -> list[str]:
    return [json.dumps(event) for event in events]


def row(table: str, feature: str) -> list[str]:
    (found,) = (line for line in table.splitlines() if line.startswith(f"| {feature} |"))
    return [cell.strip() for cell in found.strip("|").split("|")[1:]]


def test_a_cell_is_what_passed_there() -> None:
    outcomes = feature_table.parse(
        lines(
            {"host": KVM},
            {"began": f"{RUN}[a]"},
            {"test": f"{RUN}[a]", "outcome": "passed"},
            {"test": f"{RUN}[b]", "outcome": "skipped"},
            {"test": "tests/functional/test_other.py::test_x", "outcome": "passed"},
            {"began": f"{RUN}[c]"},
            {"host": TCG},
            {"test": f"{RUN}[a]", "outcome": "passed"},
            {"test": f"{RUN}[b]", "outcome": "passed"},
            {"test": f"{RUN}[c]", "outcome": "passed"},
            {"test": f"{RUN}[c]", "outcome": "failed"},  # its fixtures' end
        )
    )
    table = feature_table.render(outcomes)
    assert row(table, "run and exit status") == ["2", "1"]
    assert row(table, "cold start") == ["", ""]
    assert table.count("\n* ") == 14
    assert "* KVM, kernel vsock, cgroup v2, debian kernel\n" not in table


def test_the_page_has_the_features_of_today() -> None:
    page = feature_table.PAGE.read_text()
    for feature in FEATURES | HARDWARE:
        row(page, feature)


def test_each_test_that_shows_a_feature_exists() -> None:
    for feature, tests in (FEATURES | HARDWARE).items():
        for test in tests:
            path, _, name = test.partition("::")
            text = (SOURCE / path).read_text()
            assert not name or f"def {name.partition('[')[0]}(" in text, test
            assert feature in features_of(test)
