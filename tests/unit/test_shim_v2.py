"""The shim's program as far as it starts nothing: flags, standard input, names, and what it imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.any_pb2 import Any
from hypothesis import given
from hypothesis import strategies as st

from katapy.errors import InvalidArgument
from katapy.shim.engine import socket_link, state_root
from katapy.shim.v2 import parse_flags
from katapy.shim.wire import Bootstrap, parse_bootstrap

# Each costs milliseconds, and an engine waits for them.
HEAVY = {"asyncio", "click", "google.protobuf", "grpc", "logging", "qemu", "ssl", "tomllib"}
# Field 2 of runtimeoptions.v1.Options.
OPTIONS = b"\x0a\x04toml\x12\x0b/etc/k.toml"


def field(number: int, value: bytes) -> bytes:
    """Encode a field of bytes that are fewer than 128."""
    return bytes([number << 3 | 2, len(value)]) + value


def options(type_url: str = "runtimeoptions.v1.Options") -> bytes:
    return Any(type_url=type_url, value=OPTIONS).SerializeToString()


def test_flags() -> None:
    """As Go's flag package reads them."""
    given = ["-namespace", "k8s.io", "--address=/a b", "-debug", "-id", "c1", "start", "-id", "c2"]
    assert parse_flags(given) == ({"namespace": "k8s.io", "address": "/a b", "debug": "true", "id": "c1"}, "start")
    assert parse_flags(["-debug=false", "delete"]) == ({}, "delete")
    assert parse_flags(["-v"]) == ({"v": "true"}, "")
    with pytest.raises(InvalidArgument, match="-nothing"):
        parse_flags(["-nothing", "start"])


def test_nothing_on_standard_input() -> None:
    assert parse_bootstrap(b"") == Bootstrap()


def test_options_of_the_runtime() -> None:
    """Before containerd 2.3 they are all there is."""
    assert parse_bootstrap(options()) == Bootstrap(config="/etc/k.toml")
    assert parse_bootstrap(options("type.googleapis.com/runtimeoptions.v1.Options")).config == "/etc/k.toml"
    assert parse_bootstrap(options("containerd.runc.v1.Options")) == Bootstrap()


def test_bootstrap_parameters() -> None:
    message = field(1, b"c1") + field(2, b"default") + b"\x18\x04" + field(4, b"2.3.4") + field(5, b"/s.ttrpc")
    message += field(6, b"/s") + field(7, b"/usr/bin/containerd")
    extension = field(1, options())
    assert parse_bootstrap(message) == Bootstrap("", "/s.ttrpc", "/usr/bin/containerd")
    assert parse_bootstrap(message + field(8, extension)) == Bootstrap("/etc/k.toml", "/s.ttrpc", "/usr/bin/containerd")


@given(st.binary(max_size=200))
def test_anything_on_standard_input(data: bytes) -> None:
    """What is no message is nothing."""
    assert isinstance(parse_bootstrap(data), Bootstrap)


def test_names() -> None:
    """Beside the engine's socket; the address is short whatever the directory's name is."""
    root = state_root("/run/containerd/containerd.sock", "k8s.io")
    assert root == state_root("unix:///run/containerd/containerd.sock", "k8s.io") == state_root("", "k8s.io")
    assert root == Path("/run/containerd/katapy/k8s.io")
    link = socket_link(root, "c" * 76)
    assert len(f"unix://{link}") < 106
    assert link != socket_link(root, "c1") != socket_link(state_root("/other/c.sock", "k8s.io"), "c1")


def test_little_is_imported() -> None:
    """Of what `start` needs."""
    code = "import katapy.shim.v2, katapy.client.launch, katapy.shim.wire, sys; print(*sys.modules, sep='\\n')"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in loaded if name in HEAVY]
