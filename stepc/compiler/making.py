"""The end of a step: the gradient becomes a new state, or the state stays. Nothing here adds up."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stepc.compiler.check import check_fixed_point
from stepc.compiler.ending import Ending, Held
from stepc.compiler.instructions import Optimize
from stepc.compiler.watch import Watch
from stepc.core.terms import total_of
from stepc.language.kinds import Metrics
from stepc.language.state import Skips, State, leaves_by_path


class Made(NamedTuple):
    """A step that was made: the state after it, what it reports, what it saw."""

    state: State
    metrics: Metrics
    watch: Watch


class Sight(NamedTuple):
    """What was seen on the way: of each cell whether its loss is finite, of each leaf the sum of squares."""

    losses: jax.Array
    squares: Any  # Any: a tree like the parameters


class Laying(NamedTuple):
    """How a tree like the parameters is told to lie."""

    parts: Callable[[Any], Any]  # as the optimizer works on it
    whole: Callable[[Any], Any]  # as the state has it


def made(
    optimize: Optimize, ending: Ending, held: Held, metrics: Metrics, sight: Sight, state: State, laying: Laying
) -> Made:
    """Make the step, unless it is to be skipped."""
    metrics = dict(metrics)
    adapts: Any = True  # Any: a bool, or one on the device
    step = partial(_stepped, optimize, ending, laying)
    loss_is_finite = jnp.isfinite(metrics["loss"])
    gradient_is_finite = jnp.isfinite(total_of(jax.tree.leaves(sight.squares)))
    is_finite = loss_is_finite & gradient_is_finite
    if optimize.guard is not None:
        new = _if(is_finite, step, held, metrics["loss"], state)
    elif optimize.rescale is not None:
        new = _if(gradient_is_finite, step, held, metrics["loss"], state)
    else:
        new = step(held, metrics["loss"], state)
    slots = dict(new.slots)
    if optimize.rescale is not None:
        name, node = optimize.rescale
        metrics[name] = jax.tree.leaves(state.slots[name])[0]
        slots[name] = node.advance(state.slots[name], loss_is_finite, gradient_is_finite, *node.arguments)
        if slots[name] is not state.slots[name]:  # a scale that is not fixed
            adapts = jax.tree.leaves(slots[name])[0] < metrics[name]
    if optimize.guard is not None:
        name, _ = optimize.guard
        skipped = 1 - is_finite.astype(jnp.int32)
        before: Skips = state.slots[name]
        slots[name] = Skips(before.total + skipped, (before.consecutive + skipped) * skipped)
        metrics["skipped"] = skipped
    # An overflow that the scale of the loss adapts to is nothing to stop for. At its smallest it adapts no more, and
    # not one further step would be made.
    can_go_on = loss_is_finite & (gradient_is_finite | adapts)
    is_fine = can_go_on if optimize.guard is None and optimize.rescale is not None else is_finite
    paths, squares = zip(*leaves_by_path(sight.squares), strict=True)
    return Made(replace(new, slots=slots), metrics, Watch(is_fine, sight.losses, jnp.stack(squares), paths))


def _if(happens: jax.Array, step: Callable[..., State], held: Held, loss: jax.Array, state: State) -> State:
    # A condition, not a selection: no copy of the state, and nothing to compute when it stays (facts measured on CPU:
    # a selection adds a third to the time of an optimizer). What a branch reads is passed to it.
    def stay(held: Held, loss: jax.Array, state: State) -> State:
        return state

    try:
        return jax.lax.cond(happens, step, stay, held, loss, state)
    except TypeError:  # the branches differ: the step is no fixed point, which is said better there
        check_fixed_point(state, step(held, loss, state))
        raise


def _stepped(optimize: Optimize, ending: Ending, laying: Laying, held: Held, loss: jax.Array, state: State) -> State:
    params = laying.parts(state.params)
    grads = ending.finished(held, params)
    optimizer = optax.with_extra_args_support(optimize.node.optimizer)
    updates, opt_state = optimizer.update(grads, state.opt_state, params, value=loss, grad=grads)
    params = laying.parts(optax.apply_updates(params, updates))
    slots = dict(state.slots)
    for name, node in optimize.follows:
        slots[name] = node.advance(slots[name], params, *node.arguments)
    new = replace(state, params=laying.whole(params), opt_state=opt_state, step=state.step + 1, slots=slots)
    return replace(new, carry=held.flow.carry)
