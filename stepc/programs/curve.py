"""The picture of a run: losses against steps; it must not know how they came about."""

import json
from pathlib import Path
from typing import TypeAlias

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

TITLE = "A small GPT learns the source of Python's standard library, byte by byte"
TRAINING, VALIDATION, BIGRAM = "#9bb8d3", "#c0392b", "#555555"


Points: TypeAlias = list[tuple[int, float]]


def draw(path: Path, metrics: Path, *, bigram: float) -> None:
    """Write a PNG of both losses in a file of metrics, with the bigram's as a horizontal line.

    Why: the file holds what was logged before a run was interrupted, too. No global figure and no display are needed,
      so it draws the same on a server and in a test.
    Units: nats per byte.
    """
    training, validation = _points(metrics, "loss"), _points(metrics, "validation_loss")
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axhline(bigram, color=BIGRAM, linestyle="--", linewidth=1, label=f"bigram {bigram:.2f}")
    axes.plot(*_columns(training), color=TRAINING, linewidth=1.2, label="training")
    last = f" {validation[-1][1]:.2f}" if validation else ""
    axes.plot(
        *_columns(validation),
        marker="o",
        linestyle="none",
        color=VALIDATION,
        clip_on=False,  # the first point stands on the edge
        label=f"validation{last}",
    )
    axes.set(xlabel="step", ylabel="loss (nats per byte)", title=TITLE)
    axes.margins(x=0)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def _points(metrics: Path, name: str) -> Points:
    lines = map(json.loads, metrics.read_text(encoding="utf-8").splitlines())
    return [(line["step"], line[name]) for line in lines if "event" not in line and line.get(name) is not None]


def _columns(points: Points) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [loss for _, loss in points]
