"""What becomes of a step's program: whether it is compiled again, keeps its buffers, returns what it takes."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from stepc._language.kinds import Batch
from stepc._language.state import leaves_by_path
from stepc._runner.events import EventLog
from stepc._runner.pending import LoweringStep
from stepc._units import readable
from stepc.errors import BuildError
from stepc.inspect.memory import memory


@runtime_checkable
class TracedStep(Protocol):
    """A step that counts how often it was traced, and can say why it was the last time."""

    traces: int
    retrace_reason: str


@dataclass
class RecompilationMonitor:
    """The programs of one run.

    Args:
      most: how many further compilations there may be after the first call; None for any.
    """

    step: object
    scribe: EventLog
    most: int | None
    is_built: bool = field(default=False, init=False)
    _traced: TracedStep | None = field(init=False)
    _first: int | None = None
    _told: int = 0

    def __post_init__(self) -> None:
        self._traced = self.step if isinstance(self.step, TracedStep) else None

    def prepare(self, number: int, state: Any, batch: Batch) -> None:  # Any: a state
        """Before the first call: tell the loggers what is compiled, compile it, refuse what one device cannot hold.

        The call does not compile it again. Errors: those of `lower`; MemoryError.
        """
        if self.is_built:
            return
        match self.step:
            case LoweringStep():
                lowered = self.step.lower(state, batch)
                if self.scribe.loggers:
                    self.scribe.event("plan", number, level=logging.INFO, plan=str(lowered.plan))
                needs = memory(lowered.compile().executable).total
                device = jax.tree.leaves(state)[0].addressable_shards[0].device
                has = memory_of(device)
                if has is not None and needs > has:
                    raise MemoryError(f"it needs {readable(needs)} on one device, and {device} has {readable(has)}")
            case _:
                pass
        self.is_built = True

    def note_first(self, before: Any, after: Any) -> None:  # Any: states
        """After the first call: tell of buffers that were not given up, refuse a state of another type.

        Errors: BuildError.
        """
        if faults := _changes(before, after):
            what = "Step 1 returns a state of another type than it takes: it would be compiled again every step."
            lost = any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(before))
            raise BuildError(what, phase="build", step=1, state_ok=not lost, facts=faults)
        kept = [(path, leaf) for path, leaf in leaves_by_path(before) if not leaf.is_deleted()]
        if kept:
            bytes_ = sum(leaf.nbytes for _, leaf in kept)
            paths = _listed([path for path, _ in kept])
            self.scribe.event("not_donated", 1, bytes=f"{bytes_:,}", leaves=paths, of=len(jax.tree.leaves(before)))

    def note(self, number: int) -> None:
        """After a call: tell if it was traced and compiled again.

        Errors: BuildError if that was once too often. The step is made, and the state is the one after it.
        """
        if self._traced is None:
            return
        if self._first is None:
            self._first = self._traced.traces
        again = self._traced.traces - self._first
        if again == self._told:
            return
        self._told, why = again, self._traced.retrace_reason
        self.scribe.event("compiled_again", number, times=again, why=why)
        if self.most is not None and again > self.most:
            what = f"Step {number} was compiled again, {again} times in this run, and {self.most} are allowed."
            raise BuildError(what, phase="build", step=number, state_ok=True, facts=[("why", why)])


def memory_of(device: Any) -> int | None:  # Any: a device of jax
    """The bytes of memory that programs may use on a device; None where nothing tells."""
    stats = device.memory_stats() or {}
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return stats.get("bytes_limit")


def _changes(before: Any, after: Any) -> list[tuple[str, str]]:  # Any: states
    old, new = jax.tree.structure(before), jax.tree.structure(after)
    if old != new:
        return [("tree in", str(old)), ("tree out", str(new))]
    pairs = zip(leaves_by_path(before), jax.tree.leaves(after), strict=True)
    return [
        (path or "state", f"in {_form(leaf)}, out {_form(other)}")
        for (path, leaf), other in pairs
        if _form(leaf) != _form(other)
    ]


def _form(leaf: Any) -> str:  # Any: an array, or a number
    return f"{leaf.dtype if isinstance(leaf, jax.Array) else jnp.result_type(leaf)}{list(np.shape(leaf))}"


def _listed(paths: Sequence[str]) -> str:
    return ", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
