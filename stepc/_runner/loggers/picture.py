"""A logger that plots the metrics when a run ends, however it ends. matplotlib is imported only then."""

import importlib
import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path

from stepc.errors import ConfigError

FINAL = ("end", "failure")


class Picture:
    """Plot each metric over the steps, in a panel of its own.

    Args:
      path: a PNG, written when the run ends and at each failure.
    Errors: ConfigError without the extra "demo".
    It shows this run alone: after a resume the steps before are missing. A `JSONL` file has them all.
    Example:
      >>> sc.run(step, state, data, loggers=[Picture("runs/first/metrics.png")])  # doctest: +SKIP
    """

    def __init__(self, path: str | Path) -> None:
        if importlib.util.find_spec("matplotlib") is None:
            raise ConfigError("`Picture` needs matplotlib.", suggestion="Install it with: pip install 'stepc[demo]'")
        self.path = Path(path)
        self.points: dict[str, list[tuple[int, float]]] = {}

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Remember the metrics of one step."""
        for name, value in metrics.items():
            if math.isfinite(value):
                self.points.setdefault(name, []).append((step, value))

    def event(self, name: str, facts: Mapping[str, str], step: int) -> None:
        """Draw, if the run ends or fails."""
        if name in FINAL and self.points:
            self.draw()

    def trim(self, step: int) -> None:
        """Forget later steps."""
        self.points = {name: [at for at in points if at[0] <= step] for name, points in self.points.items()}

    def draw(self) -> None:
        """Write the PNG, without pyplot: no global figure, no display."""
        figures = importlib.import_module("matplotlib.figure")
        canvases = importlib.import_module("matplotlib.backends.backend_agg")
        figure = figures.Figure(figsize=(8, 2.5 * len(self.points)), dpi=120, layout="constrained")
        canvases.FigureCanvasAgg(figure)
        panels = figure.subplots(len(self.points), sharex=True, squeeze=False)[:, 0]
        for axes, (name, points) in zip(panels, self.points.items(), strict=True):
            axes.plot([step for step, _ in points], [value for _, value in points], linewidth=1.2)
            axes.set(ylabel=name)
            axes.grid(alpha=0.25)
        panels[-1].set(xlabel="step")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.path)
