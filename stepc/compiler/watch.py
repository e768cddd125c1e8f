"""What a step saw of numbers that are not finite: where to look, if there are any."""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Watch:
    """Flags of one step. They are outputs of their own, never donated: they can be read as late as one likes.

    Args:
      finite: whether the loss and the norm of the gradient are finite, after the reduction; with `loss_scale` alone,
        which adapts to an overflow of the gradient, whether the loss is, and the scale could still become smaller.
      losses: `[devices, microbatches]`, whether the loss of each cell is; `[1, microbatches]` on a single device.
      squares: `[leaves]`, the sum of squares of each leaf of the gradient, before `clip` and `noise`. In one array: an
        array for each leaf would be a microsecond of each call, each.
      paths: of those leaves.
    """

    finite: Any  # Any: a bool scalar
    losses: Any  # Any: a bool array
    squares: Any  # Any: an array
    paths: tuple[str, ...] = field(metadata={"static": True})

    def describe(self) -> list[tuple[str, str]]:
        """Rows of (label, text) that name the microbatches and the leaves of the gradient that are not finite."""
        return [
            ("microbatches", self._microbatches()),
            ("gradient", self._gradient()),
            ("gradient norm", f"{self.grad_norm:g}"),
        ]

    @property
    def grad_norm(self) -> float:
        """The global norm of the gradient, before `clip` and `noise`."""
        return math.sqrt(sum(map(float, np.asarray(self.squares))))

    def _microbatches(self) -> str:
        rows = [
            (number, np.asarray(shard.data))
            for shard in sorted(self.losses.addressable_shards, key=lambda one: one.index[0].start or 0)
            for number in [shard.index[0].start or 0]
        ]
        # A replicated array has the same rows on every device: each number once.
        seen = {number + offset: row for number, block in rows for offset, row in enumerate(block)}
        size = self.losses.shape[-1]
        bad = {number: np.flatnonzero(~row) for number, row in seen.items() if not row.all()}
        if not bad:
            return f"the loss of each of the {size} is finite" if size > 1 else "the loss is finite"
        many = self.losses.shape[0] > 1
        parts = [
            f"{', '.join(map(str, cells))}{f' on device {number}' if many else ''}" for number, cells in bad.items()
        ]
        return f"{'; '.join(parts)} (of {size}, counted from 0)"

    def _gradient(self) -> str:
        is_finite = np.isfinite(np.asarray(self.squares))
        bad = [path or "the parameter" for path, is_fine in zip(self.paths, is_finite, strict=True) if not is_fine]
        total = len(self.paths)
        if not bad:
            return "every leaf is finite"
        return f"not finite in {', '.join(bad)} ({len(bad)} of {total} leaves)"
