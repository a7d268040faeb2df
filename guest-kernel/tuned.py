"""Builds the tuned guest kernel: tuned.py [--data-dir DIRECTORY] [--force], run by `make guest-kernel`.

Debian's linux-source package and config.fragment make one vmlinux with all drivers built in, which QEMU starts through
PVH and which mounts the guest image without an initramfs. The same inputs give the same bytes. The source stays
unpacked in build/guest-kernel: to build again after a change of the fragment takes little. Which kernel is booted is
decided by katapy.assets.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Final

# Any Python 3.11 may run this: what it imports is found beside it.
sys.path.append(str(Path(__file__).resolve().parents[1] / "images"))
sys.path.append(str(Path(__file__).resolve().parents[1]))

import debian
from steps import BuildError, call, require_space, run_main, step

from katapy.assets import guest, store
from katapy.assets.asset import DEFAULT_DATA_DIR
from katapy.assets.guest import KernelKind
from katapy.errors import KatapyError

_HERE: Final = Path(__file__).resolve().parent
_FRAGMENT: Final = _HERE / "config.fragment"
_WORK: Final = _HERE.parent / "build/guest-kernel"
_SPACE: Final = 3 << 30
# What the kernel would otherwise take from the clock and the machine that builds it.
_IDENTITY: Final = (
    "KBUILD_BUILD_TIMESTAMP=1970-01-01",
    "KBUILD_BUILD_USER=katapy",
    "KBUILD_BUILD_HOST=katapy",
    "KBUILD_BUILD_VERSION=1",
)


def unpack_source() -> Path:
    """Return the directory with the source of Debian's present kernel, unpacked where it is not yet."""
    package = debian.dependency("linux-source", "linux-source-.*")
    version = debian.candidate(package)
    source = _WORK / version / package
    if source.is_dir():
        return source
    shutil.rmtree(_WORK, ignore_errors=True)
    _WORK.mkdir(parents=True)
    require_space(_WORK, _SPACE)
    with step(f"{package} {version}"):
        unpacked = _WORK / "package"
        debian.unpack(package, unpacked)
        partial = _WORK / "partial"
        partial.mkdir()
        call(["tar", "--extract", f"--file={unpacked}/usr/src/{package}.tar.xz"], cwd=partial)
        shutil.rmtree(unpacked)
        partial.rename(source.parent)
    return source


def configure(source: Path) -> None:
    """Write the configuration: the fragment and what it needs. Raises BuildError for what this kernel does not take."""
    call(["make", "-s", f"KCONFIG_ALLCONFIG={_FRAGMENT}", "allnoconfig"], cwd=source)
    lost = lost_options(_FRAGMENT.read_text(), (source / ".config").read_text())
    if lost:
        raise BuildError(f"{_FRAGMENT.name}: this kernel does not take {', '.join(lost)}")


def lost_options(fragment: str, config: str) -> list[str]:
    """Return the lines of ``fragment`` that ``config``, the kernel's .config made from it, does not hold."""
    wanted = [line for line in fragment.splitlines() if line and not line.startswith("#")]
    held = set(config.splitlines())
    # An option that is off has no line, or is a comment.
    names = {line.partition("=")[0] for line in held if line.startswith("CONFIG_")}
    return [line for line in wanted if (line[:-2] in names if line.endswith("=n") else line not in held)]


def compile_kernel(source: Path, built: Path) -> None:
    """Compile the configured ``source``; vmlinux and facts.json are put into ``built``. Raises BuildError."""
    print("  compiling the kernel, which takes some minutes ...", file=sys.stderr, flush=True)
    with step("the kernel, compiled"):
        call(["nice", "make", "-s", f"-j{os.cpu_count()}", *_IDENTITY, "vmlinux"], cwd=source)
    release = call(["make", "-s", "kernelrelease"], cwd=source).strip()
    # Symbols are of no use to the guest, and QEMU would read them at each start.
    call(["strip", "--strip-all", "-o", built / "vmlinux", source / "vmlinux"])
    (built / "facts.json").write_text(json.dumps({"version": release, "package": source.parent.name}))


def main() -> None:
    """Build and install the kernel; with the newest source and this fragment there already, do nothing."""
    parser = argparse.ArgumentParser(description="Build katapy's tuned guest kernel from Debian's source.")
    parser.add_argument("--data-dir", type=Path, default=DEFAULT_DATA_DIR, help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="build although nothing has changed")
    arguments = parser.parse_args()
    data_dir = arguments.data_dir.absolute()
    source = debian.with_current_lists(unpack_source)
    inputs = hashlib.sha256(b"%s\0%s" % (source.parent.name.encode(), _FRAGMENT.read_bytes())).hexdigest()
    present = [kernel for kernel in guest.list_kernels(data_dir)[0] if kernel.inputs == inputs]
    if present and not arguments.force:
        print(f"kernel {present[0].version}", file=sys.stderr)
        return
    with step("configuration"):
        configure(source)
    # Not in the data directory, whose lock would keep others from building images all that time.
    with tempfile.TemporaryDirectory(dir=_WORK) as built:
        compile_kernel(source, Path(built))
        with store.lock(data_dir), store.staging(data_dir) as directory:
            copy = Path(shutil.copytree(built, directory / "kernel"))
            kernel = store.install_kernel(data_dir, copy, kind=KernelKind.TUNED, inputs=inputs)
    print(f"kernel {kernel.version}", file=sys.stderr)


def _main() -> None:
    try:
        main()
    except KatapyError as error:
        raise BuildError(str(error)) from error


if __name__ == "__main__":
    run_main(_main)
