"""`ema`: a moving average of the parameters."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from stepc._core.nodes import FollowNode
from stepc._language.fields import finite_number, positive_integer
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
    every: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        positive_integer("ema", "every", self.every)
        finite_number("ema", "decay", self.decay, positive=False)
        if not 0 <= self.decay < 1:
            what = "`ema`: decay must be at least 0 and below 1."
            raise FieldValueError(what, facts=(("got", repr(self.decay)),))

    def reference(self, inner: Fn) -> Fn:
        name = inner.fresh_name("ema")

        def init(state: State) -> State:
            state = inner.init(state)
            return replace(state, slots={**state.slots, name: initial_average(state.trained)})

        def apply(state: State, batch: Batch) -> StepResult:
            result = inner.apply(state, batch)
            if not result.happened:
                return result
            average = moved_average(state.slots[name], result.state.trained, result.state.step, self.decay, self.every)
            return result._replace(state=replace(result.state, slots={**result.state.slots, name: average}))

        return Fn(init, apply, inner.axes, (*inner.names, name))

    def expand(self) -> tuple[FollowNode, ...]:
        return (FollowNode(initial_average, moved_average, (self.decay, self.every), name="ema", written=repr(self)),)


def initial_average(params: Params) -> Any:  # Any: the tree of the parameters, float32 at least
    """A copy of the parameters."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, accumulation_dtype(jnp.result_type(leaf))), params)


def moved_average(average: Any, params: Params, step: jax.Array, decay: float, every: int) -> Any:  # Any: as above
    """decay * average + (1 - decay) * params, in every step whose number is a multiple of `every`."""

    def moved(old: jax.Array, new: jax.Array) -> jax.Array:
        mean = decay * old + (1 - decay) * new.astype(old.dtype)
        return mean if every == 1 else jnp.where(step % every == 0, mean, old)

    return jax.tree.map(moved, average, params)


def ema(decay: float, *, every: int = 1) -> Ema:
    """Keep an exponential moving average of the parameters that are trained.

    Meaning: average = decay * average + (1 - decay) * params after each step whose number, from 1 on, is a multiple of
      `every`; before the first of them the initial parameters.
    Why: the average is often the better model. It costs a second copy of the parameters, and no communication. A loss
      can read it (`grad(loss, reads="ema")`): as a teacher, or with `ema(0.0, every=1000)` as a target network.

    Args:
      decay: how much of the average each step keeps; at least 0 and below 1.
      every: in steps; a positive integer.
    Shapes: the state keeps `slots["ema"]`, a tree like `params`, in float32 at least, and sharded as they are; None in
      the place of what `grad(loss, wrt=...)` freezes. A second `ema` keeps `slots["ema_2"]`.
    Units: those of the parameters.
    Type: step -> step
    Errors: FieldTypeError, FieldValueError for a bad `decay` or `every`; PipelineTypeError if the stage on its right
      returns no step.
    A step that `skip_nonfinite` skips does not move the average, whichever of the two is on the left.
    Example:
      >>> ema(0.999) @ update(optax.adamw(3e-4)) @ grad(loss)
      ema(0.999) @ update(optax.adamw(3e-4)) @ grad(loss)

    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992,
      https://doi.org/10.1137/0330046.
    """
    return Ema(decay, every=every)
