"""The hooks of config.json, as the host reads them."""

from __future__ import annotations

from typing import Any

import pytest

from katapy.errors import InvalidArgument
from katapy.oci.hooks import Hook, parse_hooks
from katapy.oci.node import Node


def test_hooks() -> None:
    full = {"path": "/bin/x", "args": ["own-name", "1"], "env": ["A=b=c", "B="], "timeout": 7}
    hooks = parse_hooks(Node({"prestart": [full], "poststop": [{"path": "/y"}], "later": [1]}, "c"))
    assert hooks.prestart == (Hook("/bin/x", ("own-name", "1"), ("A=b=c", "B="), 7),)
    assert hooks.poststop == (Hook("/y", ("/y",), None, None),)
    assert hooks.start_container == ()


@pytest.mark.parametrize(
    ("hook", "problem"),
    [
        ({}, "prestart[0].path: is missing"),
        ({"path": "bin/x"}, "prestart[0].path: 'bin/x' is not an absolute path"),
        ({"path": "/x", "env": ["novalue"]}, "prestart[0].env[0]: 'novalue' is not an environment variable"),
        ({"path": "/x", "env": ["=v"]}, "prestart[0].env[0]"),
        ({"path": "/x", "timeout": 0}, "prestart[0].timeout: 0 is not between 1 and 86400"),
        ({"path": "/x", "args": [1]}, "prestart[0].args[0]: expected a string"),
        (17, "prestart[0]: expected an object"),
    ],
)
def test_wrong_hooks(hook: Any, problem: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_hooks(Node({"prestart": [hook]}, "c"))
    assert problem in str(caught.value)
