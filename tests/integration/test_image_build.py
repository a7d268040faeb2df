"""When an image has to be built, and what a build leaves; the recipes here are small stand-ins for the real ones."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import pytest

from katapy import image_build
from katapy.assets import guest
from katapy.assets.root import Root, find_root, hold_root
from katapy.errors import Unavailable

RECIPE = """
import sys
from pathlib import Path
directory, cache, *parts = sys.argv[1:]
Path(cache).mkdir(exist_ok=True)
with Path({log!r}).open("a") as log:
    print(*parts, file=log)
for part in parts:
    (Path(directory) / part).mkdir()
if "image" in parts:
    (Path(directory) / "image/root.erofs").write_text(Path({agent!r}).read_text())
    (Path(directory) / "image/facts.json").write_text("{{}}")
if "kernel" in parts:
    (Path(directory) / "kernel/vmlinuz").write_text("kernel")
    (Path(directory) / "kernel/facts.json").write_text('{{"version": "6.1.0-1-cloud-amd64"}}')
sys.exit({status})
"""


ROOT_RECIPE = """
import sys
from pathlib import Path
directory, cache = sys.argv[1:]
with Path({log!r}).open("a") as log:
    print("root", *(path.name for path in Path(cache).parent.iterdir()), file=log)
root = Path(directory) / "root/rootfs"
(root / "usr/bin").mkdir(parents=True)
(root / "usr/bin/python3").write_text({content!r})
(root.parent / "facts.json").write_text('{{"packages": []}}')
"""


class Project:
    """Sources whose recipes write down that they ran."""

    def __init__(self, directory: Path) -> None:
        self.sources, self.data, self.log = directory / "sources", directory / "data", directory / "log"
        self.agent = self.sources / "guest-agent/katapy_agent/server.py"
        self.agent.parent.mkdir(parents=True)
        (self.sources / "images").mkdir()
        (self.sources / "default-root").mkdir()
        (self.sources / "guest-agent/init").write_text("init")
        self.agent.write_text("agent 1")
        self.write_recipe(0)
        self.write_root_recipe("python 1")

    def write_recipe(self, status: int) -> None:
        text = RECIPE.format(log=str(self.log), agent=str(self.agent), status=status)
        (self.sources / "images/build.py").write_text(text)

    def write_root_recipe(self, content: str) -> None:
        text = ROOT_RECIPE.format(log=str(self.log), content=content)
        (self.sources / "default-root/default_root.py").write_text(text)

    def build(self, *, force: bool = False) -> guest.Image:
        return image_build.build(self.data, self.sources, force=force)[0]

    def build_root(self) -> Root:
        return image_build.build(self.data, self.sources)[2]

    def runs(self) -> list[str]:
        """Return what each recipe was to build; the root's was shown the cache of the images' recipe."""
        caches = " ".join(path.name for path in (self.data / "cache").iterdir())
        return [line.removesuffix(f" {caches}") for line in self.log.read_text().splitlines()]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_nothing_is_built_twice(project: Project) -> None:
    image = project.build()
    os.utime(project.agent, (1, 1))
    (project.agent.parent / "__pycache__").mkdir()
    (project.agent.parent / "__pycache__/server.pyc").write_text("compiled")
    assert project.build() == image
    assert project.runs() == ["image kernel", "root"]


def test_a_change_of_the_agent_builds_the_image_only(project: Project) -> None:
    image = project.build()
    project.agent.write_text("agent 2")
    changed = project.build()
    assert changed.digest != image.digest
    assert guest.find_image(project.data) == changed
    assert project.runs() == ["image kernel", "root", "image"]


def test_going_back_to_an_older_agent_boots_that_agent(project: Project) -> None:
    """The image of agent 1 was still there, so nothing was built, and VMs went on to boot agent 2."""
    project.build()
    project.agent.write_text("agent 2")
    project.build()
    project.agent.write_text("agent 1")
    project.build()
    assert guest.find_image(project.data).path.read_text() == "agent 1"


def test_a_change_of_the_recipe_builds_all(project: Project) -> None:
    project.build()
    (project.sources / "images/requirements.txt").write_text("grpcio==1\n")
    project.build()
    assert [run.split()[0] for run in project.runs()] == ["image", "root"] * 2
    assert len(list((project.data / "cache").iterdir())) == 1


def test_force_builds_all(project: Project) -> None:
    project.build()
    project.build(force=True)
    assert project.runs() == ["image kernel", "root"] * 2


def test_a_change_of_the_roots_recipe_builds_the_root_only(project: Project) -> None:
    old = project.build_root()
    project.write_root_recipe("python 2")
    new = project.build_root()
    assert project.runs() == ["image kernel", "root", "root"]
    assert find_root(project.data) == new
    assert (new.path / "usr/bin/python3").read_text() == "python 2"
    assert not old.path.exists()


def test_an_older_root_that_is_in_use_stays_until_the_next_build(project: Project) -> None:
    old = project.build_root()
    with hold_root(project.data) as held:
        assert held == old
        project.write_root_recipe("python 2")
        project.build_root()
        assert (held.path / "usr/bin/python3").read_text() == "python 1"
    project.build_root()
    assert not old.path.exists()


def test_a_root_that_comes_out_the_same_stays_where_it_is(project: Project) -> None:
    """It may be in use: a VM would lose its root under its feet."""
    old = project.build_root()
    inode = old.path.stat().st_ino
    project.build(force=True)
    again = find_root(project.data)
    assert (again.digest, again.path.stat().st_ino) == (old.digest, inode)
    assert again.created > old.created


def test_a_damaged_root_is_built_again(project: Project) -> None:
    root = project.build_root()
    (root.path / "usr/bin/python3").unlink()
    with pytest.raises(
        Unavailable, match=r"root .* is damaged: rootfs/usr/bin/python3 is missing; .*katapy image build"
    ):
        find_root(project.data)
    assert project.build_root() == replace(root, created=ANY)


def test_a_damaged_image_is_built_again(project: Project) -> None:
    project.build().path.write_text("a")
    assert project.build().path.read_text() == "agent 1"


def test_a_failed_build_leaves_what_was_there(project: Project) -> None:
    image = project.build()
    project.write_recipe(3)
    with pytest.raises(Unavailable, match=r"cannot build the guest's image and kernel: build.py ended with status 3"):
        project.build()
    assert guest.find_image(project.data) == image
    assert not list(project.data.glob(".build-*"))
