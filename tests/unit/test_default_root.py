"""What of Debian's packages gets into the default root, and what does not."""

from __future__ import annotations

import default_root
import pytest


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("usr/bin/python3.11", True),
        ("usr/lib64/ld-linux-x86-64.so.2", True),
        ("usr/lib/x86_64-linux-gnu/libc.so.6", True),
        ("usr/lib/x86_64-linux-gnu/libcrypto.so.3", True),
        ("usr/lib/x86_64-linux-gnu/libreadline.so.8.2", True),
        ("usr/lib/x86_64-linux-gnu/libstdc++.so.6.0.30", True),
        ("usr/lib/python3.11/pydoc.py", True),
        ("usr/lib/python3.11/lib-dynload/_ssl.cpython-311-x86_64-linux-gnu.so", True),
        ("usr/lib/python3.11/lib-dynload/nis.cpython-311-x86_64-linux-gnu.so", False),
        ("usr/lib/python3.11/lib-dynload/_testcapi.cpython-311-x86_64-linux-gnu.so", False),
        ("usr/lib/x86_64-linux-gnu/libkrb5.so.3", False),
        ("usr/lib/x86_64-linux-gnu/gconv/libCNS.so", False),
        ("usr/bin/dpkg", False),
        ("usr/bin/tar", False),
        ("usr/share/doc/libc6/copyright", False),
        ("var/lib/dpkg/status", False),
        ("etc/passwd", False),
    ],
)
def test_selection(name: str, kept: bool) -> None:
    assert bool(default_root._KEPT.fullmatch(name)) is kept
