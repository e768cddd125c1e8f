"""`remat`: recompute activations in the backward pass instead of keeping them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from stepc._core.nodes import Wrap
from stepc._language.kinds import Kind
from stepc._language.pipeline import Transform
from stepc._language.semantics import Fn
from stepc.errors import FieldTypeError, FieldValueError, did_you_mean

# The names in `jax.checkpoint_policies` that are policies; the others are functions that make one.
POLICIES = (
    "everything_saveable",
    "nothing_saveable",
    "dots_saveable",
    "checkpoint_dots",
    "dots_with_no_batch_dims_saveable",
    "checkpoint_dots_with_no_batch_dims",
)


@dataclass(frozen=True, repr=False)
class Remat(Transform):
    """Rematerialise the loss in its backward pass."""

    takes: ClassVar = Kind.LOSS
    gives: ClassVar = Kind.LOSS
    policy: str | None = None

    def __post_init__(self) -> None:
        if self.policy is not None and not isinstance(self.policy, str):
            facts = (("got", type(self.policy).__name__),)
            raise FieldTypeError("`remat`: policy must be the name of a policy, or None.", facts=facts)
        if self.policy is not None and self.policy not in POLICIES:
            facts = (("expected", ", ".join(POLICIES)), ("got", repr(self.policy)))
            hint = did_you_mean(self.policy, POLICIES)
            raise FieldValueError(f"Unknown remat policy {self.policy!r}.", facts=facts, suggestion=hint)

    def reference(self, inner: Fn) -> Fn:
        return inner  # the same numbers, computed twice

    def expand(self) -> tuple[Wrap, ...]:
        return (Wrap(rematerialised_loss, (self.policy,), written=repr(self)),)


def rematerialised_loss(loss: Callable[..., Any], policy: str | None) -> Callable[..., Any]:
    """`jax.checkpoint` of the loss. Results that are not arrays, such as a static count, bypass it."""

    def remat_loss(*given: Any, **reads: Any) -> Any:
        numbers: dict[int, Any] = {}
        trees: list[Any] = []

        def arrays(*given: Any) -> list[Any]:
            leaves, tree = jax.tree.flatten(loss(*given, **reads))
            trees.append(tree)
            numbers.update({n: leaf for n, leaf in enumerate(leaves) if not isinstance(leaf, jax.Array)})
            return [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

        rule = None if policy is None else getattr(jax.checkpoint_policies, policy)
        found = iter(jax.checkpoint(arrays, policy=rule)(*given))
        leaves = [numbers[n] if n in numbers else next(found) for n in range(trees[-1].num_leaves)]
        return jax.tree.unflatten(trees[-1], leaves)

    return remat_loss


def remat(policy: str | None = None) -> Remat:
    """Recompute the activations of the loss in its backward pass instead of keeping them.

    Meaning: loss(params, rows), the same numbers.
    Why: less memory for more computation. A policy keeps what is expensive to recompute, such as matrix products.

    Args:
      policy: a name from `jax.checkpoint_policies`; None keeps nothing but the arguments.
    Shapes: unchanged.
    Units: unchanged.
    Type: loss -> loss
    Errors: FieldTypeError, FieldValueError for an unknown policy; PipelineTypeError outside `grad`.
    Around a whole loss it saves little by itself, since all activations exist again during the backward pass. It helps
    with `accumulate`, or with a policy; `jax.checkpoint` around each layer, inside the model, saves most.
    Example:
      >>> grad(cast(jnp.bfloat16) @ remat("dots_saveable") @ loss)
      grad(cast(jnp.bfloat16) @ remat("dots_saveable") @ loss)

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, https://arxiv.org/abs/1604.06174;
      `jax.checkpoint`.
    """
    return Remat(policy)
