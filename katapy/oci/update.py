"""Changes of ``linux.resources`` in the life of a container: what `update` and the Task API's Update ask for.

A change is a document of the same form (runtime-spec 1.2, config-linux.md, "Control groups") in which everything may
be absent. As under runc, 0 and the empty string mean that a limit stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from katapy.jsonfile import dump, parse
from katapy.oci.linux import Resources, parse_resources
from katapy.oci.node import Node

_WHAT: Final = "resources"
# Lists in which each entry is a limit of its own, and what tells the entries apart.
_LISTS: Final = {
    "hugepageLimits": ("pageSize",),
    **{f"throttle{kind}Device": ("major", "minor") for kind in ("ReadBps", "WriteBps", "ReadIOPS", "WriteIOPS")},
    "weightDevice": ("major", "minor"),
}
# Where zero is a value.
_ZERO_COUNTS: Final = ("burst", "idle")


class Change(NamedTuple):
    """A change that was checked: the guest's part of it, and what the container then has."""

    request: bytes
    document: dict[str, Any]
    resources: Resources


def parse_change(data: bytes, before: Mapping[str, Any]) -> Change:
    """Parse a change of the resources ``before``, which is plain JSON. Raises InvalidArgument and Unsupported."""
    document = parse(data, what=_WHAT)
    parse_resources(Node(document, _WHAT))
    after = _merged(before, document)
    # Block I/O is limited on the host alone, as in config.json.
    request = {name: value for name, value in document.items() if name != "blockIO"}
    return Change(dump(request), after, parse_resources(Node(after, _WHAT)))


def _merged(before: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    after = dict(before)
    for name, value in change.items():
        if isinstance(value, dict):
            after[name] = _merged(before.get(name) or {}, value)
        elif name in _LISTS:
            after[name] = _merged_list(before.get(name) or [], value or [], _LISTS[name])
        elif value or (name in _ZERO_COUNTS and value is not None):
            after[name] = value
    return after


def _merged_list(before: list[Any], change: list[Any], keys: tuple[str, ...]) -> list[Any]:
    entries = {tuple(entry.get(key) for key in keys): entry for entry in (*before, *change)}
    return list(entries.values())
