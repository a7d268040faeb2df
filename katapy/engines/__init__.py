"""The engines that katapy can be made a runtime of: how each is configured, and by which text in which file."""

from __future__ import annotations

from typing import Final

from katapy.engines.containerd import Containerd
from katapy.engines.docker import Docker
from katapy.engines.dropin import Crio, Podman
from katapy.engines.engine import Engine

ENGINES: Final[dict[str, Engine]] = {engine.name: engine for engine in (Containerd(), Crio(), Docker(), Podman())}
