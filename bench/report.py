"""The report: series as JSON and as tables, and the comparison of two reports by their ratios."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Final

from figures import BenchError, Series, format_ratio, format_value, ratio, summarize

SCHEMA: Final = 1
# Medians of a few rounds on a shared machine differ by this without any cause.
TOLERANCE: Final = 1.25
_BEGIN: Final = "<!-- bench: written by `make bench` from here -->"
_END: Final = "<!-- bench: to here -->"
_TITLES: Final = {
    "start": "Start",
    "phases": "Where a warm start's time goes",
    "memory": "Memory of an idle pod on the host (PSS)",
    "sharing": "Memory of a second pod of the same template (PSS)",
    "streams": "Streams",
    "virtiofs": "virtio-fs",
    "network": "Networks",
    "engines": "Pods through containerd",
    "sandbox": "Sandboxes",
    "cli": "Small verbs",
}


def as_json(series: Sequence[Series]) -> list[dict[str, Any]]:
    """Return the series with their summaries and ratios, as JSON has them."""
    found = []
    for each in series:
        compared = ratio(each, series)
        found.append(
            {
                "group": each.group,
                "name": each.name,
                "unit": each.unit.value,
                "moved": each.moved,
                "values": [round(value, 6) for value in each.values],
                "summary": _rounded(summarize(each.values)._asdict()),
                "beside": each.beside if compared else None,
                "ratio": _rounded(compared._asdict()) if compared else None,
            }
        )
    return found


def _rounded(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 6) for name, value in summary.items()}


def compare(new: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    """Return a line for each figure whose ratio is worse than the baseline's, beyond what chance does."""
    if baseline.get("schema") != SCHEMA:
        return ["the baseline was made by another version of the bench"]
    lines = []
    for what in ("accelerator", "cores"):
        if new["machine"][what] != baseline["machine"][what]:
            lines.append(f"the baseline was made with another {what}: {baseline['machine'][what]}")
    before = {(each["group"], each["name"]): each["ratio"] for each in baseline["series"]}
    for each in new["series"]:
        old = before.get((each["group"], each["name"]))
        if old and each["ratio"] and old["median"] > 0:
            times = each["ratio"]["median"] / old["median"]
            if times > TOLERANCE:
                lines.append(f"{each['group']}: {each['name']} is {times:.1f} times the baseline's ratio")
    return lines


def tables(document: dict[str, Any]) -> str:
    """Return the whole report as Markdown."""
    machine, versions, plan = document["machine"], document["versions"], document["plan"]
    lines = [
        f"Measured on {document['date'][:10]} in {plan['runs']} rounds ({plan['long_runs']} of what takes long), with",
        f"katapy {versions['katapy']} ({versions['commit']}), {versions['qemu']},",
        f"guest kernel {versions['guest kernel']} and {versions.get('runc', 'no runc')}, on:",
        "",
        *(f"* {name}: {value}" for name, value in machine.items()),
    ]
    lines += ["", *(f"* {note}" for note in document["notes"])] if document["notes"] else []
    for group, title in _TITLES.items():
        if rows := [each for each in document["series"] if each["group"] == group]:
            lines += ["", f"### {title}", "", *_table(rows)]
    return "\n".join(lines) + "\n"


def _table(rows: list[dict[str, Any]]) -> list[str]:
    head = ["", "median", "quartiles", "min to max", "ratio (quartiles)", "to"]
    return [_row(head), _row(["---", "---:", "---:", "---:", "---:", "---"]), *(_row(_cells(row)) for row in rows)]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: dict[str, Any]) -> list[str]:
    summary = row["summary"]
    values = [summary[name] for name in ("median", "lower", "upper", "minimum", "maximum")]
    if row["moved"]:  # more seconds are fewer bytes a second
        values[1:] = [values[2], values[1], values[4], values[3]]
    median, *spread = (format_value(value, row["unit"], row["moved"]) for value in values)
    ends = [" to ".join(pair) if summary["runs"] > 1 else "" for pair in (spread[:2], spread[2:])]
    if not (compared := row["ratio"]):
        return [row["name"], median, *ends, "", ""]
    times = f"**{format_ratio(compared['median'])}**"
    if compared["runs"] > 1:
        times += f" ({format_ratio(compared['lower'])} to {format_ratio(compared['upper'])})"
    return [row["name"], median, *ends, times, row["beside"]]


def replace_between_markers(page: str, text: str) -> str:
    """Return ``page`` with ``text`` where it has figures of an earlier run; the prose around stays.

    Raises BenchError where the page has not one place for them.
    """
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise BenchError(f"the page has no {_BEGIN if not begin else _END}")
    return f"{before}{begin}\n\n{text}\n{end}{after}"


def as_toml(files: Iterable[dict[str, dict[str, Any]]], more: dict[str, dict[str, Any]]) -> str:
    """Return configurations as one, later ones overriding single keys: numbers, flags, strings and arrays of these."""
    merged: dict[str, dict[str, Any]] = {}
    for file in (*files, more):
        for section, keys in file.items():
            merged.setdefault(section, {}).update(keys)
    # JSON writes these as TOML does.
    return "".join(
        f"[{section}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
        for section, keys in merged.items()
    )
