"""The bench's statistics, and what it reads of others' output."""

from __future__ import annotations

import json

import pytest
from figures import BenchError, Recorder, Series, Unit, format_ratio, format_value, ratio, ratios, summarize
from machine import parse_field
from memory import assign_parts, parse_pss
from start import Phase, parse_phases
from virtiofs import Timed, parse_output


def series(name: str, *values: float, beside: str | None = None, group: str = "start") -> Series:
    return Series(group, name, Unit.SECONDS, values, beside)


def test_a_summary_has_median_and_spread() -> None:
    assert summarize([5, 1, 2, 4, 3]) == (5, 1, 2, 3, 4, 5)
    assert summarize([7]) == (1, 7, 7, 7, 7, 7)


def test_the_same_rounds_are_compared_one_by_one() -> None:
    """A machine that slows down slows both: the medians' ratio would say 1.5 here."""
    assert ratios(series("a", 2, 4, 30), series("b", 1, 2, 15)) == [2, 2, 2]


def test_other_counts_are_compared_with_the_median() -> None:
    assert ratios(series("a", 2, 4), series("b", 1, 2, 9)) == [1, 2]


def test_a_ratio_is_to_the_series_of_the_same_group() -> None:
    mine = series("a", 6, beside="b")
    assert ratio(mine, [series("b", 1, group="cli"), series("b", 2), mine]) == summarize([3])


def test_there_is_no_ratio_to_what_was_not_measured() -> None:
    mine = series("a", 6, beside="a")
    for others in ([], [mine], [series("b", 1)], [series("a", 0)]):
        assert ratio(mine, others) is None


def test_what_is_recorded_keeps_its_order(capsys: pytest.CaptureFixture[str]) -> None:
    recorder = Recorder("start")
    for value in (1, 2):
        recorder.add("second", value)
        recorder.add("first", value, beside="second", moved=4_000_000)
    recorder.note("nothing was left out")
    assert recorder.series() == [
        Series("start", "second", Unit.SECONDS, (1, 2)),
        Series("start", "first", Unit.SECONDS, (1, 2), "second", 4_000_000),
    ]
    assert recorder.notes == ["start: nothing was left out"]
    assert "start: second: 1.00 s\nstart: first: 4 MB/s\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "unit", "moved", "text"),
    [
        (0.0123, "s", 0, "12.3 ms"),
        (0.9, "s", 0, "900 ms"),
        (1.234, "s", 0, "1.23 s"),
        (0.5, "s", 1_000_000_000, "2000 MB/s"),
        (0.0, "s", 1, "no time"),
        (3 << 20, "bytes", 0, "3.0 MiB"),
    ],
)
def test_values_as_people_read_them(value: float, unit: str, moved: int, text: str) -> None:
    assert format_value(value, unit, moved) == text


def test_ratios_as_people_read_them() -> None:
    assert [format_ratio(value) for value in (1234.5, 12.34, 1.234, 0.1234, 0.01234)] == [
        *("1234", "12.3", "1.23", "0.123", "0.012"),
    ]


def test_phases_of_a_start() -> None:
    phase = {"name": "restore", "start": 0.5, "end": 1}
    assert parse_phases(json.dumps({"phases": [phase], "total": 2})) == ([Phase("restore", 0.5, 1.0)], 2.0)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"phases": [{"name": "a"}], "total": 1}', '{"phases": [], "total": []}']
)
def test_phases_that_are_none(text: str) -> None:
    with pytest.raises(BenchError, match="cannot read the phases"):
        parse_phases(text)


WORK = "read 1.5 2.5\nwrite 3 3.25\nrandom 4 5\nuntar 5 7\n"


def test_what_the_work_says() -> None:
    assert parse_output(WORK) == [Timed("read", 1), Timed("write", 0.25), Timed("random", 1), Timed("untar", 2)]


@pytest.mark.parametrize("text", ["", "read 1.5 2.5\n", f"{WORK}sh: no space\n"])
def test_work_that_failed(text: str) -> None:
    with pytest.raises(BenchError, match="work"):
        parse_output(text)


def test_pss_is_read_in_bytes() -> None:
    assert parse_pss("55d0-7ffd ---p 0 00:00 0   [rollup]\nRss:   900 kB\nPss:   12 kB\nPss_Dirty:  3 kB\n") == 12 << 10


def test_a_process_belongs_to_the_nearest_part_above_it() -> None:
    parents = {1: 0, 10: 1, 11: 10, 12: 11, 20: 1, 30: 1, 31: 10}
    assert assign_parts(parents, {10: "shim", 11: "virtiofsd", 20: "stand-in"}) == {
        10: "shim",
        31: "shim",
        11: "virtiofsd",
        12: "virtiofsd",
        20: "stand-in",
    }


def test_fields_of_proc() -> None:
    assert parse_field("processor\t: 0\nmodel name\t: One: fast\nmodel name\t: Two\n", "model name") == "One: fast"
    assert parse_field("MemTotal:  100 kB\n", "MemFree") == ""
