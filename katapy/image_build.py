"""Builds what VMs need: the guest image and Debian's kernel by images/build.py, the default root of sandboxes by
default-root/default_root.py. Installs what comes out.

Knows where the sources are and whether something has to be built; how it is built is the recipe's business.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

from katapy import run
from katapy.assets import guest, store
from katapy.assets.guest import Image, Kernel, KernelKind
from katapy.assets.root import Root, list_roots
from katapy.errors import NotFound, Unavailable

_Asset = TypeVar("_Asset", Image, Kernel, Root)

_RECIPE: Final = "images/build.py"
_ROOT_RECIPE: Final = "default-root/default_root.py"
_GRACE: Final = 5.0


def find_sources() -> Path:
    """Return the directory with the recipe and the agent's sources: a checkout's root, else the installed copy.

    Raises NotFound.
    """
    candidates = (Path(__file__).resolve().parents[1], Path(sys.prefix) / "share/katapy")
    for directory in candidates:
        if (directory / _RECIPE).is_file():
            return directory
    raise NotFound(f"no {_RECIPE} in {' or '.join(map(str, candidates))}: katapy is not completely installed")


def build(
    data_dir: Path, sources: Path, *, force: bool = False, waiting: Callable[[], None] = lambda: None
) -> tuple[Image, Kernel, Root]:
    """Build and install the image, Debian's kernel and the default root where their inputs have changed.

    With ``force`` all three. The recipes print what they do on stderr. ``waiting`` is called when another build is
    going on. Raises Unavailable when a build fails; what was there is still there then.
    """
    with store.lock(data_dir, waiting):
        image, kernel = _build_guest(data_dir, sources, force=force)
        return image, kernel, _build_root(data_dir, sources, force=force)


def _build_guest(data_dir: Path, sources: Path, *, force: bool) -> tuple[Image, Kernel]:
    recipe = _hash(sources, "images")
    image_inputs = _hash(sources, "images", "guest-agent/init", "guest-agent/katapy_agent")
    kernels = [one for one in guest.list_kernels(data_dir)[0] if one.kind is KernelKind.DEBIAN]
    image = None if force else _newest_of(guest.list_images(data_dir)[0], image_inputs)
    kernel = None if force else _newest_of(kernels, recipe)
    if image is not None and kernel is not None:
        return image, kernel
    cache = _cache(data_dir, recipe, force=force)
    parts = [*(["image"] if image is None else []), *(["kernel"] if kernel is None else [])]
    with store.staging(data_dir) as directory:
        _run_recipe(f"the guest's {' and '.join(parts)}", sources / _RECIPE, directory, cache, parts)
        kernel = kernel or store.install_kernel(data_dir, directory / "kernel", kind=KernelKind.DEBIAN, inputs=recipe)
        image = image or store.install_image(data_dir, directory / "image", inputs=image_inputs)
    return image, kernel


def _build_root(data_dir: Path, sources: Path, *, force: bool) -> Root:
    """Build the default root after the image, whose packages are in the cache; older ones go unless they are in use."""
    inputs = _hash(sources, "images", "default-root")
    root = None if force else _newest_of(list_roots(data_dir)[0], inputs)
    if root is None:
        cache = _cache(data_dir, _hash(sources, "images"), force=False)
        with store.staging(data_dir) as directory:
            _run_recipe("the default root", sources / _ROOT_RECIPE, directory, cache, [])
            root = store.install_root(data_dir, directory / "root", inputs=inputs)
    store.remove_roots(data_dir, keep=root)
    return root


def _cache(data_dir: Path, inputs: str, *, force: bool) -> Path:
    """Return where the recipe with these inputs keeps its downloads; those of others go, and its own with ``force``."""
    directory = data_dir / "cache"
    directory.mkdir(exist_ok=True)
    for other in directory.iterdir():
        if force or other.name != inputs:
            shutil.rmtree(other)
    return directory / inputs


def _newest_of(found: list[_Asset], inputs: str) -> _Asset | None:
    """Return the newest if it is made of ``inputs``: an older one of them would not be booted (guest.find_image)."""
    return found[0] if found and found[0].inputs == inputs else None


def _run_recipe(what: str, recipe: Path, directory: Path, cache: Path, parts: list[str]) -> None:
    # The caller's environment: it may say how the network is reached. The recipe passes on what it needs.
    argv = [sys.executable, str(recipe), str(directory), str(cache), *parts]
    process = run.start(argv, name="image build", stderr=2, env={**os.environ, **run.ENVIRONMENT})
    status = asyncio.run(_wait(process))
    if status != 0:
        raise Unavailable(f"cannot build {what}: {recipe.name} ended with status {status}")


async def _wait(process: run.Process) -> int:
    try:
        return await process.wait()
    except asyncio.CancelledError:
        await process.stop(grace=_GRACE)
        raise


def _hash(sources: Path, *names: str) -> str:
    """Return a digest of what is in these files and directories, whatever their times and owners."""
    digest = hashlib.sha256()
    for path in (path for name in names for path in _files(sources / name)):
        data = path.read_bytes()
        digest.update(b"%s\0%d\0" % (os.fsencode(path.relative_to(sources)), len(data)))
        digest.update(data)
    return digest.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    """Yield the sources at and below ``path`` in one order; what tools leave beside them is none."""
    if path.is_file():
        yield path
        return
    for entry in sorted(path.iterdir()):
        if not entry.name.startswith((".", "__pycache__")) and entry.suffix != ".pyi":
            yield from _files(entry)
