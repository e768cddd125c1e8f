"""`ema`: a moving average of the parameters."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from stepc._core.nodes import FollowNode
from stepc._language.fields import finite_number
from stepc._language.kinds import Batch, Kind, Params
from stepc._language.pipeline import Transform
from stepc._language.semantics import Fn, StepResult
from stepc._language.state import State
from stepc._language.terms import accumulation_dtype
from stepc.errors import FieldValueError


@dataclass(frozen=True, repr=False)
class Ema(Transform):
    """An exponential moving average of the parameters."""

    takes: ClassVar = Kind.STEP
    gives: ClassVar = Kind.STEP
    decay: float

    def __post_init__(self) -> None:
        finite_number("ema", "decay", self.decay, positive=False)
        if not 0 <= self.decay < 1:
            facts = (("field", "decay"), ("expected", "at least 0 and below 1"), ("got", repr(self.decay)))
            raise FieldValueError(f"`ema({self.decay!r})`: decay is out of range.", facts=facts)

    def reference(self, inner: Fn) -> Fn:
        name = inner.fresh_name("ema")

        def init(state: State) -> State:
            state = inner.init(state)
            return replace(state, slots={**state.slots, name: copied(state.params)})

        def apply(state: State, batch: Batch) -> StepResult:
            made = inner.apply(state, batch)
            if not made.happened:
                return made
            slot = moved(state.slots[name], made.state.params, self.decay)
            return made._replace(state=replace(made.state, slots={**made.state.slots, name: slot}))

        return Fn(init, apply, inner.axes, (*inner.names, name))

    def expand(self) -> tuple[FollowNode, ...]:
        return (FollowNode(copied, moved, (self.decay,), name="ema", written=repr(self)),)


def copied(params: Params) -> Any:  # Any: the tree of the parameters, float32 at least
    """Where the average begins: at the parameters."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, accumulation_dtype(jnp.result_type(leaf))), params)


def moved(average: Any, params: Params, decay: float) -> Any:  # Any: as above
    """decay * average + (1 - decay) * params."""
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new.astype(old.dtype), average, params)


def ema(decay: float) -> Ema:
    """Keep an exponential moving average of the parameters.

    Meaning: average = decay * average + (1 - decay) * params, after each step; it begins at the first parameters.
    Why: the average is often the better model, and it costs one more copy of the parameters and no communication.

    Args:
      decay: how much of the average is kept at each step; at least 0 and below 1.
    Shapes: the state keeps `slots["ema"]`, a tree like `params`, in float32 at least; it lies as the parameters lie. A
      second `ema` keeps `slots["ema_2"]`.
    Units: of the parameters.
    Type: step -> step
    Errors: FieldTypeError, FieldValueError for a bad `decay`; PipelineTypeError if the stage on its right gives no
      step.
    A step that `skip_nonfinite` skips does not move it, on whichever side it stands.
    Example:
      >>> ema(0.999) @ update(optax.adamw(3e-4)) @ grad(loss)
      ema(0.999) @ update(optax.adamw(3e-4)) @ grad(loss)

    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992,
      https://doi.org/10.1137/0330046.
    """
    return Ema(decay)
