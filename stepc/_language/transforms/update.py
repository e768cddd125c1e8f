"""`update`: from a gradient to a step, with an optimizer."""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax

from stepc._core.nodes import UpdateNode
from stepc._language.kinds import Batch, Kind, Params
from stepc._language.model_state import next_model_state
from stepc._language.optimizers import (
    WHOLE_BATCH_LOSSES,
    Optimizer,
    check_optimizer,
    initial_state,
    injected_hyperparameters,
    run_optimizer,
)
from stepc._language.pipeline import QuotedArgument, Transform, quoted_argument
from stepc._language.semantics import Fn, StepResult, is_finite, narrowed, whole_batch
from stepc._language.state import State


@dataclass(frozen=True, repr=False)
class Update(Transform):
    """One step of an optimizer."""

    takes: ClassVar = Kind.GRADIENT
    gives: ClassVar = Kind.STEP
    optimizer: QuotedArgument

    def __post_init__(self) -> None:
        check_optimizer(self.optimizer.value, repr(self.optimizer))

    def reference(self, inner: Fn) -> Fn:
        optimizer, written = self.optimizer.value, repr(self)

        def init(state: State) -> State:
            return replace(inner.init(state), opt_state=initial_state(optimizer, state.trained, written))

        def apply(state: State, batch: Batch) -> StepResult:
            before, rows = state, whole_batch(batch)

            def loss_of_whole_batch(trained: Params) -> jax.Array:
                """The loss that the pipeline reports of the same rows, keys and model state, at other parameters."""
                return inner.apply(before.with_trained(trained), rows).reported["loss"]

            gradient = inner.apply(state, rows).evaluated
            grads, metrics = narrowed(gradient.value, state.trained), gradient.reported
            model_state, fits = next_model_state(state.model_state, gradient.model_state)
            if not fits:  # a sum of whole numbers that overflows makes the step one that is not finite
                metrics["loss"] = jnp.full_like(metrics["loss"], jnp.nan)
            loss_is_finite, gradient_is_finite = bool(jnp.isfinite(metrics["loss"])), is_finite(grads)
            # These slots advance in any case, such as the loss scale; where there are any, an overflow is skipped.
            always = {name: advance(loss_is_finite, gradient_is_finite) for name, advance in gradient.advances.items()}
            state = replace(state, slots={**state.slots, **always})
            all_finite, happens = loss_is_finite and gradient_is_finite, gradient_is_finite or not always
            if happens:
                losses = dict.fromkeys(WHOLE_BATCH_LOSSES, loss_of_whole_batch)
                offered = {"value": metrics["loss"], "grad": grads, **losses}
                updates, opt_state = run_optimizer(optimizer, grads, state.opt_state, state.trained, offered, written)
                state = state.with_trained(optax.apply_updates(state.trained, updates))
                state = replace(state, opt_state=opt_state, step=state.step + 1, model_state=model_state)
            metrics = {**metrics, **injected_hyperparameters(state.opt_state)}
            return StepResult(state, metrics, all_finite, happens, always)

        return Fn(init, apply, inner.axes, inner.names)

    def expand(self) -> tuple[UpdateNode, ...]:
        return (UpdateNode(self.optimizer.value, written=repr(self)),)


def update(optimizer: Optimizer) -> Update:
    """Let an optimizer turn the gradient into new parameters.

    Meaning: updates, opt_state = optimizer.update(grads, opt_state, params, **extra);
      params = optax.apply_updates(params, updates); step = step + 1. `extra` has those of the following that `update`
      takes: `value`, the loss; `grad`, the gradient; `value_fn` and `obj_fn`, the loss as a function of the parameters,
      for the whole batch and under the same pipeline, with the same keys and model state.
    Why: it makes a step of a gradient, so every pipeline that trains has one.

    Args:
      optimizer: an optax `GradientTransformation`, or an object with `init(params)` and `update(grads, state, params)`.
        What else `update` takes is read from its signature. One that takes any keyword is given `value` and `grad`, and
        what the optimizers inside it name.
    Shapes: the gradient has the shapes and dtypes of `params`; `opt_state` is the optimizer's own tree.
    Units: the optimizer's: it sees the mean gradient, not a sum.
    Type: gradient -> step; adds the hyperparameters that `optax.inject_hyperparams` keeps in the new state, by name
      (`learning_rate`; `head/learning_rate` where several optimizers inject one)
    Errors: FieldTypeError if it is not an optimizer; PipelineTypeError if the stage on its right returns no gradient;
      ConfigError for an optimizer that no step can run (`optax.lookahead`, DP-SGD, `contrib.sam` in its opaque mode),
      for updates that do not fit the parameters, for a state whose tree changes, and where the loss has a metric of the
      name of a hyperparameter.
    `value_fn` is the loss itself: `clip`, `noise` and `scale` change the gradient that a line search starts from, and
    nothing that it evaluates. Every evaluation costs as much as the loss of a step, or its gradient, and one reduction.
    Example:
      >>> update(optax.adamw(3e-4)) @ grad(loss)
      update(optax.adamw(3e-4)) @ grad(loss)
      >>> update(optax.lbfgs()) @ accumulate(4) @ grad(loss)
      update(optax.lbfgs()) @ accumulate(4) @ grad(loss)

    Source: optax, https://github.com/google-deepmind/optax.
    """
    return Update(quoted_argument(optimizer, position=0, keyword="optimizer", otherwise="optimizer"))
