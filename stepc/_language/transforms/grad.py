"""`grad`: where every pipeline begins, on its right: the gradient of a loss."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax

from stepc._core.nodes import DifferentiateNode
from stepc._language.fields import boolean
from stepc._language.kinds import Kind, Params
from stepc._language.pipeline import Objective, Pipeline, QuotedArgument, Transform, function_name, quoted_argument
from stepc._language.semantics import Fn, Gradient, GradientTerm, Microbatch, key_of
from stepc._language.state import State
from stepc._language.terms import LossOutcome, Sums, accumulation_dtype, loss_outcome
from stepc.errors import FieldTypeError, FieldValueError

RNG = ("example", "microbatch")


@dataclass(frozen=True, repr=False)
class Grad(Transform):
    """The value and the gradient of a loss on the rows it is given."""

    takes: ClassVar = None
    gives: ClassVar = Kind.GRADIENT
    loss: QuotedArgument | Pipeline
    has_aux: bool = field(default=False, kw_only=True)
    rng: str | None = field(default=None, kw_only=True)
    model_state: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        boolean("grad", "has_aux", self.has_aux)
        boolean("grad", "model_state", self.model_state)
        if self.rng is not None and self.rng not in RNG:
            facts = (("field", "rng"), ("expected", 'None, "example" or "microbatch"'), ("got", repr(self.rng)))
            raise FieldValueError(f"`grad(rng={self.rng!r})`: there are no such keys.", facts=facts)
        match self.loss:
            case Pipeline():
                _check_complete(self.loss)
            case QuotedArgument(value) if not callable(value) or isinstance(value, Transform):
                facts = (("expected", "a function of (params, rows)"), ("got", type(value).__name__))
                raise FieldTypeError(f"`grad({self.loss!r})`: loss is not a function.", facts=facts)
            case QuotedArgument():
                pass

    def reference(self, inner: Fn) -> Fn:
        function = _meaning_of(self.loss, inner)

        def apply(state: State, cell: Microbatch) -> Gradient:
            found = self._outcome(function, state.params, state, cell)

            # One backward pass for each term: slow and obvious.
            def total(params: Params, number: int) -> jax.Array:
                return self._outcome(function, params, state, cell).terms[number].total * cell.factor

            totals = [jax.grad(total)(state.params, number) for number in range(len(found.terms))]
            sums = [jax.tree.map(lambda leaf: leaf.astype(accumulation_dtype(leaf.dtype)), one) for one in totals]
            terms = tuple(GradientTerm(one, term.count) for one, term in zip(sums, found.terms, strict=True))
            return Gradient(terms, {"loss": Sums(found.terms), **found.metrics}, state.params, found.model_state)

        return Fn(inner.init, apply, inner.axes, inner.names)

    def expand(self) -> tuple[DifferentiateNode, ...]:
        transforms = self.loss.transforms if isinstance(self.loss, Pipeline) else ()
        wraps = tuple(wrap for transform in transforms for wrap in transform.expand())
        value = transforms[-1].loss.value if transforms else self.loss.value  # pyright: ignore[reportAttributeAccessIssue]
        return (DifferentiateNode(value, wraps, self.has_aux, self.rng, self.model_state, written=repr(self)),)  # pyright: ignore[reportArgumentType]

    def _outcome(self, function: Callable[..., Any], params: Params, state: State, cell: Microbatch) -> LossOutcome:
        keys = ()
        if self.rng == "example":
            keys = (jax.numpy.stack([key_of(state, number) for number in cell.numbers]),)
        elif self.rng == "microbatch":
            keys = (key_of(state, cell.numbers[0]),)
        model_state = (state.model_state,) if self.model_state else ()
        return loss_outcome(
            function(params, cell.rows, *keys, *model_state), has_aux=self.has_aux, model_state=self.model_state
        )


def grad(
    loss: Callable[..., Any] | Pipeline, *, has_aux: bool = False, rng: str | None = None, model_state: bool = False
) -> Grad:
    """Take the value and the gradient of a loss, on the rows it is given.

    Meaning: jax.value_and_grad(loss)(params, rows); of `sc.Mean(total, count)` terms, the sums over all cells first,
      and each term divided by its own count.
    Why: a step begins with a gradient; what the loss is given, and how its parts are averaged, stands on the left.

    Args:
      loss: `loss(params, rows)` returns a scalar, a mean over the rows it is given; or `sc.Mean(total, count)`; or sums
        and multiples of these. Any pytrees, any model library. Transforms from loss to loss stand inside:
        `grad(cast(jnp.bfloat16) @ remat() @ loss)`.
      has_aux: the loss returns `(value, metrics)`, a dict of scalars (the mean over cells), `sc.Mean`, `sc.Sum`,
        `sc.Max`, `sc.Min` or `sc.Last`; all of them are reported.
      rng: "example" gives `loss(params, rows, keys)` one typed key a row, folded from (seed, step, number of the row in
        the batch), so a draw depends neither on k nor on the mesh; use it with `jax.vmap`. "microbatch" gives
        `loss(params, rows, key)` one key a cell, folded from the number of its first row: cheaper, and it does depend
        on k, also on a k that `accumulate(memory=...)` finds, and on the mesh.
      model_state: the loss takes the model's own state as its last argument and returns it as its last result:
        `(value, model_state)`, or `(value, metrics, model_state)`. It passes through microbatches in order, and over a mesh axis by
        mean, where the axis is named: `accumulate(4) @ shard(...)` averages it once a microbatch.
    Shapes: `rows` is the batch with fewer rows; `keys` is `[rows]`; the gradient has the shapes and dtypes of `params`.
    Units: per example, if the loss is a mean over examples; per unit of the count, for `sc.Mean`.
    Type: loss -> gradient; adds the metric `loss`
    Errors: FieldTypeError, FieldValueError for bad fields; at the first call, LossError if it does not return what it
      promises, or a count depends on the parameters, or `rng="example"` meets an implementation of keys whose draws
      depend on how many are drawn together (`rbg`). Its own exceptions pass through, with a note.
    A loss that couples rows (a contrast, batch statistics) sees the rows of its own cell alone.
    Example:
      >>> grad(loss, rng="example")
      grad(loss, rng="example")

    Source: `jax.value_and_grad`; per-example keys: ours.
    """
    if isinstance(loss, Pipeline):
        return Grad(loss, has_aux=has_aux, rng=rng, model_state=model_state)
    quoted = quoted_argument(loss, position=0, keyword="loss", otherwise=function_name(loss))
    return Grad(quoted, has_aux=has_aux, rng=rng, model_state=model_state)


def _meaning_of(loss: QuotedArgument | Pipeline, inner: Fn) -> Callable[..., Any]:
    if isinstance(loss, QuotedArgument):
        return loss.value
    for transform in reversed(loss.transforms):
        inner = transform.reference(inner)
    return inner.apply


def _check_complete(loss: Pipeline) -> None:
    if loss.gives is Kind.LOSS and isinstance(loss.transforms[-1], Objective):
        return
    facts = (("expected", "transforms from loss to loss, and a function on their right"), ("got", f"{loss!r}"))
    suggestion = f"Write `grad({loss!r} @ loss)`." if loss.gives is Kind.LOSS else None
    raise FieldTypeError(f"`grad({loss!r})`: this is not a loss.", facts=facts, suggestion=suggestion)
