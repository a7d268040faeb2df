"""``Sandbox``: code that nobody trusts, in a VM of its own, with limits that it cannot move and a verdict.

    with Sandbox(memory="256M") as sandbox:
        result = sandbox.run(["python3", "-c", "print(6 * 7)"], timeout=10)
        print(result.stdout, result.killed_by)

Importing costs little and needs no privilege; to start one, root is needed. Methods may be called from several threads.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypedDict, Unpack, overload

from katapy.errors import InvalidArgument, InvalidState, KatapyError, NotStarted, PermissionDenied, Unavailable
from katapy.sdk.limits import check_seconds, make_limits, parse_size
from katapy.sdk.output import Callback, Output
from katapy.sdk.result import Result
from katapy.state import DEFAULT_ROOT

if TYPE_CHECKING:  # loaded when one is started
    from katapy.client.pod import Launch
    from katapy.sdk.document import Base, Command, User
    from katapy.sdk.files import Files
    from katapy.sdk.machine import Vm
    from katapy.sdk.process import Chunk, Process

DEFAULT_TIMEOUT: Final = 60.0
# A container is made in a fraction of that, wherever its VM answers at all.
_CREATE_SECONDS: Final = 60.0
_USER: Final = re.compile(r"(\d{1,10})(?::(\d{1,10}))?", re.ASCII)
_ID_MAX: Final = (1 << 32) - 2
PathLike = str | os.PathLike[str]


class RunOptions(TypedDict, total=False):
    """What a run may have otherwise than its sandbox.

    ``timeout`` and ``cpu_time`` in seconds, None for no limit; ``output`` in bytes or as text such as "1M"; ``env`` on
    top of the sandbox's; ``cwd``; ``user`` as "uid[:gid]"; with ``tty`` it has a terminal, and all output is stdout.
    """

    timeout: float | None
    cpu_time: float | None
    output: int | str
    env: Mapping[str, str]
    cwd: str
    user: str | int
    tty: bool


class Sandbox:
    """A VM for untrusted code; it starts with ``open``, with the first run, or where a context is entered."""

    def __init__(
        self,
        *,
        rootfs: PathLike | None = None,
        bundle: PathLike | None = None,
        image: str | None = None,
        memory: int | str = "256M",
        cpus: float = 1,
        processes: int = 64,
        disk: int | str = "256M",
        inodes: int = 65536,
        output: int | str = "16M",
        open_files: int = 1024,
        file_size: int | str | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        cpu_time: float | None = None,
        network: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | int | None = None,
        ro: Mapping[PathLike, str] | None = None,
        rw: Mapping[PathLike, str] | None = None,
        fresh: bool = False,
        pool: PathLike | None = None,
        config: PathLike | None = None,
        state_dir: PathLike | None = None,
    ) -> None:
        """Describe a sandbox; nothing is started yet.

        One of ``rootfs`` (a directory), ``bundle`` (an OCI bundle, whose process is the default) and ``image`` (an OCI
        image layout or archive, with ``:TAG``) is its root file system, by default a small one with Python. It is never
        changed: what is written goes with the sandbox.
        ``memory`` of a run and ``disk`` are bytes or texts such as "256M", ``cpus`` may be a fraction; ``processes``,
        ``inodes``, ``output`` (bytes of one run), ``open_files`` and ``file_size`` are limits too.
        ``timeout`` and ``cpu_time`` are seconds of one run, None for no limit. ``network`` names a network namespace,
        by default there is none at all. ``env``, ``cwd`` and ``user`` ("uid[:gid]") are each run's defaults. ``ro`` and
        ``rw`` map paths of the host to paths in the sandbox. With ``fresh`` every run has a VM of its own.
        ``pool`` is the socket of a pool (`katapy sandbox --serve`) to take the VM from, if it has one like that; by
        default the host's, "" for none.
        ``config`` is a configuration file of katapy's, ``state_dir`` where the state of its containers is, /run/katapy.
        Raises InvalidArgument.
        """
        self._given = {name: value for name, value in locals().items() if name not in ("self", "fresh")}
        if sum(each is not None for each in (rootfs, bundle, image)) > 1:
            raise InvalidArgument("rootfs, bundle and image exclude one another")
        self._rootfs, self._bundle, self._image = rootfs, bundle, image
        self._limits = make_limits(
            memory=memory,
            cpus=cpus,
            processes=processes,
            disk=disk,
            inodes=inodes,
            output=output,
            open_files=open_files,
            file_size=file_size,
        )
        self._timeout, self._cpu_time = check_seconds(timeout, "timeout"), check_seconds(cpu_time, "cpu_time")
        self._network = network
        self._env = _check_environment(env or {})
        self._cwd, self._user = cwd, user
        self._ro, self._rw = dict(ro or {}), dict(rw or {})
        self._fresh, self._pool = fresh, pool
        self._state_dir = Path(DEFAULT_ROOT if state_dir is None else state_dir).absolute()
        self._config = None if config is None else Path(config).absolute()
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._vm: Vm | None = None
        self._base: Base | None = None
        self._args: tuple[str, ...] = ()
        self._runs: set[Process] = set()
        self._held = ExitStack()
        self._closed = False

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def id(self) -> str:
        """The id of its VM, as `katapy list` shows it. Raises InvalidState while there is none."""
        if self._vm is None:
            raise InvalidState("the sandbox is not started")
        return self._vm.id

    @property
    def shape(self) -> str:
        """What two sandboxes must have in common so that the VM of one can be the other's."""
        from katapy.config import ENVIRONMENT_VARIABLE

        base = self._base
        if base is None:
            raise InvalidState("the sandbox is not started")
        limits = base.limits
        # `katapy sandbox --serve` names the file that the environment does.
        named = self._config or os.environ.get(ENVIRONMENT_VARIABLE)
        config = str(Path(named).absolute()) if named else None
        parts = (base.rootfs, limits.memory, limits.cpus, limits.disk, limits.inodes, base.network, config)
        return json.dumps(parts)

    @property
    def alive(self) -> bool:
        """Whether its VM is started and runs."""
        return self._vm is not None and self._vm.alive()

    @property
    def accelerator(self) -> str:
        """What executes the VM's instructions: "kvm", or "tcg", which promises no isolation. Starts the VM."""
        return self._started().accelerator

    @property
    def files(self) -> Files:
        """Its files, without what ``ro`` and ``rw`` share with it. Starts the VM."""
        from katapy.sdk.files import Files

        vm = self._started()
        assert self._base is not None
        return Files(lambda: vm.root, (self._base.user.uid, self._base.user.gid))

    def open(self) -> Self:
        """Start the VM, if that was not done, and return this sandbox.

        Raises NotStarted, which is safe to try again, and for bad arguments InvalidArgument, NotFound, Unsupported or
        PermissionDenied.
        """
        self._started()
        return self

    def close(self) -> None:
        """Kill what runs, end the VM, and remove everything. Idempotent; there is no way back."""
        with self._lock:
            self._closed = True
            vm, self._vm = self._vm, None
            runs = list(self._runs)
        for process in runs:
            process.kill()
        if vm is not None:
            vm.close()
        self._held.close()

    @overload
    def run(
        self,
        args: Sequence[str] | None = None,
        *,
        text: Literal[True] = True,
        input: str | bytes | None = None,
        on_stdout: Callback | None = None,
        on_stderr: Callback | None = None,
        fresh: bool | None = None,
        **options: Unpack[RunOptions],
    ) -> Result[str]: ...

    @overload
    def run(
        self,
        args: Sequence[str] | None = None,
        *,
        text: Literal[False],
        input: str | bytes | None = None,
        on_stdout: Callback | None = None,
        on_stderr: Callback | None = None,
        fresh: bool | None = None,
        **options: Unpack[RunOptions],
    ) -> Result[bytes]: ...

    def run(
        self,
        args: Sequence[str] | None = None,
        *,
        text: bool = True,
        input: str | bytes | None = None,
        on_stdout: Callback | None = None,
        on_stderr: Callback | None = None,
        fresh: bool | None = None,
        **options: Unpack[RunOptions],
    ) -> Result[str] | Result[bytes]:
        """Run a command to its end, and return what it printed and what became of it.

        ``args`` is the program and its arguments, by default the bundle's or image's. ``input`` is its standard input.
        With ``text`` output is text, where what is not UTF-8 is replaced; else bytes. The callbacks get each piece of
        it as it comes, which ends the run where they raise. With ``fresh`` it has a VM and files of its own.
        ``options`` are RunOptions.
        What the command does is never an exception: see Result. Raises InvalidArgument, CommandNotFound,
        CommandNotExecutable, NotStarted, and OutcomeUnknown where the command may have run.
        """
        if self._fresh if fresh is None else fresh:
            with Sandbox(**self._given) as twin:
                return twin.run(  # type: ignore[call-overload,no-any-return]  # text decides of which type it is
                    args, text=text, input=input, on_stdout=on_stdout, on_stderr=on_stderr, fresh=False, **options
                )
        output = Output(text=text, on_stdout=on_stdout, on_stderr=on_stderr)
        with self._launch(args, input or b"", options, held=output.is_watched) as process:
            if not output.is_watched:
                process.wait()
            for chunk in process:
                output.take(chunk)
            return output.result(self._shown(args), process.wait(), truncated=process.truncated)

    def stream(
        self, args: Sequence[str] | None = None, *, input: str | bytes | None = None, **options: Unpack[RunOptions]
    ) -> Iterator[Chunk]:
        """Run a command and give each piece of its output as it comes; leaving the loop ends the command.

        A command whose output is taken more slowly than it prints waits, as it does at a pipe. Raises as ``run`` does.
        """
        with self._launch(args, input or b"", options, held=True) as process:
            yield from process

    def start(
        self, args: Sequence[str] | None = None, *, input: str | bytes | None = None, **options: Unpack[RunOptions]
    ) -> Process:
        """Start a command and return it, to be written to and read from. Raises as ``run`` does.

        With ``input`` that is all that it reads; without, ``Process.write`` gives it.
        """
        return self._launch(args, input, options, held=True)

    def _shown(self, args: Sequence[str] | None) -> tuple[str, ...]:
        return self._args if args is None else tuple(args)

    def _launch(
        self, args: Sequence[str] | None, input: str | bytes | None, options: RunOptions, *, held: bool
    ) -> Process:
        from katapy.sdk.process import Bounds

        if unknown := set(options) - RunOptions.__annotations__.keys():
            raise InvalidArgument(f"there is no option {min(unknown)!r}: {', '.join(RunOptions.__annotations__)} are")
        output = options.get("output")
        bounds = Bounds(
            wall=check_seconds(options.get("timeout", self._timeout), "timeout"),
            cpu=check_seconds(options.get("cpu_time", self._cpu_time), "cpu_time"),
            output=self._limits.output if output is None else parse_size(output, "output", at_least=0),
            cpus=self._limits.cpus,
        )
        data = input.encode() if isinstance(input, str) else input
        vm = self._started()
        return self._execute(vm, self._command(args, options), bounds, data, held=held)

    def _execute(self, vm: Vm, command: Command, bounds: Any, data: bytes | None, *, held: bool) -> Process:
        from katapy.client import attach
        from katapy.sdk import document, machine
        from katapy.sdk.process import Process

        assert self._base is not None
        name = f"{vm.id}-{next(self._numbers)}"
        watchdog = threading.Timer(_CREATE_SECONDS, vm.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            with ExitStack() as undo:
                with machine.starting(f"{command.args[0][:100]!r}"):
                    if not vm.alive():
                        raise Unavailable(f"the VM of {vm.id} has died: its files can be read, and no command run")
                    with machine.written(vm.launch.root, document.run(self._base, command, vm.id)) as bundle:
                        pod = undo.enter_context(vm.begin(name, bundle))
                        undo.callback(machine.forget, vm, name)
                        control = pod.come_for_streams(stand=False)
                        undo.callback(control.close)
                        pod.create(bundle)
                    attachment = attach.attach(control)
                process = Process(
                    pod,
                    attachment,
                    vm,
                    bounds,
                    name=name,
                    stdin=data,
                    held=held,
                    connect=lambda: vm.connect(name),
                    ended=lambda process: self._forget(vm, name, process),
                )
                undo.pop_all()
        except attach.AttachError as error:
            raise NotStarted(f"{command.args[0][:100]!r} could not start: {error}") from error
        finally:
            watchdog.cancel()
        with self._lock:
            if process.running:
                self._runs.add(process)
        return process

    def _forget(self, vm: Vm, name: str, process: Process) -> None:
        from katapy.sdk.machine import forget

        forget(vm, name)
        with self._lock:
            self._runs.discard(process)

    def _started(self) -> Vm:
        with self._lock:
            if self._closed:
                raise InvalidState("the sandbox is closed")
            if self._vm is None:
                self._vm = self._start_vm()
            return self._vm

    def _start_vm(self) -> Vm:
        from katapy.client.pod import Launch
        from katapy.sdk import document, machine
        from katapy.sdk.root import Wanted, open_root

        if os.geteuid() != 0:
            raise PermissionDenied("a sandbox is started as root: katapy mounts file systems and makes cgroups")
        with ExitStack() as stack, machine.starting("the sandbox"):
            wanted = Wanted(self._rootfs, self._bundle, self._image)
            root = stack.enter_context(open_root(wanted, self._config))
            self._args = root.args
            user = root.user if self._user is None else parse_user(self._user)
            self._base = document.Base(
                rootfs=root.path,
                limits=self._limits,
                environment={**document.ENVIRONMENT, **root.environment, **self._env},
                cwd=root.cwd if self._cwd is None else self._cwd,
                user=user,
                shared=(*self._shared(self._ro, read_only=True), *self._shared(self._rw, read_only=False)),
                network=document.check_network(self._network),
                process=root.process,
                mounts=root.mounts,
            )
            launch = Launch(self._state_dir, self._config, False, True, False, embedded=True)
            vm = self._from_pool(launch)
            if vm is None:
                vm = machine.Vm.start(launch, document.holder(self._base, machine.find_busybox()))
            self._held = stack.pop_all()
        return vm

    def _from_pool(self, launch: Launch) -> Vm | None:
        """Return a VM of a pool's, None where none is to be had."""
        from katapy.sdk import machine, pool

        path = pool.chosen(self._pool, self._state_dir)
        lease = None if path is None else pool.lease(path, self.shape)
        if lease is None:
            return None
        try:
            return machine.Vm.take(launch, lease)
        except (KatapyError, StopIteration):
            return None  # it has died meanwhile

    def _shared(self, paths: Mapping[PathLike, str], *, read_only: bool) -> Iterator[Any]:
        from katapy.sdk.document import Shared

        for source, destination in paths.items():
            if not str(destination).startswith("/"):
                raise InvalidArgument(f"{str(destination)[:100]!r} is not an absolute path in the sandbox")
            yield Shared(os.path.abspath(source), str(destination), read_only)

    def _command(self, args: Sequence[str] | None, options: RunOptions) -> Command:
        from katapy.sdk.document import Command

        base = self._base
        assert base is not None
        if isinstance(args, str | bytes):
            raise InvalidArgument("args is one text: give a list, such as ['sh', '-c', 'ls | wc -l']")
        words = self._shown(args)
        if not words:
            raise InvalidArgument("args: no command, and neither bundle nor image has one")
        for word in words:
            if not isinstance(word, str) or "\0" in word:
                raise InvalidArgument(f"args: {word!r} is not a text without NUL")
        environment = {**base.environment, **_check_environment(options.get("env") or {})}
        user, cwd = options.get("user"), options.get("cwd")
        return Command(
            words,
            environment,
            base.cwd if cwd is None else cwd,
            base.user if user is None else parse_user(user),
            options.get("tty", False),
        )


def parse_user(text: str | int) -> User:
    """Return whom "uid[:gid]" names; without a gid it is the same number. Raises InvalidArgument."""
    from katapy.sdk.document import User

    match = None if isinstance(text, bool) else _USER.fullmatch(str(text))
    if match is None:
        raise InvalidArgument(f"user: {str(text)[:40]!r} is not uid[:gid] in numbers")
    uid, gid = int(match[1]), int(match[2] or match[1])
    if max(uid, gid) > _ID_MAX:
        raise InvalidArgument(f"user: {str(text)[:40]} is above {_ID_MAX}")
    return User(uid, gid)


def _check_environment(env: Mapping[str, str]) -> dict[str, str]:
    for name, value in env.items():
        if not isinstance(name, str) or not isinstance(value, str) or not name or "=" in name or "\0" in name + value:
            raise InvalidArgument(f"env: {name!r} is not the name of a variable with a text")
    return dict(env)
