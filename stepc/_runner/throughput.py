"""Speed as metrics: steps, examples and tokens per second, and the share of the peak of a known device."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import numpy as np

from stepc._language.kinds import Batch
from stepc._language.state import leaves_by_path
from stepc._runner.arguments import ArgumentFaults
from stepc.errors import ConfigError, did_you_mean
from stepc.inspect.cost import cost
from stepc.inspect.roofline import device_of

TERA = 1e12


@dataclass(frozen=True)
class _WorkPerStep:
    """What one step does. `flops` are those of one device, None where they are not known."""

    examples: float
    tokens: float | None
    flops: float | None


class Throughput:
    """Measure the speed of a run, for all its loggers: `loggers=[sc.Throughput(tokens="tokens"), sc.Console()]`.

    Meaning: between two logged steps, with evaluations, hooks and saves left out, `steps_per_second`,
      `examples_per_second` (rows of the batches), `tokens_per_second`, and `teraflops_per_second` of one device: the
      matrix products of the compiled program, loops multiplied out. On a device of `stepc.inspect.DEVICES` also `hfu`,
      that speed over the peak of the device in bfloat16; and `mfu`, the same of `model_flops`.
    Why: a step that became slow, and a device that is mostly idle, show as a curve beside the loss.

    Args:
      tokens: the path of the leaf of a batch whose elements are counted as tokens, such as "tokens"; padding counts
        too. None: tokens are not counted.
      model_flops: what a step needs over all devices if nothing is computed twice, such as
        `6 * num_parameters * num_tokens`; None: no `mfu`. What `remat` computes again is in `hfu` and not in `mfu`.
      clock: gives the time in seconds; for tests.
    Units: per second of a whole step; `hfu` and `mfu` are between 0 and 1.
    Errors: FieldTypeError or ConfigError with all faults; a BuildError before the first step for a leaf that is not in
      the batch, and for a metric of a step with one of these names.
    What is not known is left out: flops of a function that is not compiled by stepc, or of a loop without a known trip
    count, shares of a device that is not in the table. Of batches of several shapes only steps are counted. Kernels
    that are custom calls other than matrix products (`compiled.cost().uncounted`) are not in the flops.
    Source: hfu and mfu as in Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models, 2022,
      https://arxiv.org/abs/2205.05198.
    Example:
      >>> Throughput(tokens="tokens")
      Throughput(tokens='tokens', model_flops=None)
    """

    reserved = (
        "steps_per_second",
        "examples_per_second",
        "tokens_per_second",
        "teraflops_per_second",
        "hfu",
        "mfu",
    )

    def __init__(
        self,
        *,
        tokens: str | None = None,
        model_flops: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        faults = ArgumentFaults("Throughput")
        faults.instance("tokens", tokens, (str, type(None)), "the path of a leaf of a batch, or None")
        faults.number("model_flops", model_flops, "a positive number or None", lambda one: one > 0, optional=True)
        faults.callable_("clock", clock, "a function that gives the time in seconds")
        faults.refuse()
        self.tokens, self.model_flops, self._clock = tokens, model_flops, clock
        self._work: _WorkPerStep | None = None
        self._signatures = 0
        self._peak: float | None = None
        self._num_devices = 1
        self._last: tuple[int, float] | None = None

    def __repr__(self) -> str:
        return f"Throughput(tokens={self.tokens!r}, model_flops={self.model_flops!r})"

    def program(
        self,
        batch: Batch,
        executable: jax.stages.Compiled | None,
        devices: frozenset[Any],  # Any: devices of jax
        *,
        steps_per_call: int,
        rows_axis: int,
    ) -> None:
        """Take a batch of a signature that is new, and the program that is compiled for it, if it is known.

        Errors: ConfigError for a leaf that the batch does not have.
        """
        leaves = dict(leaves_by_path(batch))
        if self.tokens is not None and self.tokens not in leaves:
            raise ConfigError(
                f"`Throughput(tokens={self.tokens!r})`: the batch has no such leaf.",
                facts=[("leaves", ", ".join(leaves))],
                suggestion=did_you_mean(self.tokens, leaves),
            )
        shape = next((np.shape(leaf) for leaf in leaves.values() if np.ndim(leaf) > rows_axis), (0,))
        flops = None if executable is None else _flops(executable)
        self._work = _WorkPerStep(
            examples=prod(shape[: rows_axis + 1]) / steps_per_call,
            tokens=None if self.tokens is None else np.size(leaves[self.tokens]) / steps_per_call,
            flops=None if flops is None else flops / steps_per_call,
        )
        self._signatures += 1
        kind = device_of(next(iter(devices)).device_kind)
        self._peak, self._num_devices = None if kind is None else kind.flops_per_second, len(devices)

    def leave_out(self, seconds: float) -> None:
        """Do not count a time in which nothing was trained."""
        if self._last is not None:
            self._last = (self._last[0], self._last[1] + seconds)

    def measured(self, step: int) -> Mapping[str, float]:
        """The speed since the last step that was logged; nothing for the first, which was compiled."""
        now, last = self._clock(), self._last
        self._last = (step, now)
        if last is None or step <= last[0]:
            return {}
        pace = (step - last[0]) / max(now - last[1], 1e-9)
        found: dict[str, float | None] = {"steps_per_second": pace}
        if self._work is not None and self._signatures == 1:
            work = self._work
            found["examples_per_second"] = work.examples * pace
            found["tokens_per_second"] = None if work.tokens is None else work.tokens * pace
            found["teraflops_per_second"] = None if work.flops is None else work.flops * pace / TERA
            if self._peak is not None:
                found["hfu"] = None if work.flops is None else work.flops * pace / self._peak
                model = self.model_flops
                found["mfu"] = None if model is None else model / self._num_devices * pace / self._peak
        return {name: value for name, value in found.items() if value is not None}


def _flops(executable: jax.stages.Compiled) -> int | None:
    try:
        return cost(executable).flops
    except ValueError:  # a backend that prints no HLO
        return None
