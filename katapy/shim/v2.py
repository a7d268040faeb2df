"""The program `containerd-shim-katapy-v2`: how containerd, CRI-O and docker start a shim, and clean up after one.

    containerd-shim-katapy-v2 -namespace N -address A -publish-binary P -id ID [-debug] start     in the bundle
    containerd-shim-katapy-v2 ... -id ID -bundle B delete
    containerd-shim-katapy-v2 -v | -info

`start` prints the address of the shim and nothing else; the engine waits until nobody has its standard output or
standard error open any more, and for each container, so what is imported here is what is needed.
Source: containerd, core/runtime/v2/README.md and pkg/shim.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from katapy import preload
from katapy.errors import AlreadyExists, InvalidArgument, KatapyError, NotFound, Unavailable
from katapy.oci.pod import sandbox_of
from katapy.shim.engine import Engine, socket_link, state_root
from katapy.state import CREATOR, ProcessRef, State, StateDir, Status, check_id, list_states, now

_TEXTS: Final = ("namespace", "address", "publish-binary", "id", "bundle", "socket")
_SWITCHES: Final = ("debug", "v", "info")
_STDIN_MAX: Final = 1 << 20
# A shim whose last container was deleted ends by itself, in about a tenth of this many seconds. Engines wait for 5.
_PATIENCE: Final = 2.0


class Call(NamedTuple):
    """What the program was asked for."""

    verb: str
    namespace: str
    address: str
    publisher: str
    id: str
    bundle: str
    debug: bool


def main() -> int:
    """Run the program. Returns the exit status."""
    # As in katapy.entry: a status of a child is known only then.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        values, verb = parse_flags(sys.argv[1:])
        if "v" in values:
            return _print_version()
        if "info" in values:
            return _print_info()
        call = Call(
            verb,
            values.get("namespace", ""),
            values.get("address", ""),
            values.get("publish-binary", ""),
            check_id(values.get("id", "")),
            os.path.abspath(values.get("bundle") or "."),
            "debug" in values,
        )
        check_id(call.namespace)
        if verb == "start":
            sys.stdout.write(start(call))
        elif verb == "delete":
            sys.stdout.buffer.write(delete(call))
        else:
            raise InvalidArgument(f"{verb[:40]!a} is not a command: start and delete are")
        sys.stdout.flush()
    except KatapyError as error:
        sys.stderr.write(f"{Path(sys.argv[0]).name}: {error}\n")
        return 1
    return 0


def parse_flags(arguments: Sequence[str]) -> tuple[dict[str, str], str]:
    """Return the flags by name, as Go's flag package reads them, and the command. Raises InvalidArgument."""
    values: dict[str, str] = {}
    left = iter(arguments)
    for argument in left:
        if not argument.startswith("-"):
            return values, argument
        name, equals, value = argument.lstrip("-").partition("=")
        if name in _SWITCHES:
            if value not in ("false", "0"):
                values[name] = "true"
            continue
        if name not in _TEXTS:
            raise InvalidArgument(f"flag {argument[:40]!a} is not known")
        values[name] = value if equals else next(left, "")
    return values, ""


def start(call: Call) -> str:
    """Start the shim of a container's pod, or find it, and return its address. On failure nothing is left."""
    config = _read_config(call.bundle)
    annotations = _annotations(config)
    sandbox_id = sandbox_of(annotations) or call.id
    root = state_root(call.address, call.namespace)
    link = socket_link(root, sandbox_id)
    state = State(
        id=call.id,
        bundle=call.bundle,
        rootfs=f"{call.bundle}/rootfs",
        sandbox=check_id(sandbox_id),
        status=Status.CREATING,
        created=now(),
        oci_version=str(config.get("ociVersion", "")),
        owner=os.getuid(),
        annotations=annotations,
        # Until the shim takes over, at Create: nobody is behind it when this process has ended.
        shim=ProcessRef.of(CREATOR, os.getpid()),
    )
    address = f"unix://{link}"
    if sandbox_id != call.id:
        # Its state is the shim's to make, at Create: an engine that then finds the shim dead asks for no `delete`.
        _check_serves(link, sandbox_id)
        _clear_state(root, call.id)
        _write_address(call.bundle, address)
        return address
    with ExitStack() as undo:
        _begin(call.bundle)
        undo.callback(preload.drop)
        _clear_state(root, call.id)
        _clear_forgotten(root)
        StateDir.create(str(root), state).close()
        undo.callback(_remove_state, root, call.id)
        # Last is what cannot be undone at once.
        _write_address(call.bundle, address)
        _start_shim(call, root, link, systemd_cgroup=_is_systemd(config))
        undo.pop_all()
    return address


def _start_shim(call: Call, root: Path, link: Path, *, systemd_cgroup: bool) -> None:
    from katapy.client.launch import SHIM_SOCKET, start_engine_shim
    from katapy.shim.wire import parse_bootstrap

    said = parse_bootstrap(b"" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.buffer.read(_STDIN_MAX))
    config = said.config or os.environ.get("KATAPY_CONFIG", "")
    engine = Engine(
        namespace=call.namespace,
        address=call.address,
        ttrpc=os.environ.get("TTRPC_ADDRESS", "") or said.ttrpc,
        publisher=call.publisher or said.publisher,
        link=str(link),
        log=f"{call.bundle}/log",
    )
    arguments = {
        "root": str(root),
        "id": call.id,
        "debug": call.debug,
        "config": os.path.abspath(config) if config else None,
        "foreground": False,
        "systemd_cgroup": systemd_cgroup,
        "engine": engine._asdict(),
    }
    try:
        link.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(root / call.id / SHIM_SOCKET)
    except OSError as error:
        raise Unavailable(f"cannot make {link}: {error.strerror}") from error
    try:
        start_engine_shim(root / call.id, arguments)
    except KatapyError:
        link.unlink(missing_ok=True)
        raise


def _begin(bundle: str) -> None:
    """Let a shim load meanwhile. What it has to say until it has a log goes to the engine's, not to our errors."""
    try:
        log = os.open(f"{bundle}/log", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        log = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        preload.begin(stderr=log)
    finally:
        os.close(log)


def _check_serves(link: Path, sandbox_id: str) -> None:
    """Raise Unavailable unless the shim of a pod takes connections."""
    import socket

    from katapy.transport import unix

    try:
        unix.connect(link, socket.SOCK_STREAM).close()
    except Unavailable as error:
        raise Unavailable(f"the pod {sandbox_id} does not run: {error}") from error


def _clear_state(root: Path, container_id: str) -> None:
    """Remove what a killed shim and an engine that forgot it have left. Raises AlreadyExists where it is alive."""
    try:
        with StateDir.open(str(root), container_id) as directory:
            left = directory.load()
    except NotFound:
        return
    if left.shim is not None and left.shim.alive():
        raise AlreadyExists(f"container with id exists: {container_id}")
    _remove_state(root, container_id)


def _clear_forgotten(root: Path) -> None:
    """Remove what is left of containers that their engine has forgotten: shim and bundle have gone.

    So it is where a shim was killed before its engine had connected to it: then there is no `delete`.
    """
    for state in list_states(str(root))[0]:
        if state.shim is None or state.shim.alive() or os.path.lexists(state.bundle):
            continue
        from katapy.client import leftovers

        with suppress(KatapyError):
            leftovers.finish(root, state.id, own_network=False, patience=_PATIENCE)
            socket_link(root, state.id).unlink(missing_ok=True)


def _remove_state(root: Path, container_id: str) -> None:
    from katapy.client import leftovers

    leftovers.finish(root, container_id)


def _read_config(bundle: str) -> dict[str, Any]:
    """Return the bundle's configuration, which Create will check. Raises InvalidArgument where it is none."""
    try:
        with open(f"{bundle}/config.json", "rb") as file:  # noqa: PTH123 - the fast way
            config = json.load(file)
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"cannot read {bundle}/config.json: {error}") from error
    if not isinstance(config, dict):
        raise InvalidArgument(f"{bundle}/config.json: not an object")
    return config


def _annotations(config: dict[str, Any]) -> dict[str, str]:
    found = config.get("annotations")
    return {key: value for key, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}


def _is_systemd(config: dict[str, Any]) -> bool:
    """Tell whether systemd is to make the cgroup: engines that want it name a slice, a prefix and a name."""
    linux = config.get("linux")
    path = linux.get("cgroupsPath") if isinstance(linux, dict) else None
    return isinstance(path, str) and path.count(":") == 2


def _write_address(bundle: str, address: str) -> None:
    """Write where the shim is, which an engine reads when it is started again."""
    temporary = Path(bundle, ".address")
    try:
        temporary.write_text(address)
        temporary.rename(Path(bundle, "address"))
    except OSError as error:
        raise Unavailable(f"cannot write {bundle}/address: {error.strerror}") from error


def delete(call: Call) -> bytes:
    """Remove what is left of a container whose shim does not answer, or has ended; nothing may be left any more.

    Returns a DeleteResponse: with the container's exit status where it is known, else that of a killed process.
    """
    import time

    from katapy import lean

    lean.skip_python_messages()
    from katapy.client import removal
    from katapy.proto.task_pb2 import DeleteResponse

    root = state_root(call.address, call.namespace)
    pid, status = 0, 137
    with suppress(NotFound):
        state = removal.abandon(root, call.id, patience=_PATIENCE)
        pid = state.pid
        status = status if state.exit_status is None else state.exit_status
    socket_link(root, call.id).unlink(missing_ok=True)
    response = DeleteResponse(pid=pid, exit_status=status)
    response.exited_at.FromNanoseconds(time.time_ns())
    return response.SerializeToString()


def _print_version() -> int:
    from katapy import __version__

    sys.stdout.write(f"{Path(sys.argv[0]).name}:\n  Version:  {__version__}\n  Revision: \n")
    return 0


def _print_info() -> int:
    """Print a containerd.types.RuntimeInfo; its options, which come on standard input, change nothing."""
    from katapy import __version__
    from katapy.oci.features import features
    from katapy.proto.shim_pb2 import RuntimeInfo

    info = RuntimeInfo(name="io.containerd.katapy.v2")
    info.version.version = __version__
    info.features.type_url = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
    info.features.value = json.dumps(features()).encode()
    sys.stdout.buffer.write(info.SerializeToString())
    return 0


if __name__ == "__main__":
    sys.exit(main())
