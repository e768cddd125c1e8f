"""`across`: a loss of the whole batch, of what an encoder makes of every row."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from stepc._core.nodes import Wrap
from stepc._language.kinds import Kind
from stepc._language.pipeline import QuotedArgument, Transform, function_name, quoted_argument
from stepc._language.semantics import Fn
from stepc.errors import FieldTypeError


@dataclass(frozen=True, repr=False)
class Across(Transform):
    """The loss `head(params, z)`, where `z` is what the function on its right makes of the whole batch."""

    takes: ClassVar = Kind.LOSS
    gives: ClassVar = Kind.LOSS
    head: QuotedArgument

    def __post_init__(self) -> None:
        if not callable(self.head.value) or isinstance(self.head.value, Transform):
            facts = (("expected", "a function of (params, z)"), ("got", type(self.head.value).__name__))
            raise FieldTypeError(f"`across({self.head!r})`: head must be a function.", facts=facts)

    def reference(self, inner: Fn) -> Fn:
        return replace(inner, head=self.head.value)  # `grad` knows when the whole batch is there

    def expand(self) -> tuple[Wrap, ...]:
        return (Wrap(encoder_itself, head=self.head.value, written=repr(self)),)


def encoder_itself(encoder: Callable[..., Any]) -> Callable[..., Any]:
    """The function on the right, which is not changed."""
    return encoder


def across(head: Callable[..., Any]) -> Across:
    """Make a loss of the whole batch: `head` of what an encoder makes of every row, whatever the split is.

    Meaning: head(params, encode(params, batch)), and its gradient; `encode` is the function on the right, and the batch
      is all rows that reach the first transform on the left that is not linear.
    Why: a contrastive loss with all negatives, a product of means over the batch (the balance of a mixture of experts),
      a normalised advantage: `accumulate` and `shard` give a plain loss the rows of one local microbatch alone.

    Args:
      head: `head(params, z)` returns what a loss returns: a scalar, `sc.Mean` terms, or `(value, metrics)` with
        `has_aux=True`. It is called once with the `z` of the whole batch, its rows in the order of the batch.
    Shapes: the function on the right, `encode(params, rows)`, returns a tree `z`. Each leaf is an array with those rows
      on axis 0, of any dtype (labels too), or an `sc.Sum` or `sc.Mean` of them, which the head finds added up:
      `z["load"].value`. It also takes the keys, the model state and the values that `grad` names; with model state it
      returns `(z, model_state)`.
    Units: those of the head. It is no mean over microbatches, so nothing is divided by their number.
    Type: loss -> loss
    Errors: FieldTypeError if `head` is not a function; PipelineTypeError for a transform of the loss on its left, and
      for `rows()` on the left of its `grad`. At the first call, LossError for a leaf of `z` that has no rows and is no
      sum.
    The encoder runs twice on every microbatch: once for `z`, and once more for the gradient, with the cotangents that
    the head gives it. Only `z` is gathered; every device computes the head of the whole batch. With a single local
    microbatch the loss is differentiated at once. An encoder that couples rows itself (batch statistics) still sees
    one local microbatch alone. `accumulate(k) @ clip(c) @ grad(across(head) @ encode)` makes each microbatch a value,
    so its head sees that microbatch alone.
    Example:
      >>> grad(across(head) @ encode)
      grad(across(head) @ encode)

    Source: Gao, Zhang, Han, Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021,
      https://arxiv.org/abs/2101.06983 (GradCache); over a mesh and for sums: ours.
    """
    return Across(quoted_argument(head, position=0, keyword="head", otherwise=function_name(head)))
