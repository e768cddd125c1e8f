"""`update` is optax's own step, extra args included, and a step and its reference agree on `init`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from catalogue import PROBES, probe_batch, probe_params

import stepc as sc
from stepc._language.optimizers import extra_arguments
from stepc.testing import assert_equal_trees

LOSS = PROBES["over_rows"]


def by_hand(optimizer: optax.GradientTransformation) -> Any:
    params, batch = jax.tree.map(jnp.asarray, (probe_params(), probe_batch(8)))
    value, grads = jax.value_and_grad(LOSS)(params, batch)
    tx = optax.with_extra_args_support(optimizer)
    updates, opt_state = tx.update(grads, tx.init(params), params, value=value, grad=grads)
    return optax.apply_updates(params, updates), opt_state


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(0.5, momentum=0.9),
        optax.adamw(1e-2),
        optax.contrib.reduce_on_plateau(),
        optax.polyak_sgd(),
        optax.lion(1e-3),
    ],
)
def test_update_is_the_step_of_optax(optimizer: optax.GradientTransformation) -> None:
    step = sc.compile(sc.update(optimizer) @ sc.grad(LOSS))
    state, _ = step(step.init(probe_params()), probe_batch(8))
    # One fused program rounds in another way than single operations.
    assert_equal_trees((state.params, state.opt_state), by_hand(optimizer), tolerance=1e-6, of="stepc and optax")


class Slotted(NamedTuple):
    """An optimizer that keeps another in a slot, and passes any keyword on."""

    inner: optax.GradientTransformationExtraArgs

    def init(self, params: Any) -> Any:
        return self.inner.init(params)

    def update(self, grads: Any, state: Any, params: Any, **extra: Any) -> Any:
        return self.inner.update(grads, state, params, **extra)


def any_keyword(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
    return grads, state


@pytest.mark.parametrize(
    ("optimizer", "names"),
    [
        (optax.scale(-0.1), ()),
        (optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.1)), ()),
        (optax.adamw(0.1), ("value", "grad")),
        (optax.GradientTransformationExtraArgs(lambda params: (), any_keyword), ("value", "grad")),
        (optax.lbfgs(), ("value", "grad", "value_fn")),
        (
            optax.masked(optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(5)), True),
            ("value", "grad", "value_fn"),
        ),
        (optax.inject_hyperparams(optax.scale_by_zoom_linesearch)(5), ("value", "grad", "value_fn")),
        (optax.contrib.sophia(0.1), ("value", "grad", "obj_fn")),
        (Slotted(optax.lbfgs()), ("value", "grad", "value_fn")),
        (Slotted(optax.contrib.sophia(0.1)), ("value", "grad", "obj_fn")),
    ],
)
def test_what_update_takes_is_read_from_the_signatures(optimizer: Any, names: tuple[str, ...]) -> None:
    assert extra_arguments(optimizer) == names


def test_a_keyword_that_an_optimizer_inside_does_not_know_is_not_passed_on() -> None:
    """`optax.chain` takes any keyword and passes all of them on; `contrib.sam` knows none of ours."""
    inner = optax.contrib.sam(optax.sgd(0.5), optax.chain(optax.contrib.normalize(), optax.sgd(0.25)))
    step = sc.compile(sc.update(optax.chain(optax.clip(1.0), inner)) @ sc.grad(LOSS))
    state, params = step.init(probe_params()), jax.tree.map(jnp.asarray, probe_params())
    batch, opt_state = jax.tree.map(jnp.asarray, probe_batch(8)), inner.init(params)
    for _ in range(4):  # two steps uphill, two downhill
        state, _ = step(state, probe_batch(8))
        clipped = jax.tree.map(lambda leaf: jnp.clip(leaf, -1, 1), jax.grad(LOSS)(params, batch))
        updates, opt_state = inner.update(clipped, opt_state, params)
        params = optax.apply_updates(params, updates)
    assert_equal_trees(state.params, params, tolerance=1e-6, of="stepc and optax")


@pytest.mark.parametrize("seed", [0, 7, 2**40, -1])
def test_init_of_a_step_and_of_its_reference_agree(seed: int) -> None:
    step = sc.compile(sc.update(optax.adam(1e-3)) @ sc.grad(LOSS))
    params = jax.tree.map(jnp.asarray, probe_params())
    assert_equal_trees(
        step.init(params, seed=seed), step.reference.init(params, seed=seed), tolerance=0.0, of="two inits"
    )
    assert step.init(params, seed=seed).rng == jax.random.key(seed)
