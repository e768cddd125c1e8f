"""The picture of a run: losses against steps; it must not know where they come from."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

TITLE = "A small GPT learns the source of Python's standard library, byte by byte"
TRAINING, VALIDATION, BIGRAM = "#9bb8d3", "#c0392b", "#555555"


class Curve:
    """A logger that remembers the loss, and draws it.

    Why: no global figure and no display are needed, so it draws the same on a server and in a test.
    """

    def __init__(self) -> None:
        self.training: list[tuple[int, float]] = []
        self.validation: list[tuple[int, float]] = []

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Remember the training loss of one step."""
        self.training.append((step, metrics["loss"]))

    def validated(self, loss: float, *, step: int) -> None:
        """Remember a validation loss. Step 0 is before the first update."""
        self.validation.append((step, loss))

    def draw(self, path: Path, *, bigram: float) -> None:
        """Write a PNG of both losses, with the bigram's as a horizontal line.

        Units: nats per byte.
        """
        figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.axhline(bigram, color=BIGRAM, linestyle="--", linewidth=1, label=f"bigram {bigram:.2f}")
        axes.plot(*_columns(self.training), color=TRAINING, linewidth=1.2, label="training")
        last = f" {self.validation[-1][1]:.2f}" if self.validation else ""
        axes.plot(
            *_columns(self.validation),
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


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [loss for _, loss in points]
