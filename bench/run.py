"""Measures katapy on this machine: run.py [--only GROUPS] [--runs N] [--quick] [--output DIRECTORY] [--docs].

Writes latest.json, performance.md (the tables), performance.png and performance.svg into the output directory; with
--docs also the page docs/performance.md and its pictures. It asserts nothing: figures that are worse than those of
results/baseline.json are warned of, no more. Needs root. Whatever it starts is gone when it ends, Ctrl-C included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Final

# This checkout's katapy, also where none is installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

import cli
import engines
import machine
import memory
import network
import plot
import report
import sandbox
import sharing
import start
import streams
import virtiofs
from bare import BareVm
from containers import Bundles, Runtime
from context import QUICK, Bench, Plan
from figures import BenchError, Recorder, Series, progress

from katapy.assets import guest
from katapy.config import DEFAULT_DIRECTORY, DEFAULT_FILE, ENVIRONMENT_VARIABLE, Config
from katapy.errors import KatapyError
from katapy.hypervisor.accel import Acceleration, probe, require
from katapy.storage.shared_dir import enter_private_mounts

_HERE: Final = Path(__file__).resolve().parent
_DOCS: Final = _HERE.parent / "docs"
_RESULTS: Final = _HERE / "results"
_BASELINE: Final = _RESULTS / "baseline.json"
_PICTURE: Final = """\
![Bars: starts of katapy and runc in times of a bare VM, memory of a pod by part, streams, virtio-fs, networks: medians
of the tables below](images/performance.svg)

The same picture as [PNG](images/performance.png).
"""
_GROUPS: Final[dict[str, tuple[Callable[[Bench], Recorder], ...]]] = {
    "start": (start.measure, start.measure_phases),
    "memory": (memory.measure,),
    "sharing": (sharing.measure,),
    "streams": (streams.measure,),
    "virtiofs": (virtiofs.measure,),
    "network": (network.measure,),
    "engines": (engines.measure,),
    "sandbox": (sandbox.measure,),
    "cli": (cli.measure,),
}


def main() -> None:
    """Measure, and write the report."""
    options = _parse_options(sys.argv[1:])
    if os.geteuid() != 0:
        sys.exit("bench: not root")
    signal.signal(signal.SIGINT, _interrupt)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda _number, _frame: signal.raise_signal(signal.SIGINT))
    # With KVM a bare VM may need a mount of its own.
    os.close(enter_private_mounts())
    try:
        document = _measure(options.plan, options.only)
        _write(document, options.output, docs=options.docs)
    except (BenchError, KatapyError) as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit("bench: interrupted")


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """Unwind, once: what is cleaned up then must not be cut short."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _parse_options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure katapy on this machine.")
    parser.add_argument("--only", type=_groups, default=list(_GROUPS), help=f"of {','.join(_GROUPS)}")
    parser.add_argument("--runs", type=int, metavar="N", help="rounds (default: 10, with --quick 3)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, fewer pods, smaller files")
    parser.add_argument("--output", type=Path, metavar="DIRECTORY", default=_RESULTS)
    parser.add_argument("--docs", action="store_true", help="write docs/performance.md, too")
    options = parser.parse_args(argv)
    plan = QUICK if options.quick else Plan()
    if options.runs is not None:
        if options.runs < 1:
            parser.error("--runs: at least 1")
        plan = replace(plan, runs=options.runs, long_runs=min(options.runs, plan.long_runs))
    if options.docs and options.only != list(_GROUPS):
        parser.error("--docs: the page has all groups, so --only cannot be")
    options.plan = plan
    return options


def _groups(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in _GROUPS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: none of {', '.join(_GROUPS)}")
    return [name for name in _GROUPS if name in names]


def _measure(plan: Plan, groups: list[str]) -> dict[str, Any]:
    """Measure and return the whole report."""
    config = Config.load()
    kernel = guest.find_kernel(config.runtime.data_dir, config.hypervisor.kernel)
    acceleration = require(asyncio.run(probe()), config.hypervisor)
    began = datetime.now(UTC)
    series: list[Series] = []
    notes: list[str] = []
    with _prepare(plan, config, kernel, acceleration) as bench:
        if bench.runc is None:
            notes.append("runc is not installed: nothing is compared with it")
        for group in groups:
            for measure in _GROUPS[group]:
                recorder = measure(bench)
                series += recorder.series()
                notes += recorder.notes
    return {
        "schema": report.SCHEMA,
        "date": began.isoformat(timespec="seconds"),
        "machine": machine.describe_machine(acceleration),
        "versions": machine.describe_versions(config, kernel, shutil.which("runc")),
        "plan": {**asdict(plan), "seconds": round((datetime.now(UTC) - began).total_seconds())},
        "notes": notes,
        "series": report.as_json(series),
    }


@contextmanager
def _prepare(plan: Plan, config: Config, kernel: guest.Kernel, acceleration: Acceleration) -> Iterator[Bench]:
    """Give what to measure with, in a temporary directory of its own."""
    katapy, runc = Path(sys.executable).with_name("katapy"), shutil.which("runc")
    if not katapy.exists():
        raise BenchError(f"{katapy} is missing: make setup")
    with tempfile.TemporaryDirectory(prefix="katapy-bench-") as name:
        directory = Path(name)
        bundles = Bundles(directory)
        bench = Bench(
            plan=plan,
            directory=directory,
            bundles=bundles,
            bare=BareVm(config, kernel, acceleration, directory, bundles.rootfs),
            warm=_katapy("katapy warm", katapy, directory, template=True),
            cold=_katapy("katapy cold", katapy, directory, template=False),
            runc=Runtime("runc", runc, directory / "runc") if runc else None,
        )
        try:
            yield bench
        finally:
            for runtime in bench.runtimes:
                runtime.delete_all()


def _katapy(name: str, program: Path, directory: Path, *, template: bool) -> Runtime:
    """Return katapy as this host is configured, with templates or without."""
    file = directory / f"{name}.toml"
    file.write_text(report.as_toml(_configuration(), {"hypervisor": {"template": template}}))
    file.chmod(0o600)
    return Runtime(name, program, directory / name.replace(" ", "-"), ["--config", file])


def _configuration() -> Iterator[dict[str, dict[str, Any]]]:
    """Give the configuration files of this host, later ones overriding earlier: as Config.load reads them."""
    named = os.environ.get(ENVIRONMENT_VARIABLE)
    for path in [Path(named)] if named else [DEFAULT_FILE, *sorted(DEFAULT_DIRECTORY.glob("*.toml"))]:
        if named or path.exists():
            yield tomllib.loads(path.read_text())


def _write(document: dict[str, Any], output: Path, *, docs: bool) -> None:
    """Write the report, and compare it with the baseline."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "latest.json").write_text(json.dumps(document, indent=1) + "\n")
    tables = report.tables(document)
    (output / "performance.md").write_text(tables)
    plot.draw(document, output)
    if docs:
        page = _DOCS / "performance.md"
        page.write_text(report.replace_between_markers(page.read_text(), f"{_PICTURE}\n{tables}"))
        plot.draw(document, _DOCS / "images")
    if _BASELINE.exists():
        for line in report.compare(document, json.loads(_BASELINE.read_text())):
            progress(f"warning: {line}")
    progress(f"written: {output / 'latest.json'}")


if __name__ == "__main__":
    main()
