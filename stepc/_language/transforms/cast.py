"""`cast`: compute in a narrow dtype, keep the parameters in a wide one."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from stepc._core.nodes import Wrap
from stepc._language.fields import floating_dtype
from stepc._language.kinds import BatchRows, Kind, Params
from stepc._language.pipeline import Transform
from stepc._language.semantics import Fn
from stepc._language.state import State, leaves_by_path
from stepc._language.terms import accumulation_dtype
from stepc.errors import ConfigError, faults_in_one, leaf_text

FLOAT32 = np.dtype("float32")


@dataclass(frozen=True, repr=False)
class Cast(Transform):
    """Parameters and rows in a narrow dtype inside the loss."""

    takes: ClassVar = Kind.LOSS
    gives: ClassVar = Kind.LOSS
    compute: np.dtype
    params: np.dtype | None = field(default=FLOAT32, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "compute", floating_dtype("cast", "compute", self.compute, optional=False))
        object.__setattr__(self, "params", floating_dtype("cast", "params", self.params))

    def reference(self, inner: Fn) -> Fn:
        def init(state: State) -> State:
            check_master_parameters(state.trained, self.compute, self.params)
            return inner.init(state)

        return Fn(init, cast_loss(inner.apply, self.compute, self.params), inner.axes, inner.names)

    def expand(self) -> tuple[Wrap, ...]:
        arguments = (self.compute, self.params)
        name = self.compute.name
        return (Wrap(cast_loss, arguments, check_master_parameters, computes_in=name, written=repr(self)),)


def cast_loss(loss: Callable[..., Any], compute: np.dtype, _: np.dtype | None) -> Callable[..., Any]:
    """The loss on parameters and rows of dtype `compute`; its results are float32 at least."""

    def narrow(leaf: Any) -> Any:
        return leaf.astype(compute) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    def widen(leaf: Any) -> Any:
        is_floating = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(accumulation_dtype(leaf.dtype)) if is_floating else leaf

    def narrow_loss(params: Params, rows: BatchRows, *rest: Any, **reads: Any) -> Any:
        returned = loss(jax.tree.map(narrow, params), jax.tree.map(narrow, rows), *rest, **jax.tree.map(narrow, reads))
        widened = jax.tree.map(widen, returned)
        if not (rest and isinstance(returned, tuple) and _have_one_structure(returned[-1], rest[-1])):
            return widened
        # Model state is not cast, so what has the dtype that it came with keeps it.
        return (*widened[:-1], jax.tree.map(_of_dtype, rest[-1], returned[-1], widened[-1]))

    return narrow_loss


def _have_one_structure(one: Any, other: Any) -> bool:
    return jax.tree.structure(one) == jax.tree.structure(other)


def _of_dtype(given: Any, returned: Any, widened: Any) -> Any:
    return returned if jnp.result_type(returned) == jnp.result_type(given) else widened


def check_master_parameters(trained: Params, _: np.dtype, master: np.dtype | None) -> None:
    """Refuse trained parameters of another dtype than `master`."""
    faults = [
        f"{leaf_text(path, 'The parameter')} is {leaf.dtype}, expected {master}."
        for path, leaf in leaves_by_path(trained)
        if master is not None and leaf.dtype != master
    ]
    if faults:
        suggestion = f"Give `init` {master} parameters, or write `cast(..., params=None)`."
        raise ConfigError(faults_in_one(faults, of="the master parameters"), suggestion=suggestion)


def cast(compute: Any, *, params: Any = FLOAT32) -> Cast:  # Any, twice: whatever numpy takes for a dtype
    """Compute the loss in a narrow dtype; parameters, gradients, accumulator and reduction stay in a wide one.

    Meaning: loss(params.astype(compute), rows.astype(compute)), floating-point leaves only, as float32. What the loss
      reads of the state is cast too.
    Why: half the memory for activations and faster matrix products, and small updates are not lost to rounding.

    Args:
      compute: the dtype inside the loss, such as `jnp.bfloat16`.
      params: the dtype that the trained parameters must have; None for any. It is checked, nothing is cast to it.
    Shapes: unchanged. Keys, integers and model state are not cast; results are widened.
    Units: unchanged.
    Type: loss -> loss
    Errors: FieldTypeError, FieldValueError for a bad dtype; PipelineTypeError outside `grad`; ConfigError at the first
      call, with every parameter whose dtype is not `params`.
    float16 also needs `loss_scale()`. A sum inside the loss is taken in the narrow dtype, unless the loss widens it.
    Example:
      >>> grad(cast(jnp.bfloat16) @ loss)
      grad(cast(jnp.bfloat16) @ loss)

    Source: Micikevicius et al., "Mixed Precision Training", 2018, https://arxiv.org/abs/1710.03740.
    """
    return Cast(compute, params=params)
