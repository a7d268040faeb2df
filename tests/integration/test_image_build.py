"""When an image has to be built, and what a build leaves; the recipe here is a small stand-in for the real one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from katapy import assets, image_build
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


class Project:
    """Sources whose recipe writes down that it ran."""

    def __init__(self, directory: Path) -> None:
        self.sources, self.data, self.log = directory / "sources", directory / "data", directory / "log"
        self.agent = self.sources / "guest-agent/katapy_agent/server.py"
        self.agent.parent.mkdir(parents=True)
        (self.sources / "images").mkdir()
        (self.sources / "guest-agent/init").write_text("init")
        self.agent.write_text("agent 1")
        self.write_recipe(0)

    def write_recipe(self, status: int) -> None:
        text = RECIPE.format(log=str(self.log), agent=str(self.agent), status=status)
        (self.sources / "images/build.py").write_text(text)

    def build(self, *, force: bool = False) -> assets.Image:
        return image_build.build(self.data, self.sources, force=force)[0]

    def runs(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_nothing_is_built_twice(project: Project) -> None:
    image = project.build()
    os.utime(project.agent, (1, 1))
    (project.agent.parent / "__pycache__").mkdir()
    (project.agent.parent / "__pycache__/server.pyc").write_text("compiled")
    assert project.build() == image
    assert project.runs() == ["image kernel"]


def test_a_change_of_the_agent_builds_the_image_only(project: Project) -> None:
    image = project.build()
    project.agent.write_text("agent 2")
    changed = project.build()
    assert changed.digest != image.digest
    assert assets.find_image(project.data) == changed
    assert project.runs() == ["image kernel", "image"]


def test_going_back_to_an_older_agent_boots_that_agent(project: Project) -> None:
    """The image of agent 1 was still there, so nothing was built, and VMs went on to boot agent 2."""
    project.build()
    project.agent.write_text("agent 2")
    project.build()
    project.agent.write_text("agent 1")
    project.build()
    assert assets.find_image(project.data).path.read_text() == "agent 1"


def test_a_change_of_the_recipe_builds_both(project: Project) -> None:
    project.build()
    (project.sources / "images/requirements.txt").write_text("grpcio==1\n")
    project.build()
    assert project.runs() == ["image kernel"] * 2
    assert len(list((project.data / "cache").iterdir())) == 1


def test_force_builds_both(project: Project) -> None:
    project.build()
    project.build(force=True)
    assert project.runs() == ["image kernel"] * 2


def test_a_damaged_image_is_built_again(project: Project) -> None:
    project.build().path.write_text("a")
    assert project.build().path.read_text() == "agent 1"


def test_a_failed_build_leaves_what_was_there(project: Project) -> None:
    image = project.build()
    project.write_recipe(3)
    with pytest.raises(Unavailable, match=r"cannot build the guest's image and kernel: build.py ended with status 3"):
        project.build()
    assert assets.find_image(project.data) == image
    assert not list(project.data.glob(".build-*"))
