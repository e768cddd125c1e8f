"""The program of a step in a run: does it fit, does it use the donated buffers, is it compiled again?"""

import logging
import os
import sys
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepc._language.state import leaves_by_path
from stepc._runner.data import BatchSpec, DataItem
from stepc._runner.events import EventLog
from stepc._runner.pending import AnyStep, PlainStep, check_metrics
from stepc._text import readable_bytes
from stepc.errors import BuildError
from stepc.inspect.memory import memory

SHOWN = 5  # how many leaves an event lists


@dataclass
class RecompilationMonitor:
    """The programs of one run.

    Args:
      max_recompiles: how often the step may be compiled again after its first call; None for any.
      best: the metric of a step by which `Checkpoints` decide; None if there is none.
    """

    step: AnyStep
    events: EventLog
    max_recompiles: int | None
    best: str | None = None
    _built: dict[int, BatchSpec | None] = field(default_factory=dict, init=False)  # by identity
    _first_traces: int | None = field(default=None, init=False)
    _reported: int = field(default=0, init=False)
    _new: str = field(default="", init=False)  # the signature that the last program was compiled for

    def is_built_for(self, spec: BatchSpec | None) -> bool:
        """Whether there is a program for batches of this signature."""
        return id(spec) in self._built

    def prepare(self, number: int, state: Any, item: DataItem) -> None:  # Any: a state
        """Called before the first call for each signature: compile, and refuse a program that does not fit on a device.

        The call that follows neither traces nor compiles again: `lower` traces the program that the call runs, and JAX
        keeps both the trace and the executable. Errors: those of `lower`; MemoryError; BuildError for a metric that a
        logger could not tell from its own.
        """
        executable = None
        devices = jax.tree.leaves(state)[0].sharding.device_set
        match self.step:
            case PlainStep():
                pass
            case step:
                lowered = step.lower(state, item.batch)
                check_metrics(
                    lowered.metric_shapes,
                    step=number + 1,
                    num_steps=step.steps_per_call,
                    taken=self.events.taken_names,
                    best=self.best,
                    state_ok=True,
                )
                if self.events.loggers and not self._built:
                    self.events.event("plan", number, level=logging.INFO, plan=str(lowered.plan))
                executable = lowered.compile().executable
                needed = memory(executable).total
                device = jax.tree.leaves(state)[0].addressable_shards[0].device
                available = memory_of(device)
                if available is not None and needed > available:
                    has = readable_bytes(available)
                    what = f"the program needs {readable_bytes(needed)} on one device; {device} has {has}"
                    raise MemoryError(what)
        for meter in self.events.meters:
            meter.program(
                item.batch,
                executable,
                frozenset(devices),
                steps_per_call=self.step.steps_per_call,
                rows_axis=self.step.rows_axis,
            )
        if self._built and item.spec is not None:
            self._new = f"a batch of {', '.join(f'{path} {leaf}' for path, leaf in item.spec.rows().items())}"
        self._built[id(item.spec)] = item.spec

    def check_first(self, before: Any, after: Any) -> None:  # Any: states
        """After the first call: log the buffers that were not donated, refuse a state of another type.

        Errors: BuildError.
        """
        if faults := _type_changes(before, after):
            what = "Step 1 returns a state of another type than it takes, so each step would be compiled again."
            is_deleted = any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(before))
            raise BuildError(what, phase="build", step=1, state_ok=not is_deleted, facts=faults)
        kept = [(path, leaf) for path, leaf in leaves_by_path(before) if not leaf.is_deleted()]
        if kept:
            leaves = ", ".join(path for path, _ in kept[:SHOWN])
            leaves += f" and {len(kept) - SHOWN} more" if len(kept) > SHOWN else ""
            bytes_ = sum(leaf.nbytes for _, leaf in kept)
            self.events.event("not_donated", 1, bytes=f"{bytes_:,}", leaves=leaves, of=len(jax.tree.leaves(before)))

    def check_traces(self, number: int) -> None:
        """After a call: log whether it traced and compiled the step again.

        Errors: BuildError beyond `max_recompiles`. The step is made, and the state is the one after it.
        """
        if isinstance(self.step, PlainStep):
            return
        traces = self.step.traces
        if self._first_traces is None:
            self._first_traces = traces
        recompiles = traces - self._first_traces
        if recompiles == self._reported:
            return
        self._reported, why, self._new = recompiles, self._new or self.step.retrace_reason, ""
        self.events.event("recompiled", number, times=recompiles, why=why)
        if self.max_recompiles is not None and recompiles > self.max_recompiles:
            what = f"Step {number} was compiled again: {recompiles} times in this run, {self.max_recompiles} allowed."
            raise BuildError(what, phase="build", step=number, state_ok=True, facts=[("why", why)])


def memory_of(device: Any) -> int | None:  # Any: a device of jax
    """The bytes of memory that programs may use on a device; None where that is not known."""
    stats = device.memory_stats() or {}
    if device.platform == "cpu" and sys.platform != "win32":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return stats.get("bytes_limit")


def _type_changes(before: Any, after: Any) -> list[tuple[str, str]]:  # Any: states
    old, new = jax.tree.structure(before), jax.tree.structure(after)
    if old != new:
        return [("tree in", str(old)), ("tree out", str(new))]
    pairs = zip(leaves_by_path(before), jax.tree.leaves(after), strict=True)
    return [
        (path or "state", f"in {_type_of(leaf)}, out {_type_of(other)}")
        for (path, leaf), other in pairs
        if _type_of(leaf) != _type_of(other)
    ]


def _type_of(leaf: Any) -> str:  # Any: an array, or a number
    return f"{leaf.dtype if isinstance(leaf, jax.Array) else jnp.result_type(leaf)}{list(np.shape(leaf))}"
