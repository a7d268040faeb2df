"""A small org.freedesktop.systemd1.Manager on a real message bus: it records what it is asked and makes cgroups."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jeepney import (
    DBusAddress,
    HeaderFields,
    Message,
    MessageType,
    new_error,
    new_method_return,
    new_signal,
)
from jeepney.bus_messages import message_bus
from jeepney.io.blocking import open_dbus_connection

PATH = "/org/freedesktop/systemd1"
MANAGER = DBusAddress(PATH, interface="org.freedesktop.systemd1.Manager")


class FakeSystemd:
    """Serves from a thread. ``directories`` is where it makes ``/slice/unit``.

    What a unit does is in its name: one with "stuck" never finishes its job, one with "fail" fails, one with "early"
    tells the end of its job before the call has returned.
    """

    def __init__(self, address: str, directories: list[str]) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.units: dict[str, list[str]] = {}
        self.failed: set[str] = set()
        self._subscribers: set[str] = set()
        self._directories = directories
        self._connection = open_dbus_connection(address)
        (owned,) = self._connection.send_and_get_reply(message_bus.RequestName("org.freedesktop.systemd1")).body
        assert owned == 1
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()
        self._connection.close()

    def properties(self) -> dict[str, Any]:
        """Return the properties of the unit that was started last."""
        (arguments,) = [arguments for method, arguments in self.calls if method == "StartTransientUnit"][-1:]
        return {name: value for name, (_, value) in arguments[2]}

    def named(self, method: str) -> list[tuple[Any, ...]]:
        """Return the arguments of every call of ``method``."""
        return [arguments for name, arguments in self.calls if name == method]

    def _serve(self) -> None:
        while not self._ended.is_set():
            try:
                message = self._connection.receive(timeout=0.05)
            except TimeoutError:
                continue
            except OSError:
                return
            if message.header.message_type is MessageType.method_call:
                self._answer(message)

    def _answer(self, message: Message) -> None:
        method = message.header.fields[HeaderFields.member]
        self.calls.append((method, tuple(message.body)))
        getattr(self, f"_{method}", self._done)(message)

    def _done(self, message: Message) -> None:
        self._connection.send(new_method_return(message))

    def _error(self, message: Message, name: str) -> None:
        self._connection.send(new_error(message, f"org.freedesktop.systemd1.{name}", "s", (f"{name}!",)))

    def _Subscribe(self, message: Message) -> None:  # noqa: N802 - D-Bus
        sender = message.header.fields[HeaderFields.sender]
        if sender in self._subscribers:
            self._error(message, "AlreadySubscribed")
        else:
            self._subscribers.add(sender)
            self._done(message)

    def _StartTransientUnit(self, message: Message) -> None:  # noqa: N802 - D-Bus
        unit, _, properties, _ = message.body
        if unit in self.units or unit in self.failed:
            self._error(message, "UnitExists")
            return
        values = {name: value for name, (_, value) in properties}
        paths = [f"{directory}/{values['Slice']}/{unit}" for directory in self._directories]
        if "fail" not in unit:
            self.units[unit] = paths
            for path in paths:
                Path(path).mkdir(parents=True)
                for pid in values["PIDs"]:
                    Path(path, "cgroup.procs").write_text(str(pid))
        self._job(message, unit)

    def _StopUnit(self, message: Message) -> None:  # noqa: N802
        unit = message.body[0]
        if unit not in self.units:
            self._error(message, "NoSuchUnit")
            return
        for path in self.units.pop(unit):
            for directory in (path, os.path.dirname(path)):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
        self._job(message, unit)

    def _ResetFailedUnit(self, message: Message) -> None:  # noqa: N802
        self.failed.discard(message.body[0])
        self._error(message, "NoSuchUnit")

    def _SetUnitProperties(self, message: Message) -> None:  # noqa: N802
        if message.body[0] in self.units:
            self._done(message)
        else:
            self._error(message, "NoSuchUnit")

    def _job(self, message: Message, unit: str) -> None:
        job = f"{PATH}/job/7"
        reply = new_method_return(message, "o", (job,))
        removed = new_signal(MANAGER, "JobRemoved", "uoss", (7, job, unit, "failed" if "fail" in unit else "done"))
        other = new_signal(MANAGER, "JobRemoved", "uoss", (6, f"{PATH}/job/6", "other.scope", "failed"))
        if "stuck" in unit:
            messages = [other, reply]
        else:
            messages = [removed, reply] if "early" in unit else [reply, other, removed]
        for each in messages:
            self._connection.send(each)
