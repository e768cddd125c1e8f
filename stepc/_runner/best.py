"""The best value of a metric so far. It must not know what is evaluated, or saved."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from stepc._language.kinds import HostMetrics
from stepc.errors import ConfigError, did_you_mean

Best: TypeAlias = tuple[int, float] | None  # the step and the value; None before the first
MODES = ("min", "max")


def is_better(value: float, than: float | None, mode: str, *, by: float = 0.0) -> bool:
    """Whether a value is better than another by more than `by`. One that is not finite never is."""
    if than is None or not math.isfinite(value):
        return math.isfinite(value)
    return value < than - by if mode == "min" else value > than + by


def deciding_value(metrics: HostMetrics, name: str, asks: str) -> float:
    """The value of the metric that decides. Errors: ConfigError that names `asks`, if there is none, or an array."""
    if name not in metrics:
        given = ", ".join(map(repr, metrics)) or "none"
        raise ConfigError(
            f"There is no metric {name!r}, by which {asks} decides.",
            facts=[("given", given)],
            suggestion=did_you_mean(name, metrics),
        )
    if np.ndim(metrics[name]):
        raise ConfigError(f"The metric {name!r}, by which {asks} decides, is an array, which has no order.")
    return float(metrics[name])


@dataclass
class BestValue:
    """The best value of a metric over the evaluations of a run, and how many there were since.

    Args:
      asks: what decides by it, in words.
      patience: how many evaluations in a row may bring none that is better; None for any number.
      min_delta: a value is better if it is by more than this.
    """

    metric: str
    mode: str
    asks: str
    patience: int | None = None
    min_delta: float = 0.0
    best: Best = None
    num_since: int = 0
    _before: list[tuple[int, Best, int]] = field(default_factory=list)  # each evaluation

    def is_of(self, other: "BestValue") -> bool:
        """Whether the other one has the same best value, whatever it is for."""
        return (self.metric, self.mode, self.min_delta) == (other.metric, other.mode, other.min_delta)

    def note(self, step: int, metrics: HostMetrics) -> bool:
        """Note an evaluation; whether it is the best. Errors: those of `deciding_value`."""
        value = deciding_value(metrics, self.metric, self.asks)
        self._before.append((step, self.best, self.num_since))
        is_best = is_better(value, None if self.best is None else self.best[1], self.mode, by=self.min_delta)
        self.best, self.num_since = ((step, value), 0) if is_best else (self.best, self.num_since + 1)
        return is_best

    def go_back(self, step: int) -> None:
        """Forget the evaluations after a step."""
        while self._before and self._before[-1][0] > step:
            _, self.best, self.num_since = self._before.pop()

    @property
    def why_stop(self) -> str | None:
        """Why the run ends, in words; None if it goes on."""
        if self.patience is None or self.num_since < self.patience:
            return None
        best = "no evaluation was finite" if self.best is None else f"best {self.best[1]:.6g} at step {self.best[0]}"
        return f"{self.metric} is no better for {self.num_since} evaluations: {best}"

    def record(self) -> Mapping[str, Any]:  # Any: JSON values
        """What a checkpoint keeps."""
        names = ("metric", "mode", "min_delta", "best", "num_since")
        return {name: getattr(self, name) for name in names}

    def resume(self, records: Sequence[Mapping[str, Any]]) -> None:  # Any: JSON values
        """Go on from what a checkpoint has kept of the same metric, if it has."""
        mine = (self.metric, self.mode, self.min_delta)
        for one in records:
            if (one["metric"], one["mode"], one["min_delta"]) == mine:
                self.best, self.num_since = one["best"] and (one["best"][0], one["best"][1]), one["num_since"]
                self._before.clear()
