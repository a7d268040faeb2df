"""Builds the guest image and the initramfs of Debian's kernel: build.py DIRECTORY CACHE {image,kernel} ...

CACHE is a directory for what is downloaded: with it, and while nothing changes but the agent, a build needs seconds
and no network. Writes into the existing, empty directory DIRECTORY:

    image/root.erofs                        the read-only root of every guest
    image/facts.json                        {"packages": ["name_version_architecture", ...]}
    kernel/vmlinuz, kernel/initramfs.cpio   Debian's kernel, taken from its package and never installed
    kernel/facts.json                       {"version": as uname -r, "package": the package's version}

The same inputs give the same bytes. Needs root, mmdebstrap, mkfs.erofs, pip, and Debian's static busybox. What has
been built, and where it is kept, is the business of katapy.assets.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import debian
import initramfs
import rootfs
from steps import BuildError, call, require_space, run_main, step

_HERE: Final = Path(__file__).resolve().parent
_AGENT: Final = _HERE.parent / "guest-agent"
_BUSYBOX: Final = Path("/bin/busybox")
_SPACE: Final = 400 << 20
# Any, as long as it is always the same.
_UUID: Final = "6b617461-7079-4000-8000-000000000000"


def build_image(work: Path, output: Path, cache: Path) -> None:
    """Build root.erofs in ``output``, with ``work`` for what is needed on the way. Raises BuildError."""
    if not cache.exists():
        _download(work / "cache")
        (work / "cache").rename(cache)
    packages = (cache / "packages").read_text().splitlines()
    root = work / "root"
    with step("root file system, compiled"):
        rootfs.assemble(root, archive=cache / "debian.tar", wheels=cache / "wheels", agent=_AGENT)
    with step("root.erofs"):
        # No extended attributes, one owner, one time, one UUID: what is left is what the files hold.
        fixed = ["-x-1", "-T0", f"-U{_UUID}", "--all-root"]
        call(["mkfs.erofs", "--quiet", "-zlz4hc", *fixed, output / "root.erofs", root])
    _write_facts(output, packages=packages)


def _download(directory: Path) -> None:
    directory.mkdir()
    with ThreadPoolExecutor() as pool:
        download_wheels = step("Python packages of the guest")(rootfs.download_wheels)
        wheels = pool.submit(download_wheels, _HERE / "requirements.txt", directory / "wheels")
        with step("Debian packages of the guest"):
            packages = rootfs.download_debian(directory / "debian.tar")
        wheels.result()
    (directory / "packages").write_text("".join(f"{package}\n" for package in packages))


def build_kernel(work: Path, output: Path, _cache: Path) -> None:
    """Unpack Debian's kernel and make its initramfs in ``output``. Raises BuildError."""
    with step("Debian's kernel"):
        unpacked = work / "kernel-package"
        pattern = "linux-image-[0-9].*-cloud-amd64"
        package, version = debian.unpack_dependency("linux-image-cloud-amd64", pattern, unpacked)
        release = package.removeprefix("linux-image-")
        shutil.copy(unpacked / f"boot/vmlinuz-{release}", output / "vmlinuz")
        (output / "initramfs.cpio").write_bytes(initramfs.build(unpacked / "lib/modules" / release, _BUSYBOX))
        _write_facts(output, version=release, package=version)


def _write_facts(output: Path, **facts: object) -> None:
    (output / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")


def main() -> None:
    """Build what the command line names."""
    builders: dict[str, Callable[[Path, Path, Path], None]] = {"image": build_image, "kernel": build_kernel}
    if len(sys.argv) < 4 or not set(sys.argv[3:]) <= builders.keys():
        sys.exit(f"usage: {sys.argv[0]} DIRECTORY CACHE {{image,kernel}} ...")
    directory, cache = Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute()
    require_space(directory, _SPACE)
    if not _BUSYBOX.exists():
        raise BuildError(f"{_BUSYBOX} is missing; run: apt-get install busybox-static")
    work = directory / "work"
    work.mkdir()
    # What programs leave in their temporary directories goes with it, too.
    os.environ["TMPDIR"] = str(work)
    with ThreadPoolExecutor() as pool:
        jobs = []
        for name in sys.argv[3:]:
            (directory / name).mkdir()
            jobs.append(pool.submit(builders[name], work, directory / name, cache))
        for job in jobs:
            job.result()
    shutil.rmtree(work)


if __name__ == "__main__":
    run_main(main)
