"""Removing a container whatever its shim does: as a user asks for it, and as an engine that has done with one."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Final

from katapy.client import launch
from katapy.client.leftovers import END_SECONDS, ShimLog, finish, gone, kill
from katapy.client.pod import Pod
from katapy.client.task import TaskClient
from katapy.errors import Internal, InvalidState, KatapyError, NotFound, Unavailable
from katapy.state import State, StateDir, Status, current_status

_LEAVING_SECONDS: Final = 5.0
# An engine that has lost a shim gives five seconds to all that is to be done about it.
_ABANDONED_SECONDS: Final = 1.0


def delete(root: Path, container_id: str, *, force: bool) -> list[str]:
    """Remove a container and, with its last one, the pod. Returns what the shim warns of.

    With ``force`` a running one is killed first, an unresponsive shim too, and a container that does not exist is no
    error, nor is one whose state cannot be read. Raises InvalidState for a running container without ``force``.
    """
    try:
        with StateDir.open(str(root), container_id) as directory:
            state = directory.load()
    except NotFound:
        if force:
            return []
        raise
    except Internal:
        if not force:
            raise
        _remove_damaged(root, container_id)
        return []
    status = current_status(state)
    if status not in (Status.STOPPED, Status.CREATED) and not force:
        raise InvalidState(f"cannot delete container {container_id} that is not stopped: {status}")
    with ShimLog(root, state.sandbox) as log:
        if state.shim is not None and state.shim.name == "shim" and state.shim.alive():
            try:
                with Pod.connect(root, container_id) as pod:
                    pod.remove(force=force)
            except KatapyError as error:
                if not force:
                    raise
                if state.sandbox != container_id:
                    # It serves the pod's others. What somebody else has removed meanwhile is removed.
                    if not isinstance(error, NotFound | Unavailable):
                        raise
                # One that has hung up may be in the middle of its own end, and would leave half of it undone.
                elif not (isinstance(error, Unavailable) and gone(state.shim, _LEAVING_SECONDS)):
                    kill(state.shim)
        finish(root, container_id)
        return log.warnings()


def abandon(root: Path, container_id: str, *, patience: float) -> State:
    """Remove a container that its engine has done with, however that went, and return what was known of it.

    Its shim may have been killed, or not answer, or be about to end, for which it has ``patience`` seconds. One that
    serves a pod's other containers lives on. Raises NotFound where nothing is left; what cannot be ended quickly makes
    it fail, and the state stays for who tries again.
    """
    with StateDir.open(str(root), container_id) as directory:
        state = directory.load()
    shim = state.shim
    if shim is not None and shim.name == "shim" and shim.alive():
        if state.sandbox != container_id:
            with suppress(KatapyError), Pod.connect(root, container_id) as pod:
                pod.remove(force=True, timeout=patience)
        elif not gone(shim, patience):
            kill(shim, _ABANDONED_SECONDS)
    finish(root, container_id, own_network=False, patience=_ABANDONED_SECONDS)
    return state


def _remove_damaged(root: Path, container_id: str) -> None:
    """Remove a container whose state cannot be read: only its shim's socket tells whether there is one."""
    with suppress(Unavailable), launch.connect(root / container_id) as client:
        TaskClient(client, timeout=END_SECONDS).shutdown(container_id, now=True)
        # Nothing more is said on it, but its end is the shim's.
        client.wait_closed(END_SECONDS)
    with suppress(NotFound), StateDir.open(str(root), container_id) as directory, directory.lock():
        directory.remove()
