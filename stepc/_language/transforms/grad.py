"""`grad`: the gradient of a loss, the rightmost stage of every pipeline."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax

from stepc._core.nodes import DifferentiateNode, Wrap
from stepc._language.encoded import Encoded, EncodedTree, join_calls, take_apart
from stepc._language.fields import boolean, one_of, path_patterns, state_names
from stepc._language.kinds import Kind, Params
from stepc._language.model_state import (
    ModelStateRules,
    given_model_state,
    model_state_rules,
    overwrite,
    overwritten_leaves,
    result_of_call,
)
from stepc._language.pipeline import Objective, Pipeline, QuotedArgument, Transform, function_name, quoted_argument
from stepc._language.semantics import (
    EncoderCall,
    Fn,
    Gradient,
    GradientTerm,
    Microbatch,
    WholeBatchLoss,
    key_of,
)
from stepc._language.state import State, same_tree, values_read, with_frozen
from stepc._language.terms import (
    LossOutcome,
    Sums,
    divide_by_count,
    loss_outcome,
    power_of_two,
    sum_arrays,
    widened,
)
from stepc.errors import FieldTypeError

KEYS_PER = (None, "example", "microbatch")


@dataclass(frozen=True, repr=False)
class Grad(Transform):
    """The value and the gradient of a loss, on the rows it is given."""

    takes: ClassVar = None
    gives: ClassVar = Kind.GRADIENT
    loss: QuotedArgument | Pipeline
    wrt: str | tuple[str, ...] = field(default="**", kw_only=True)
    has_aux: bool = field(default=False, kw_only=True)
    rng: str | None = field(default=None, kw_only=True)
    model_state: ModelStateRules | None = field(default=None, kw_only=True)
    reads: str | tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        boolean("grad", "has_aux", self.has_aux)
        object.__setattr__(self, "model_state", model_state_rules(self.model_state))
        path_patterns("grad", "wrt", self.wrt)
        state_names("grad", "reads", self.reads)
        one_of("rng", self.rng, KEYS_PER)
        match self.loss:
            case Pipeline():
                _check_complete(self.loss)
            case QuotedArgument(Transform() as value) if value.gives is Kind.LOSS:
                _check_complete(Pipeline((value,)))
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

        def init(state: State) -> State:
            return loss_fn.init(replace(state, wrt=self.patterns))

        def apply(state: State, microbatch: Microbatch) -> Gradient:
            given, rules = None, () if self.model_state is None else self.model_state.by_pattern
            if self.model_state is not None:
                given = given_model_state(rules, state.model_state, microbatch.numbers)
            outcome = self._outcome(loss, state.params, given, state, microbatch)
            result = None
            if self.model_state is not None:
                # A constant of the gradient, also of that which a line search takes of the whole batch.
                after = jax.lax.stop_gradient(outcome.model_state)
                if leaves := overwritten_leaves(given):  # their gradient is their next value

                    def whole(leaves: list[jax.Array]) -> jax.Array:
                        found = self._outcome(loss, state.params, overwrite(given, leaves), state, microbatch)
                        totals = [term.total / power_of_two(term.count) for term in found.terms]
                        return sum_arrays(totals) * microbatch.factor

                    after = overwrite(after, jax.grad(whole)(leaves))
                result = result_of_call(rules, given, after, microbatch.numbers)

            # One backward pass for each term: slow and obvious.
            def term(number: int) -> GradientTerm:
                count = outcome.terms[number].count
                unit = power_of_two(count)

                def total(trained: Params) -> jax.Array:
                    params = with_frozen(trained, state.params, self.patterns)
                    term = self._outcome(loss, params, given, state, microbatch).terms[number]
                    return term.total / unit * microbatch.factor

                narrow = jax.grad(total)(state.trained)
                return GradientTerm(jax.tree.map(lambda leaf: widened(leaf) * unit, narrow), count)

            terms = tuple(map(term, range(len(outcome.terms))))
            return Gradient(terms, {"loss": Sums(outcome.terms), **outcome.metrics}, result)

        def apply_encoder(state: State, microbatch: Microbatch) -> Gradient:
            return self._encoded(loss_fn.apply, head, state, microbatch)

        head = loss_fn.head
        return Fn(init, apply if head is None else apply_encoder, inner.axes, inner.names)

    def expand(self) -> tuple[DifferentiateNode, ...]:
        match self.loss:
            case QuotedArgument(value) | Pipeline((*_, Objective(QuotedArgument(value)))):
                pass
            case Pipeline():
                raise AssertionError("`_check_complete` lets only losses pass")
        wraps = tuple(
            node for transform in self._loss_transforms for node in transform.expand() if isinstance(node, Wrap)
        )
        rules = None if self.model_state is None else self.model_state.by_pattern
        options = (self.has_aux, self.rng, rules, self.patterns, self.names_read)
        head = next((wrap.head for wrap in wraps if wrap.head is not None), None)
        wraps = tuple(wrap for wrap in wraps if wrap.head is None)
        return (DifferentiateNode(value, wraps, *options, head, written=repr(self)),)

    def with_loss(self, wrap: Callable[[Any], Any]) -> "Grad":  # Any: the user's function
        """The same gradient of `wrap` of the user's function."""
        match self.loss:
            case QuotedArgument(value):
                return replace(self, loss=replace(self.loss, value=wrap(value)))
            case Pipeline((*wraps, Objective(QuotedArgument(value) as quoted))):
                return replace(self, loss=Pipeline((*wraps, Objective(replace(quoted, value=wrap(value))))))
            case Pipeline():
                raise AssertionError("`_check_complete` lets only losses pass")

    @property
    def patterns(self) -> tuple[str, ...]:
        """Which parameters are trained."""
        return self.wrt if isinstance(self.wrt, tuple) else (self.wrt,)

    @property
    def names_read(self) -> tuple[str, ...]:
        """The values of the state that the loss takes by keyword."""
        return self.reads if isinstance(self.reads, tuple) else (self.reads,)

    @property
    def _loss_transforms(self) -> tuple[Transform, ...]:
        return self.loss.transforms if isinstance(self.loss, Pipeline) else ()

    def _encoded(
        self, encoder: Callable[..., Any], head: Any, state: State, microbatch: Microbatch
    ) -> Gradient:  # Any: what the user's own functions return; the head, which is there
        """Some rows of a loss of the whole batch. Nothing is differentiated before all of them are there."""
        has_state, given, result = self.model_state is not None, None, None
        rules = () if self.model_state is None else self.model_state.by_pattern
        if has_state:
            given = given_model_state(rules, state.model_state, microbatch.numbers)

        def encode(trained: Params) -> Any:
            params = with_frozen(trained, state.params, self.patterns)
            return self._returned(encoder, params, given, state, microbatch)

        if has_state:
            after = jax.lax.stop_gradient(encode(state.trained)[1])
            result = result_of_call(rules, given, after, microbatch.numbers)
        trees: list[EncodedTree] = []

        def encoded(trained: Params) -> Encoded:
            returned = encode(trained)
            tree, arrays = take_apart(returned[0] if has_state else returned, microbatch.num_rows, repr(self))
            trees.append(tree)
            return arrays

        def gradient_of(calls: tuple[EncoderCall, ...]) -> Gradient:
            def value(trained: Params) -> tuple[jax.Array, LossOutcome]:
                whole = join_calls([call.encode(trained) for call in calls], [call.numbers for call in calls])
                returned = head(with_frozen(trained, state.params, self.patterns), trees[0].join(whole))
                outcome = loss_outcome(returned, has_aux=self.has_aux, model_state=False)
                value = sum_arrays([divide_by_count(term.total, term.count) for term in outcome.terms])
                return value * microbatch.factor, outcome

            narrow, outcome = jax.grad(value, has_aux=True)(state.trained)
            return Gradient(
                (GradientTerm(jax.tree.map(widened, narrow), 1),), {"loss": Sums(outcome.terms), **outcome.metrics}
            )

        whole = WholeBatchLoss((EncoderCall(microbatch.numbers, encoded),), gradient_of)
        return Gradient((), {}, result, whole=whole)

    def _outcome(
        self, loss: Callable[..., Any], params: Params, given: Any, state: State, microbatch: Microbatch
    ) -> LossOutcome:  # Any: what the user's loss returns; the model's own tree
        returned = self._returned(loss, params, given, state, microbatch)
        return loss_outcome(returned, has_aux=self.has_aux, model_state=self.model_state is not None)

    def _returned(
        self, loss: Callable[..., Any], params: Params, given: Any, state: State, microbatch: Microbatch
    ) -> Any:  # Any: as above
        match self.rng:
            case "example":
                keys = (jax.numpy.stack([key_of(state, number) for number in microbatch.numbers]),)
            case "microbatch":
                keys = (key_of(state, microbatch.numbers[0]),)
            case _:
                keys = ()
        model_state = () if self.model_state is None else (same_tree(given),)
        return loss(params, microbatch.rows, *keys, *model_state, **values_read(state, self.names_read))


def _check_complete(loss: Pipeline) -> None:
    if loss.gives is Kind.LOSS and isinstance(loss.transforms[-1], Objective):
        return
    facts = (("expected", "transforms from loss to loss, with a function on their right"), ("got", f"{loss!r}"))
    suggestion = f"Write `grad({loss!r} @ loss)`." if loss.gives is Kind.LOSS else None
    raise FieldTypeError(f"`grad({loss!r})`: this is not a loss.", facts=facts, suggestion=suggestion)


def grad(
    loss: Callable[..., Any] | Pipeline,
    *,
    wrt: str | tuple[str, ...] = "**",
    has_aux: bool = False,
    rng: str | None = None,
    model_state: bool | Mapping[str, str] | ModelStateRules | None = None,
    reads: str | tuple[str, ...] = (),
) -> Grad:
    """Take the value and the gradient of a loss, on the rows it is given.

    Meaning: jax.value_and_grad(loss)(params, rows); for `sc.Mean(total, count)` terms, totals and counts are added up
      over all microbatches and devices first, and each total is divided by its own count.
    Why: every step begins with a gradient. The transforms on its left decide which rows the loss is given.

    Args:
      loss: `loss(params, rows)` returns a scalar, a mean over the rows it is given; or `sc.Mean(total, count)`; or sums
        and multiples of these. Any pytrees, any model library. Transforms from loss to loss go inside:
        `grad(cast(jnp.bfloat16) @ remat() @ loss)`.
      wrt: a path pattern, or a tuple of them: which parameters are trained. `*` matches anything within a key, `**`
        across keys. The others are frozen: of any dtype, without gradient, reduction and optimizer state, in no norm
        and no `ema`. The optimizer is given the trained leaves, and None in the place of the others. Frozen leaves are
        placed by the rules of `shard` and saved with the state.
      has_aux: the loss returns `(value, metrics)`. Metrics are a dict of arrays (averaged over microbatches),
        `sc.Mean`, `sc.Sum`, `sc.Max`, `sc.Min` or `sc.Last` of one, and all of them are reported.
      rng: "example" gives `loss(params, rows, keys)` one typed key per row, folded from (seed, step, number of the row
        in the batch), so a draw depends neither on k nor on the mesh; use it with `jax.vmap`. "microbatch" gives
        `loss(params, rows, key)` one key per call, folded from the number of its first row: cheaper, but it does
        depend on the mesh and on k, including a k that `accumulate(memory=...)` picks.
      model_state: the loss takes the model's own state as its last argument and returns it as its last result:
        `(value, model_state)`, or `(value, metrics, model_state)`. True gives each leaf the default rule of its dtype;
        a dict gives rules by path pattern, `*` within a key and `**` across keys, and the defaults to the rest.
        "sequential", the default: through the microbatches in order; over a mesh axis or `rows()` the mean, in float32
        at least. `accumulate(4) @ shard(...)` takes it once a microbatch.
        "average": every call starts from the leaf before the step, and the next leaf is the mean of their results.
        "rows": the leaf has the rows of the batch on axis 0. It is split and sharded as the batch is, and each row
        keeps its own.
        "constant": the loss only reads it.
        "max", "sum": every call starts from the leaf before the step, and the next leaf is the largest result, or the
        leaf plus what each call added to it. A sum that does not fit its dtype makes the loss of the step NaN.
        "key", the default of typed keys: each call is given the key folded with the number of its first row; the key
        advances once a step, and what the loss returns in its place is dropped.
        Leaves under the key `_overwrite_with_gradient` (Flax's fp8 ranges and scales) are assigned what arrives as
        their gradient, by the rule "max"; the loss returns them as they were.
        A leaf that does not depend on the rows passes as it is, whatever its dtype. Whole numbers and bools that do
        depend on them need a rule under `shard` and `rows`.
      reads: names of values of the state, as they are before the step, that the loss takes by keyword: slots, such as
        `ema`, and `step`, the number of steps made. They are constants of the gradient: teachers and target networks,
        coefficients that warm up. A slot has None in the place of what `wrt` freezes. With `dp(zero=3)` a slot that is
        sharded is gathered once a step.
    Shapes: `rows` is the batch with fewer rows; `keys` is `[rows]`; the gradient has the shapes of the trained
      `params`, and None in the place of the frozen ones. It is in float32 at least up to `update`, which takes it in
      their dtypes.
    Units: per example, if the loss is a mean over examples; per unit of the count, for `sc.Mean`.
    Type: loss -> gradient; adds the metric `loss`
    Errors: FieldTypeError, FieldValueError for bad fields. ConfigError at `compile` if `reads`
      names what the pipeline does not keep, and at `init` if a pattern of `wrt` matches nothing.
      At the first call, LossError if the loss does not return what it should, if a count depends on the parameters, if
      no gradient can reach a trained parameter, if the model state does not fit its rules (whole numbers or rows
      without one, a constant that changes), or if `rng="example"` meets a key implementation whose draws
      depend on how many are drawn together (`rbg`). Exceptions of the loss pass through, with a note.
    A loss that couples rows (contrastive losses, batch statistics) sees only the rows of its own call.
    Example:
      >>> grad(loss, rng="example")
      grad(loss, rng="example")

    Source: `jax.value_and_grad`; per-example keys: ours.
    """
    rules = model_state_rules(model_state)
    if isinstance(loss, Pipeline):
        return Grad(loss, wrt=wrt, has_aux=has_aux, rng=rng, model_state=rules, reads=reads)
    quoted = quoted_argument(loss, position=0, keyword="loss", otherwise=function_name(loss))
    return Grad(quoted, wrt=wrt, has_aux=has_aux, rng=rng, model_state=rules, reads=reads)
