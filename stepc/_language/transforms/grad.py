"""`grad`: the gradient of a loss, the rightmost stage of every pipeline."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax

from stepc._core.nodes import DifferentiateNode, Wrap
from stepc._language.fields import boolean, one_of
from stepc._language.kinds import Kind, Params
from stepc._language.pipeline import Objective, Pipeline, QuotedArgument, Transform, function_name, quoted_argument
from stepc._language.semantics import Fn, Gradient, GradientTerm, Microbatch, key_of
from stepc._language.state import State
from stepc._language.terms import LossOutcome, Sums, accumulation_dtype, loss_outcome, power_of_two
from stepc.errors import FieldTypeError

KEYS_PER = (None, "example", "microbatch")


@dataclass(frozen=True, repr=False)
class Grad(Transform):
    """The value and the gradient of a loss, on the rows it is given."""

    takes: ClassVar = None
    gives: ClassVar = Kind.GRADIENT
    loss: QuotedArgument | Pipeline
    has_aux: bool = field(default=False, kw_only=True)
    rng: str | None = field(default=None, kw_only=True)
    model_state: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        boolean("grad", "has_aux", self.has_aux)
        boolean("grad", "model_state", self.model_state)
        one_of("rng", self.rng, KEYS_PER)
        match self.loss:
            case Pipeline():
                _check_complete(self.loss)
            case QuotedArgument(value) if not callable(value) or isinstance(value, Transform):
                facts = (("expected", "a function of (params, rows)"), ("got", type(value).__name__))
                raise FieldTypeError(f"`grad({self.loss!r})`: loss must be a function.", facts=facts)
            case QuotedArgument():
                pass

    def reference(self, inner: Fn) -> Fn:
        loss_fn = inner
        for transform in reversed(self._loss_transforms):
            loss_fn = transform.reference(loss_fn)
        loss = self.loss.value if isinstance(self.loss, QuotedArgument) else loss_fn.apply

        def apply(state: State, microbatch: Microbatch) -> Gradient:
            outcome = self._outcome(loss, state.params, state, microbatch)

            # One backward pass for each term: slow and obvious.
            def term(number: int) -> GradientTerm:
                count = outcome.terms[number].count
                unit = power_of_two(count)

                def total(params: Params) -> jax.Array:
                    term = self._outcome(loss, params, state, microbatch).terms[number]
                    return term.total / unit * microbatch.factor

                narrow = jax.grad(total)(state.params)
                return GradientTerm(
                    jax.tree.map(lambda leaf: leaf.astype(accumulation_dtype(leaf.dtype)) * unit, narrow), count
                )

            terms = tuple(map(term, range(len(outcome.terms))))
            return Gradient(terms, {"loss": Sums(outcome.terms), **outcome.metrics}, outcome.model_state)

        return Fn(inner.init, apply, inner.axes, inner.names)

    def expand(self) -> tuple[DifferentiateNode, ...]:
        match self.loss:
            case QuotedArgument(value) | Pipeline((*_, Objective(QuotedArgument(value)))):
                pass
            case Pipeline():
                raise AssertionError("`_check_complete` lets only losses pass")
        wraps = tuple(
            node for transform in self._loss_transforms for node in transform.expand() if isinstance(node, Wrap)
        )
        return (DifferentiateNode(value, wraps, self.has_aux, self.rng, self.model_state, written=repr(self)),)

    @property
    def _loss_transforms(self) -> tuple[Transform, ...]:
        return self.loss.transforms if isinstance(self.loss, Pipeline) else ()

    def _outcome(
        self, loss: Callable[..., Any], params: Params, state: State, microbatch: Microbatch
    ) -> LossOutcome:  # Any: what the user's loss returns
        match self.rng:
            case "example":
                keys = (jax.numpy.stack([key_of(state, number) for number in microbatch.numbers]),)
            case "microbatch":
                keys = (key_of(state, microbatch.numbers[0]),)
            case _:
                keys = ()
        model_state = (state.model_state,) if self.model_state else ()
        returned = loss(params, microbatch.rows, *keys, *model_state)
        return loss_outcome(returned, has_aux=self.has_aux, model_state=self.model_state)


def _check_complete(loss: Pipeline) -> None:
    if loss.gives is Kind.LOSS and isinstance(loss.transforms[-1], Objective):
        return
    facts = (("expected", "transforms from loss to loss, with a function on their right"), ("got", f"{loss!r}"))
    suggestion = f"Write `grad({loss!r} @ loss)`." if loss.gives is Kind.LOSS else None
    raise FieldTypeError(f"`grad({loss!r})`: this is not a loss.", facts=facts, suggestion=suggestion)


def grad(
    loss: Callable[..., Any] | Pipeline, *, has_aux: bool = False, rng: str | None = None, model_state: bool = False
) -> Grad:
    """Take the value and the gradient of a loss, on the rows it is given.

    Meaning: jax.value_and_grad(loss)(params, rows); for `sc.Mean(total, count)` terms, totals and counts are added up
      over all microbatches and devices first, and each total is divided by its own count.
    Why: every step begins with a gradient. The transforms on its left decide which rows the loss is given.

    Args:
      loss: `loss(params, rows)` returns a scalar, a mean over the rows it is given; or `sc.Mean(total, count)`; or sums
        and multiples of these. Any pytrees, any model library. Transforms from loss to loss go inside:
        `grad(cast(jnp.bfloat16) @ remat() @ loss)`.
      has_aux: the loss returns `(value, metrics)`. Metrics are a dict of scalars (averaged over microbatches),
        `sc.Mean`, `sc.Sum`, `sc.Max`, `sc.Min` or `sc.Last`, and all of them are reported.
      rng: "example" gives `loss(params, rows, keys)` one typed key per row, folded from (seed, step, number of the row
        in the batch), so a draw depends neither on k nor on the mesh; use it with `jax.vmap`. "microbatch" gives
        `loss(params, rows, key)` one key per call, folded from the number of its first row: cheaper, but it does
        depend on the mesh and on k, including a k that `accumulate(memory=...)` picks.
      model_state: the loss takes the model's own state as its last argument and returns it as its last result:
        `(value, model_state)`, or `(value, metrics, model_state)`. It passes through microbatches in order, and is
        averaged over a mesh axis where the pipeline names the axis: `accumulate(4) @ shard(...)` averages it once a
        microbatch.
    Shapes: `rows` is the batch with fewer rows; `keys` is `[rows]`; the gradient has the shapes of `params`, in float32
      at least up to `update`, which takes it in their dtypes.
    Units: per example, if the loss is a mean over examples; per unit of the count, for `sc.Mean`.
    Type: loss -> gradient; adds the metric `loss`
    Errors: FieldTypeError, FieldValueError for bad fields. At the first call, LossError if the loss does not return
      what it should, if a count depends on the parameters, or if `rng="example"` meets a key implementation whose draws
      depend on how many are drawn together (`rbg`). Exceptions of the loss pass through, with a note.
    A loss that couples rows (contrastive losses, batch statistics) sees only the rows of its own call.
    Example:
      >>> grad(loss, rng="example")
      grad(loss, rng="example")

    Source: `jax.value_and_grad`; per-example keys: ours.
    """
    if isinstance(loss, Pipeline):
        return Grad(loss, has_aux=has_aux, rng=rng, model_state=model_state)
    quoted = quoted_argument(loss, position=0, keyword="loss", otherwise=function_name(loss))
    return Grad(quoted, has_aux=has_aux, rng=rng, model_state=model_state)
