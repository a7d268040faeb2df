"""Draws the report: few bars, each with its figure, told apart by position and hatching and not by colour alone."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import matplotlib as mpl

mpl.use("Agg")  # no display

from figures import format_ratio
from matplotlib import pyplot
from memory import WHOLE

# Okabe and Ito's, which people who confuse colours tell apart, too.
_COLOURS: Final = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#0072B2", "#D55E00")
_HATCHES: Final = ("", "//", "..", "xx", "\\\\", "++")
_WIDTH: Final = 9.0  # inches
_BAR: Final = 0.3  # inches of height for each
_SETTINGS: Final[dict[Any, Any]] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.5,
    "svg.fonttype": "none",  # text stays text: it can be read out and searched
    "svg.hashsalt": "katapy",  # the same figures give the same file
}


def _style(kinds: list[int]) -> dict[str, Any]:
    colours, hatches = [_COLOURS[kind] for kind in kinds], [_HATCHES[kind] for kind in kinds]
    return {"color": colours, "hatch": hatches, "edgecolor": "white"}


class _Panel(Protocol):
    @property
    def bars(self) -> int: ...

    def draw(self, axes: Any) -> None: ...


@dataclass(frozen=True)
class _Ratios:
    """A bar for each ratio's median, with its quartiles; a line where the reference is."""

    title: str
    rows: list[dict[str, Any]]

    @property
    def bars(self) -> int:
        return len(self.rows)

    def draw(self, axes: Any) -> None:
        ratios = [row["ratio"] for row in self.rows]
        medians = [each["median"] for each in ratios]
        spread = [
            [each["median"] - each["lower"] for each in ratios],
            [each["upper"] - each["median"] for each in ratios],
        ]
        kinds = [0 if "katapy" in row["name"] else 1 for row in self.rows]
        bars = axes.barh([row["name"] for row in self.rows], medians, xerr=spread, capsize=3, **_style(kinds))
        axes.bar_label(bars, [format_ratio(median) for median in medians], padding=6)
        axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
        axes.set_title(self.title, loc="left", fontsize=11)
        axes.margins(x=0.1)


@dataclass(frozen=True)
class _Stacks:
    """A bar for each kind of pod, of its parts in MiB."""

    title: str
    stacks: dict[str, dict[str, float]]

    @property
    def bars(self) -> int:
        return len(self.stacks) + 1  # the legend's room

    def draw(self, axes: Any) -> None:
        names = list(self.stacks)
        left = [0.0] * len(names)
        for index, part in enumerate(dict.fromkeys(part for stack in self.stacks.values() for part in stack)):
            sizes = [self.stacks[name].get(part, 0.0) for name in names]
            axes.barh(names, sizes, left=left, label=part, **_style([index]))
            left = [before + size for before, size in zip(left, sizes, strict=True)]
        for position, total in enumerate(left):
            axes.annotate(f"{total:.0f} MiB", (total, position), (4, 0), textcoords="offset points", va="center")
        axes.set_title(self.title, loc="left", fontsize=11)
        axes.legend(ncols=len(_COLOURS), loc="upper left", bbox_to_anchor=(0, -0.12), frameon=False)
        axes.margins(x=0.1)


def draw(document: dict[str, Any], directory: Path) -> None:
    """Write performance.png and performance.svg into ``directory``; nothing where there is nothing to draw."""
    series = document["series"]
    panels: list[_Panel] = [
        _Ratios("Start: how many times as long as a bare VM of the same kernel", _start(series)),
        _Stacks("Memory of one idle pod on the host (PSS)", _memory(series)),
        _Ratios("Streams: how many times as long as a pipe of the host", _compared(series, "streams")),
        _Ratios(
            "virtio-fs: how many times as long as the same virtiofsd without katapy", _compared(series, "virtiofs")
        ),
        _Ratios("Networks: how many times as much as a bare VM on the same bridge", _traffic(series)),
    ]
    if shown := [panel for panel in panels if panel.bars > 1]:
        _save(shown, directory)


def _save(panels: list[_Panel], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    heights = [panel.bars + 2 for panel in panels]
    with mpl.rc_context(_SETTINGS):
        size = (_WIDTH, sum(heights) * _BAR)
        figure, grid = pyplot.subplots(
            len(panels), squeeze=False, figsize=size, height_ratios=heights, layout="constrained"
        )
        for panel, [axes] in zip(panels, grid, strict=True):
            panel.draw(axes)
            axes.invert_yaxis()  # the first on top
            axes.tick_params(axis="y", length=0)
        figure.savefig(directory / "performance.png", dpi=150)
        figure.savefig(directory / "performance.svg", metadata={"Date": None})
        pyplot.close(figure)


def _compared(series: list[dict[str, Any]], group: str) -> list[dict[str, Any]]:
    """Return what has a ratio, with the same work of different runtimes side by side."""
    rows = [each for each in series if each["group"] == group and each["ratio"]]
    works = list(dict.fromkeys(_work(row) for row in rows))
    return sorted(rows, key=lambda row: works.index(_work(row)))


def _work(row: dict[str, Any]) -> str:
    return str(row["name"].rpartition(", ")[0])


def _start(series: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a user waits for; not the verbs alone, and not many at once."""
    names = ("run true", "first byte", "create and start")
    return [each for each in _compared(series, "start") if each["name"].startswith(names)]


def _traffic(series: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what stands beside a bare VM; not starts."""
    return [each for each in _compared(series, "network") if each["beside"].endswith(", bare VM")]


def _memory(series: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the MiB of each part of each kind of pod, and of a bare VM."""
    stacks: dict[str, dict[str, float]] = defaultdict(dict)
    for each in series:
        if each["group"] == "memory" and each["unit"] == "bytes":
            kind, _, part = each["name"].partition(": ")
            if not kind.endswith(WHOLE):
                stacks[kind][part or "QEMU"] = each["summary"]["median"] / (1 << 20)
    return dict(stacks)
