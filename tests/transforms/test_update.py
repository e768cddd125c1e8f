"""`update` is optax's own step, extra args included, and a step and its reference agree on `init`."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from catalogue import PROBES, probe_batch, probe_params

import stepc as sc
from stepc._language.optimizers import extra_arguments
from stepc.testing import assert_equal_trees, assert_equivalent

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


SCHEDULE = optax.linear_schedule(0.5, 0.1, 4)


def injected(rate: Any, momentum: float) -> Any:
    return optax.inject_hyperparams(optax.sgd)(learning_rate=rate, momentum=momentum)


@pytest.mark.parametrize("outside", [None, sc.skip_nonfinite(), sc.ema(0.5)], ids=str)
def test_injected_hyperparameters_are_metrics(outside: Any) -> None:
    pipeline = sc.update(optax.chain(optax.clip(9.0), injected(SCHEDULE, 0.75))) @ sc.accumulate(2) @ sc.grad(LOSS)
    step = sc.compile(pipeline if outside is None else outside @ pipeline)
    state = step.init(probe_params())
    for number in range(3):
        assert_equivalent(step, state, probe_batch(8))
        state, metrics = step(state, probe_batch(8))
        assert metrics["learning_rate"] == SCHEDULE(number) and metrics["momentum"] == 0.75
    again = sc.compile(sc.repeat(2) @ pipeline)
    _, metrics = again(again.init(probe_params()), jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), probe_batch(8)))
    assert metrics["learning_rate"].tolist() == [SCHEDULE(0), SCHEDULE(1)]


def test_hyperparameters_of_several_optimizers_stand_after_their_places() -> None:
    parts = {"head": injected(0.5, 0.75), "rest": injected(0.25, 0.75)}
    labels = {name: "head" if number == 0 else "rest" for number, name in enumerate(probe_params())}
    step = sc.compile(sc.update(optax.partition(parts, labels)) @ sc.grad(LOSS))
    _, metrics = step(step.init(probe_params()), probe_batch(8))
    assert {name: float(value) for name, value in metrics.items() if name != "loss"} == {
        "head/learning_rate": 0.5,
        "head/momentum": 0.75,
        "rest/learning_rate": 0.25,
        "rest/momentum": 0.75,
    }
    chained = sc.compile(sc.update(optax.chain(injected(0.5, 0.0), injected(0.25, 0.0))) @ sc.grad(LOSS))
    _, metrics = chained(chained.init(probe_params()), probe_batch(8))
    assert (metrics["0/learning_rate"], metrics["1/learning_rate"]) == (0.5, 0.25)


def test_hyperparameter_with_the_name_of_another_metric_is_refused() -> None:
    def loss(params: Any, rows: Any) -> tuple[jax.Array, dict[str, Any]]:
        return LOSS(params, rows), {"learning_rate": 0.5}

    step = sc.compile(sc.update(injected(0.5, 0.0)) @ sc.grad(loss, has_aux=True))
    with pytest.raises(sc.ConfigError) as raised:
        step(step.init(probe_params()), probe_batch(8))
    assert str(raised.value) == (
        "`update(injected(0.5, 0.0))` adds a metric whose name is taken.\n\n  taken  learning_rate"
    )
