"""`update`: from a gradient to a step, with an optimizer."""

from dataclasses import dataclass, replace
from typing import ClassVar

import jax.numpy as jnp
import optax

from stepc._core.nodes import UpdateNode
from stepc._language.kinds import Batch, Kind
from stepc._language.model_state import next_model_state
from stepc._language.pipeline import QuotedArgument, Transform, quoted_argument
from stepc._language.semantics import Fn, StepResult, is_finite, narrowed, whole_batch
from stepc._language.state import State
from stepc.errors import FieldTypeError


@dataclass(frozen=True, repr=False)
class Update(Transform):
    """One step of an optimizer."""

    takes: ClassVar = Kind.GRADIENT
    gives: ClassVar = Kind.STEP
    optimizer: QuotedArgument

    def __post_init__(self) -> None:
        if not isinstance(self.optimizer.value, optax.GradientTransformation):
            facts = (("expected", "an optax GradientTransformation"), ("got", type(self.optimizer.value).__name__))
            raise FieldTypeError(f"`update({self.optimizer!r})`: this is not an optimizer.", facts=facts)

    def reference(self, inner: Fn) -> Fn:
        optimizer = optax.with_extra_args_support(self.optimizer.value)

        def init(state: State) -> State:
            return replace(inner.init(state), opt_state=optimizer.init(state.params))

        def apply(state: State, batch: Batch) -> StepResult:
            gradient = inner.apply(state, whole_batch(batch))
            grads, metrics = narrowed(gradient.value, state.params), gradient.reported
            model_state, fits = next_model_state(state.model_state, gradient.model_state)
            if not fits:  # a sum of whole numbers that overflows makes the step one that is not finite
                metrics["loss"] = jnp.full_like(metrics["loss"], jnp.nan)
            loss_is_finite, gradient_is_finite = bool(jnp.isfinite(metrics["loss"])), is_finite(grads)
            # These slots advance in any case, such as the loss scale; where there are any, an overflow is skipped.
            always = {name: advance(loss_is_finite, gradient_is_finite) for name, advance in gradient.advances.items()}
            state = replace(state, slots={**state.slots, **always})
            all_finite, happens = loss_is_finite and gradient_is_finite, gradient_is_finite or not always
            if happens:
                extra = {"value": metrics["loss"], "grad": grads}
                updates, opt_state = optimizer.update(grads, state.opt_state, state.params, **extra)
                params = optax.apply_updates(state.params, updates)
                state = replace(state, params=params, opt_state=opt_state, step=state.step + 1, model_state=model_state)
            return StepResult(state, metrics, all_finite, happens, always)

        return Fn(init, apply, inner.axes, inner.names)

    def expand(self) -> tuple[UpdateNode, ...]:
        return (UpdateNode(self.optimizer.value, written=repr(self)),)


def update(optimizer: optax.GradientTransformation) -> Update:
    """Let an optimizer turn the gradient into new parameters.

    Meaning: updates, opt_state = optimizer.update(grads, opt_state, params, value=loss, grad=grads);
      params = optax.apply_updates(params, updates); step = step + 1.
    Why: it makes a step of a gradient, so every pipeline that trains has one.

    Args:
      optimizer: any optax `GradientTransformation`; one with extra args is passed `value` and `grad`.
    Shapes: the gradient has the shapes and dtypes of `params`; `opt_state` is the optimizer's own tree.
    Units: the optimizer's: it sees the mean gradient, not a sum.
    Type: gradient -> step
    Errors: FieldTypeError if it is not an optimizer; PipelineTypeError if the stage on its right returns no gradient.
    An optimizer that needs `value_fn` (a line search) does not work: the batch is no longer there when it runs.
    Example:
      >>> update(optax.adamw(3e-4)) @ grad(loss)
      update(optax.adamw(3e-4)) @ grad(loss)

    Source: optax, https://github.com/google-deepmind/optax.
    """
    return Update(quoted_argument(optimizer, position=0, keyword="optimizer", otherwise="optimizer"))
