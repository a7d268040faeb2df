"""The bench's report: tables, the page that they are written into, and the comparison with a baseline."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
from figures import BenchError, Series, Unit
from report import SCHEMA, as_json, as_toml, compare, replace_between_markers, tables


def document(*katapy: float, **machine: str) -> dict[str, Any]:
    series = [
        Series("start", "bare VM", Unit.SECONDS, (1.0,)),
        Series("start", "run true", Unit.SECONDS, katapy, beside="bare VM"),
        Series("memory", "whole pod", Unit.BYTES, (1 << 20,), beside="not measured"),
    ]
    return {
        "schema": SCHEMA,
        "date": "2026-01-02T03:04:05+00:00",
        "machine": {"cpu": "One", "cores": "2", "accelerator": "tcg", **machine},
        "versions": {"katapy": "1.0", "commit": "abc", "qemu": "QEMU 7", "guest kernel": "6.1"},
        "plan": {"runs": 3, "long_runs": 2},
        "notes": ["memory: only 3 pods"],
        "series": as_json(series),
    }


def test_json_has_values_summaries_and_ratios() -> None:
    _, run, pod = document(2, 3, 4)["series"]
    assert (run["values"], run["summary"]["median"], run["ratio"]["maximum"]) == ([2, 3, 4], 3, 4)
    assert (run["beside"], pod["beside"], pod["ratio"]) == ("bare VM", None, None)


def test_tables() -> None:
    text = tables(document(2, 3, 4))
    assert "Measured on 2026-01-02 in 3 rounds" in text
    assert "katapy 1.0 (abc), QEMU 7,\nguest kernel 6.1 and no runc, on:" in text
    assert "* cpu: One\n* cores: 2\n" in text
    assert "* memory: only 3 pods" in text
    assert text.index("### Start") < text.index("### Memory")
    assert "| bare VM | 1.00 s |  |  |  |  |\n" in text
    assert "| run true | 3.00 s | 2.50 s to 3.50 s | 2.00 s to 4.00 s | **3** (2.5 to 3.5) | bare VM |\n" in text
    assert "| whole pod | 1.0 MiB |  |  |  |  |\n" in text
    assert "Streams" not in text


def test_the_spread_of_what_moves_bytes_goes_up() -> None:
    report = document(1)
    report["series"] = as_json([Series("streams", "stdout", Unit.SECONDS, (1.0, 2.0, 4.0), moved=4_000_000)])
    assert "| stdout | 2 MB/s | 1.33 MB/s to 2.67 MB/s | 1 MB/s to 4 MB/s |  |  |\n" in tables(report)


def test_only_what_is_worse_than_the_baseline_is_said() -> None:
    assert compare(document(3), document(2)) == ["start: run true is 1.5 times the baseline's ratio"]
    for katapy in (2.1, 1.0):
        assert compare(document(katapy), document(2)) == []


def test_what_the_baseline_does_not_have_is_passed_over() -> None:
    baseline = document(2)
    baseline["series"] = []
    assert compare(document(9), baseline) == []


def test_a_baseline_of_something_else_is_named() -> None:
    assert compare(document(2), {}) == ["the baseline was made by another version of the bench"]
    assert compare(document(2), document(2, accelerator="kvm")) == [
        "the baseline was made with another accelerator: kvm"
    ]


PAGE = "# Title\n\n<!-- bench: written by `make bench` from here -->\nold\n<!-- bench: to here -->\n\nProse.\n"


def test_prose_around_the_figures_stays() -> None:
    once = replace_between_markers(PAGE, "new\n")
    assert once.startswith("# Title\n\n<!--")
    assert once.endswith("here -->\n\nProse.\n")
    assert "\n\nnew\n\n" in once
    assert "old" not in once
    assert replace_between_markers(once, "new\n") == once


@pytest.mark.parametrize("page", ["", PAGE.replace("to here", "there"), PAGE.replace("from here", "there")])
def test_a_page_without_a_place_for_figures_is_refused(page: str) -> None:
    with pytest.raises(BenchError, match="the page has no <!-- bench"):
        replace_between_markers(page, "new")


def test_configurations_become_one() -> None:
    files: list[dict[str, dict[str, Any]]] = [
        {"hypervisor": {"memory": "256M", "kernel_params": ['a="b\\c"']}},
        {"hypervisor": {"memory": "1G", "vcpus": 2}, "runtime": {"data_dir": "/ä"}},
    ]
    merged = tomllib.loads(as_toml(files, {"hypervisor": {"template": False}}))
    assert merged == {
        "hypervisor": {"memory": "1G", "kernel_params": ['a="b\\c"'], "vcpus": 2, "template": False},
        "runtime": {"data_dir": "/ä"},
    }
