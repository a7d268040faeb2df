"""What `state` and `list` print, in runc's forms. They only read the state directory, and import as little as that.

It owns the texts. Which options there are is said in ``cli``, and for the usual ones in ``entry``.
"""

from __future__ import annotations

import json
from typing import Any, Final

from katapy.errors import KatapyError
from katapy.state import State, StateDir, list_states, state_json

_COLUMNS: Final = ("id", "pid", "status", "bundle", "created", "owner")
# runc's table: what Go's tabwriter makes of a least width of 12 and a padding of 3.
_LEAST_WIDTH: Final = 12
_PADDING: Final = 3


def state_text(root: str, container_id: str) -> str:
    """Return the state of one container as JSON. Raises NotFound, and Internal where it is damaged."""
    with StateDir.open(root, container_id) as directory:
        return json.dumps(_document(directory.load()), indent=2) + "\n"


def list_text(root: str, *, style: str = "table", quiet: bool = False) -> tuple[str, list[KatapyError]]:
    """Return all containers as ``style`` (table, json) or, with ``quiet``, their ids; and what cannot be read."""
    states, errors = list_states(root)
    if quiet:
        return "".join(f"{state.id}\n" for state in states), errors
    rows = [_document(state) for state in states]
    if style == "json":
        # Go's JSON of no slice at all, which is what runc has where there are no containers.
        return (json.dumps(rows, separators=(",", ":")) if rows else "null") + "\n", errors
    return _table(rows), errors


def _document(state: State) -> dict[str, Any]:
    document = state_json(state)
    accelerator = document.pop("accelerator", "")
    # runc's members first, in its order.
    return {**document, "owner": _user_name(state.owner), **({"accelerator": accelerator} if accelerator else {})}


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [[name.upper() for name in _COLUMNS], *([str(row[name]) for name in _COLUMNS] for row in rows)]
    widths = [
        max(_LEAST_WIDTH, max(len(line[column]) for line in lines) + _PADDING) for column in range(len(_COLUMNS) - 1)
    ]
    return "".join(
        "".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)) + f"{line[-1]}\n"
        for line in lines
    )


def _user_name(uid: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"#{uid}"
