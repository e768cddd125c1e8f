"""`remat`: recompute activations in the backward pass instead of keeping them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from stepc._core.nodes import Wrap
from stepc._language.kinds import Kind
from stepc._language.pipeline import Transform
from stepc._language.semantics import Fn
from stepc.errors import FieldTypeError, FieldValueError, LossError, did_you_mean, listed

# The names in `jax.checkpoint_policies` that are policies.
POLICIES = (
    "everything_saveable",
    "nothing_saveable",
    "dots_saveable",
    "checkpoint_dots",
    "dots_with_no_batch_dims_saveable",
    "checkpoint_dots_with_no_batch_dims",
)
# Those that are functions which make one, with the fields that they take.
MAKERS = {
    "save_only_these_names": ("save",),
    "save_and_offload_only_these_names": ("save", "offload"),
    "offload_dot_with_no_batch_dims": (),
}
_HOST = {"offload_src": "device", "offload_dst": "pinned_host"}


@dataclass(frozen=True, repr=False)
class Remat(Transform):
    """Rematerialise the loss in its backward pass."""

    takes: ClassVar = Kind.LOSS
    gives: ClassVar = Kind.LOSS
    policy: str | None = None
    save: tuple[str, ...] = field(default=(), kw_only=True)
    offload: tuple[str, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        if self.policy is not None and not isinstance(self.policy, str):
            facts = (("got", type(self.policy).__name__),)
            raise FieldTypeError("`remat`: policy must be the name of a policy, or None.", facts=facts)
        known = (*POLICIES, *MAKERS)
        if self.policy is not None and self.policy not in known:
            facts = (("expected", ", ".join(known)), ("got", repr(self.policy)))
            hint = did_you_mean(self.policy, known)
            raise FieldValueError(f"Unknown remat policy {self.policy!r}.", facts=facts, suggestion=hint)
        given = {name: names for name in ("save", "offload") if (names := getattr(self, name)) != ()}
        for name, names in given.items():
            if not isinstance(names, tuple) or not all(isinstance(one, str) and one for one in names):
                facts = (("got", repr(names)),)
                suggestion = f"Write `remat({self.policy!r}, {name}=({names!r},))`." if isinstance(names, str) else None
                what = f"`remat`: {name} must be a tuple of names that `checkpoint_name` gives."
                raise FieldTypeError(what, facts=facts, suggestion=suggestion)
        takes = MAKERS.get(self.policy or "", ())
        if unused := [name for name in given if name not in takes]:
            facts = (("got", ", ".join(f"{name}={given[name]!r}" for name in unused)),)
            makers = " or ".join(f"{name!r}" for name, fields in MAKERS.items() if unused[0] in fields)
            what = f"`remat`: the policy {self.policy!r} takes no names to {unused[0]}."
            raise FieldValueError(what, facts=facts, suggestion=f"{makers} takes them.")
        if takes and not given:
            what = f"`remat`: the policy {self.policy!r} needs the names of what it keeps."
            raise FieldValueError(what, suggestion=f"Write `remat({self.policy!r}, {takes[-1]}=('mlp',))`.")

    def reference(self, inner: Fn) -> Fn:
        return inner  # the same numbers, computed twice

    def expand(self) -> tuple[Wrap, ...]:
        return (Wrap(rematerialised_loss, (self.policy, self.save, self.offload), written=repr(self)),)


def _policy(name: str | None, save: tuple[str, ...], offload: tuple[str, ...]) -> Callable[..., Any] | None:
    """The policy as `jax.checkpoint` takes it."""
    match name:
        case None:
            return None
        case "save_only_these_names":
            return jax.checkpoint_policies.save_only_these_names(*save)
        case "save_and_offload_only_these_names":
            return jax.checkpoint_policies.save_and_offload_only_these_names(
                names_which_can_be_saved=save, names_which_can_be_offloaded=offload, **_HOST
            )
        case "offload_dot_with_no_batch_dims":
            return jax.checkpoint_policies.offload_dot_with_no_batch_dims(**_HOST)
        case _:
            return getattr(jax.checkpoint_policies, name)


def rematerialised_loss(
    loss: Callable[..., Any], policy: str | None, save: tuple[str, ...], offload: tuple[str, ...]
) -> Callable[..., Any]:
    """`jax.checkpoint` of the loss. Results that are not arrays, such as a static count, bypass it."""

    def remat_loss(*given: Any, **reads: Any) -> Any:
        numbers: dict[int, Any] = {}
        trees: list[Any] = []

        def arrays(*given: Any) -> list[Any]:
            leaves, tree = jax.tree.flatten(loss(*given, **reads))
            trees.append(tree)
            numbers.update({n: leaf for n, leaf in enumerate(leaves) if not isinstance(leaf, jax.Array)})
            return [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

        if names := (*save, *offload):
            _check_names(names, jax.make_jaxpr(arrays)(*given))
        found = iter(jax.checkpoint(arrays, policy=_policy(policy, save, offload))(*given))
        leaves = [numbers[n] if n in numbers else next(found) for n in range(trees[-1].num_leaves)]
        return jax.tree.unflatten(trees[-1], leaves)

    return remat_loss


def _check_names(names: tuple[str, ...], traced: ClosedJaxpr) -> None:
    """Refuse names that nothing in the loss has: jax would ignore them. Errors: LossError."""
    known = dict.fromkeys(_names_in(traced.jaxpr))
    if unknown := [name for name in names if name not in known]:
        facts = (("named", ", ".join(known) or "nothing"), ("got", ", ".join(unknown)))
        what = f"`remat`: nothing in the loss has the name {listed(map(repr, unknown), separator=' or ')}."
        hints = (did_you_mean(one, known) or f"Write `checkpoint_name(..., {one!r})` in the loss." for one in unknown)
        raise LossError(what, facts=facts, suggestion=" ".join(hints))


def _names_in(jaxpr: Jaxpr) -> Iterator[str]:
    """The names that `checkpoint_name` gives, in all programs inside as well."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "name":
            yield str(equation.params["name"])
        for value in jax.tree.leaves(equation.params, is_leaf=lambda one: isinstance(one, Jaxpr | ClosedJaxpr)):
            match value:
                case Jaxpr():
                    yield from _names_in(value)
                case ClosedJaxpr():
                    yield from _names_in(value.jaxpr)
                case _:
                    pass


def remat(policy: str | None = None, *, save: tuple[str, ...] = (), offload: tuple[str, ...] = ()) -> Remat:
    """Recompute the activations of the loss in its backward pass instead of keeping them.

    Meaning: loss(params, rows), the same numbers.
    Why: less memory for more computation. A policy keeps what is expensive to recompute, such as matrix products.

    Args:
      policy: a name from `jax.checkpoint_policies`; None keeps nothing but the arguments.
        "save_and_offload_only_these_names" and "offload_dot_with_no_batch_dims" keep activations in pinned memory of
        the host until the backward pass.
      save: for "save_only_these_names" and "save_and_offload_only_these_names", the names that
        `jax.ad_checkpoint.checkpoint_name` gives what is kept on the device.
      offload: for "save_and_offload_only_these_names", the names of what is kept in the memory of the host.
    Shapes: unchanged.
    Units: unchanged.
    Type: loss -> loss
    Errors: FieldTypeError, FieldValueError for an unknown policy, and for names that it does not take, or lacks;
      PipelineTypeError outside `grad`; LossError at the first call for a name that nothing in the loss has.
    Around a whole loss it saves little by itself, since all activations exist again during the backward pass. It helps
    with `accumulate`, or with a policy; `jax.checkpoint` around each layer, inside the model, saves most.
    Example:
      >>> grad(cast(jnp.bfloat16) @ remat("dots_saveable") @ loss)
      grad(cast(jnp.bfloat16) @ remat("dots_saveable") @ loss)
      >>> remat("save_and_offload_only_these_names", offload=("mlp",))
      remat("save_and_offload_only_these_names", offload=("mlp",))

    Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, https://arxiv.org/abs/1604.06174;
      `jax.checkpoint`.
    """
    return Remat(policy, save=save, offload=offload)
