"""systemd's part of ``--systemd-cgroup``: a transient scope for the pod, by D-Bus (org.freedesktop.systemd1(5)).

The only module that imports jeepney, and only the systemd driver imports it. A scope is asked for with the limits as
its properties, so that systemd keeps them when it writes its cgroups anew; what has no property is written by
``cgroup``, in the cgroup that is delegated to katapy.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, Final

from jeepney import DBusAddress, HeaderFields, MatchRule, Message, MessageType, new_method_call
from jeepney.bus_messages import message_bus
from jeepney.io.blocking import DBusConnection, open_dbus_connection

from katapy.cgroups.limits import HostLimits, cpu_weight
from katapy.errors import AlreadyExists, KatapyError, NotFound, Timeout, Unavailable

_JOB_SECONDS: Final = 30.0
_SYSTEM_BUS: Final = "unix:path=/run/dbus/system_bus_socket"
_MANAGER: Final = DBusAddress(
    "/org/freedesktop/systemd1", bus_name="org.freedesktop.systemd1", interface="org.freedesktop.systemd1.Manager"
)
_UNLIMITED: Final = (1 << 64) - 1
_REPLACE: Final = "replace"
_NO_SUCH_UNIT: Final = "org.freedesktop.systemd1.NoSuchUnit"
_UNIT_EXISTS: Final = "org.freedesktop.systemd1.UnitExists"

Properties = list[tuple[str, tuple[str, Any]]]


class _Refused(Exception):
    """systemd answered with an error; becomes a KatapyError where it is known what was asked."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text or name)
        self.name = name


def start_scope(
    unit: str, slice_name: str, pid: int, limits: HostLimits, *, version: int, timeout: float = _JOB_SECONDS
) -> None:
    """Start the scope ``unit`` in ``slice_name`` with the process ``pid`` in it, and wait until it is there.

    ``version`` is that of the cgroups, ``timeout`` in seconds.
    Raises AlreadyExists where there is such a unit, Timeout, Unavailable where systemd refuses or cannot be reached.
    """
    properties = plan_properties(slice_name, pid, limits, version=version)
    with _manager(f"cannot start {unit}", timeout) as manager:
        start = partial(manager.run_job, "StartTransientUnit", "ssa(sv)a(sa(sv))", (unit, _REPLACE, properties, []))
        try:
            start()
        except _Refused as error:
            if error.name != _UNIT_EXISTS:
                raise
            # One that has failed stays until it is reset; one that runs cannot be reset, and is another's.
            manager.reset(unit)
            try:
                start()
            except _Refused as again:
                if again.name != _UNIT_EXISTS:
                    raise
                raise AlreadyExists(f"cannot start {unit}: systemd has a unit of this name") from again


def stop_unit(unit: str, *, timeout: float = _JOB_SECONDS) -> None:
    """Stop ``unit``, which ends what still runs in it, and forget it. Does nothing where there is none.

    Raises Timeout after ``timeout`` seconds, Unavailable.
    """
    with _manager(f"cannot stop {unit}", timeout) as manager:
        try:
            manager.run_job("StopUnit", "ss", (unit, _REPLACE))
        except _Refused as error:
            if error.name != _NO_SUCH_UNIT:
                raise
        manager.reset(unit)


def set_limits(unit: str, limits: HostLimits, *, version: int, timeout: float = _JOB_SECONDS) -> None:
    """Change the properties of ``unit`` that are set in ``limits``, until the machine restarts.

    Raises NotFound where there is no such unit, Timeout, Unavailable.
    """
    properties = plan_limits(limits, version=version)
    if not properties:
        return
    with _manager(f"cannot change {unit}", timeout) as manager:
        try:
            manager.call("SetUnitProperties", "sba(sv)", (unit, True, properties))
        except _Refused as error:
            if error.name != _NO_SUCH_UNIT:
                raise
            raise NotFound(f"cannot change {unit}: systemd has no such unit") from error


def plan_properties(slice_name: str, pid: int, limits: HostLimits, *, version: int) -> Properties:
    """Return the properties of a new scope, runc's."""
    return [
        ("Description", ("s", "katapy pod")),
        ("Slice", ("s", slice_name)),
        ("PIDs", ("au", [pid])),
        ("Delegate", ("b", True)),
        ("DefaultDependencies", ("b", False)),
        *((name, ("b", True)) for name in ("MemoryAccounting", "CPUAccounting", "TasksAccounting")),
        ("IOAccounting" if version == 2 else "BlockIOAccounting", ("b", True)),
        *plan_limits(limits, version=version),
    ]


def plan_limits(limits: HostLimits, *, version: int) -> Properties:
    """Return ``limits`` as properties, as far as systemd has them for cgroups of ``version``."""
    found: list[tuple[str, int | None]] = []
    found.append(("MemoryMax" if version == 2 else "MemoryLimit", _amount(limits.memory_bytes)))
    if version == 2 and limits.memory_swap_bytes is not None:
        limit, swap = limits.memory_bytes or 0, limits.memory_swap_bytes
        found.append(("MemorySwapMax", _amount(swap if swap < 0 else swap - limit)))
    shares = limits.cpu_shares
    if version == 2:
        found.append(("CPUWeight", None if shares is None else cpu_weight(min(max(shares, 2), 262144))))
    else:
        found.append(("CPUShares", shares))
    found.append(("CPUQuotaPerSecUSec", _quota(limits)))
    found.append(("CPUQuotaPeriodUSec", limits.cpu_period))
    found.append(("TasksMax", _amount(limits.pids)))
    return [(name, ("t", value)) for name, value in found if value is not None]


def _amount(value: int | None) -> int | None:
    return _UNLIMITED if value is not None and value < 0 else value


def _quota(limits: HostLimits) -> int | None:
    """Return the CPU time per second in microseconds; systemd keeps it in steps of 1 %, so it is rounded up."""
    if limits.cpu_quota is None or limits.cpu_quota < 0:
        return _amount(limits.cpu_quota)
    per_second = limits.cpu_quota * 1_000_000 // (limits.cpu_period or 100_000)
    return -(-per_second // 10_000) * 10_000


@contextlib.contextmanager
def _manager(what: str, timeout: float) -> Iterator[_Manager]:
    """Connect to systemd; turn what goes wrong into katapy's errors, which begin with ``what``."""
    deadline = time.monotonic() + timeout
    try:
        address = os.environ.get("DBUS_SYSTEM_BUS_ADDRESS", _SYSTEM_BUS)
        with open_dbus_connection(address, auth_timeout=timeout) as connection:
            yield _Manager(connection, deadline)
    except KatapyError:
        raise
    except TimeoutError as error:
        raise Timeout(f"{what}: systemd has not answered within {timeout:g} s") from error
    except _Refused as error:
        raise Unavailable(f"{what}: {error}") from error
    except (OSError, EOFError, RuntimeError, ValueError) as error:  # jeepney's are of the last two
        raise Unavailable(f"{what}: systemd cannot be reached by D-Bus: {str(error).lower()}") from error


class _Manager:
    """Calls of org.freedesktop.systemd1.Manager over one connection, until ``deadline`` (monotonic seconds)."""

    def __init__(self, connection: DBusConnection, deadline: float) -> None:
        self._connection = connection
        self._deadline = deadline
        self._subscribed = False

    def call(self, method: str, signature: str | None = None, arguments: tuple[Any, ...] = ()) -> tuple[Any, ...]:
        """Call a method and return its results. Raises _Refused."""
        return self._send(new_method_call(_MANAGER, method, signature, arguments))

    def reset(self, unit: str) -> None:
        """Let systemd forget that ``unit`` has failed; a unit that has not is no error."""
        with contextlib.suppress(_Refused):
            self.call("ResetFailedUnit", "s", (unit,))

    def run_job(self, method: str, signature: str, arguments: tuple[Any, ...]) -> None:
        """Call a method that returns a job, and wait for the job's end. Raises _Refused where it is not "done"."""
        rule = MatchRule(type="signal", interface=_MANAGER.interface, member="JobRemoved", path=_MANAGER.object_path)
        if not self._subscribed:
            self._send(message_bus.AddMatch(rule))
            # systemd tells only those who have subscribed, and refuses to be asked twice.
            self.call("Subscribe")
            self._subscribed = True
        # The filter is set before the job: its end may be told before its number is.
        with self._connection.filter(rule, bufsize=1000) as signals:
            (job,) = self.call(method, signature, arguments)
            while True:
                removed = self._connection.recv_until_filtered(signals, timeout=self._left())
                _, path, _, result = removed.body
                if path == job:
                    break
        if result != "done":
            raise _Refused(result, f"systemd's job ended as {result!r}")

    def _send(self, message: Message) -> tuple[Any, ...]:
        reply = self._connection.send_and_get_reply(message, timeout=self._left())
        if reply.header.message_type is MessageType.error:
            text = str(reply.body[0]) if reply.body else ""
            raise _Refused(str(reply.header.fields.get(HeaderFields.error_name, "")), text)
        return tuple(reply.body)

    def _left(self) -> float:
        return max(self._deadline - time.monotonic(), 0.0)
