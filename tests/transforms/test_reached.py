"""A trained leaf that no gradient can reach is refused: an optimizer with weight decay would change it silently."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import probe_batch, probe_params
from conftest import mesh_of
from flax import nnx

import stepc as sc

ADAMW = sc.update(optax.adamw(0.5, weight_decay=0.5))
EXTRA = np.array([4.0, 2.0, 8.0], np.float32)


def unreached(loss: Callable[..., Any], *, around: Any = None, devices: int = 1, **options: Any) -> str:
    """The message that refuses `extra`, a leaf beside the parameters of the probes; empty where it is trained."""
    pipeline = ADAMW @ around @ sc.grad(loss, **options) if around else ADAMW @ sc.grad(loss, **options)
    step = sc.compile(pipeline, mesh=mesh_of(data=devices))
    state = step.init({**probe_params(), "extra": jnp.asarray(EXTRA)})
    try:
        step.lower(state, probe_batch(16))
    except sc.LossError as error:
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        return str(error)
    return ""


def loss(params: Any, rows: Any) -> jax.Array:
    return jnp.mean((jnp.matmul(rows["x"], params["w"]) + params["b"] - rows["y"]) ** 2)


def times(used: Callable[..., Any]) -> Callable[..., Any]:
    """The loss times what is made of `extra`."""
    return lambda params, rows, *rest: loss(params, rows) * used(params["extra"], rows)


def in_one_branch(extra: jax.Array, rows: Any) -> jax.Array:
    return jax.lax.cond(rows["y"][0] > 100, lambda: jnp.sum(extra), lambda: 1.0)


def stopped_in_a_scan(extra: jax.Array, rows: Any) -> jax.Array:
    return jax.lax.scan(lambda total, _: (total + jax.lax.stop_gradient(extra)[0], None), 0.0, None, length=3)[0]


def through_its_own_rule(extra: jax.Array, rows: Any) -> jax.Array:
    @jax.custom_vjp
    def clamped(x: jax.Array) -> jax.Array:
        return jnp.sum(x)

    clamped.defvjp(lambda x: (clamped(x), None), lambda _, grad: (jnp.broadcast_to(grad, (3,)),))
    return clamped(extra)


NOT_REACHED = {
    "unused": lambda extra, rows: 1.0,
    "stopped": lambda extra, rows: jnp.sum(jax.lax.stop_gradient(extra)),
    "stopped_in_a_scan": stopped_in_a_scan,
    "stopped_in_a_checkpoint": lambda extra, rows: jax.checkpoint(lambda x: jnp.sum(jax.lax.stop_gradient(x)))(extra),
    "stopped_in_a_jit": lambda extra, rows: jax.jit(lambda x: jnp.sum(jax.lax.stop_gradient(x)))(extra),
    "compared": lambda extra, rows: jnp.where(extra[0] > 0, 1.0, 2.0),
    "rounded": lambda extra, rows: jnp.sum(jnp.round(extra)),
    "as_a_whole_number": lambda extra, rows: rows["y"][extra[0].astype(jnp.int32) % 2],
    "stopped_in_both_branches": lambda extra, rows: jax.lax.cond(
        rows["y"][0] > 0, lambda: jax.lax.stop_gradient(extra)[0], lambda: 1.0
    ),
}
REACHED = {
    "used": lambda extra, rows: jnp.sum(extra),
    "in_one_branch": in_one_branch,
    "in_a_scan": lambda extra, rows: jax.lax.scan(lambda total, x: (total + x, None), 0.0, extra)[0],
    "times_zero": lambda extra, rows: 1.0 + 0.0 * jnp.sum(extra),
    "where_it_is_flat": lambda extra, rows: jnp.sum(jax.nn.relu(-extra)) + 1.0,
    "with_a_rule_of_its_own": through_its_own_rule,
}


@pytest.mark.parametrize("name", NOT_REACHED)
def test_parameter_that_no_gradient_can_reach_is_refused_by_path(name: str) -> None:
    assert "reaches 1 of its 3 trained parameters" in unreached(times(NOT_REACHED[name]))
    assert "`extra`" in unreached(times(NOT_REACHED[name]))


@pytest.mark.parametrize("name", REACHED)
def test_parameter_whose_gradient_may_be_zero_is_trained(name: str) -> None:
    assert unreached(times(REACHED[name])) == ""


@pytest.mark.parametrize(
    "around", [sc.accumulate(2), sc.shard(sc.dp("data")), sc.rows() @ sc.clip(1.0), sc.loss_scale(), sc.noise(0.1)]
)
def test_parameter_that_no_gradient_can_reach_is_refused_under_other_transforms(around: Any) -> None:
    assert "`extra`" in unreached(times(NOT_REACHED["stopped"]), around=around, devices=2)
    assert unreached(times(REACHED["used"]), around=around, devices=2) == ""


def test_parameter_that_only_a_count_or_a_metric_uses_is_refused() -> None:
    def reported(params: Any, rows: Any) -> Any:
        return loss(params, rows), {"extra": jnp.sum(params["extra"])}

    assert "`extra`" in unreached(reported, has_aux=True)


def test_parameter_that_one_of_several_terms_uses_is_trained() -> None:
    def terms(params: Any, rows: Any) -> Any:
        return sc.Mean(jnp.sum(rows["y"]) * params["b"] + params["w"][0], 3.0) + sc.Mean(jnp.sum(params["extra"]), 2.0)

    assert unreached(terms) == ""


def test_message_groups_paths_and_shows_at_most_eight() -> None:
    params = {f"layer_{n}": {"mean": np.ones(2, np.float32), "w": np.ones((), np.float32)} for n in range(20)}
    params |= {name: np.ones((), np.float32) for name in "abcdefghij"}

    def of_layers(params: Any, rows: Any) -> jax.Array:
        return jnp.mean(rows["y"]) * sum(params[f"layer_{n}"]["w"] for n in range(20))

    step = sc.compile(ADAMW @ sc.grad(of_layers))
    with pytest.raises(sc.LossError) as raised:
        step(step.init(params), probe_batch(8))
    assert "reaches 30 of its 50 trained parameters" in str(raised.value)
    assert "`a`, `b`, `c`, `d`, `e`, `f`, `g`, `h` and 22 more" in str(raised.value)


ROWS = {"x": np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32), "y": np.ones(32, np.float32)}


class Normed(nnx.Module):
    """A linear layer, batch normalisation, and a linear layer."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.last = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(nnx.relu(self.norm(self.first(x))))[:, 0]


def test_nnx_model_given_whole_is_refused_and_trains_as_the_message_says() -> None:
    graph, variables = nnx.split(Normed(nnx.Rngs(0)))

    def whole(variables: Any, rows: Any) -> jax.Array:
        return jnp.mean((nnx.merge(graph, variables)(rows["x"]) - rows["y"]) ** 2)

    step = sc.compile(ADAMW @ sc.grad(whole))
    with pytest.raises(sc.LossError, match=r"`norm/mean/value`, `norm/var/value`"):
        step(step.init(variables), ROWS)

    graph, params, statistics = nnx.split(Normed(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)

    def split(params: Any, rows: Any, statistics: Any) -> tuple[jax.Array, Any]:
        model = nnx.merge(graph, params, statistics, copy=True)
        value = jnp.mean((model(rows["x"]) - rows["y"]) ** 2)
        return value, nnx.state(model, nnx.BatchStat)

    step = sc.compile(ADAMW @ sc.grad(split, model_state=True))
    state, _ = step(step.init(params, model_state=statistics), ROWS)
    model = nnx.merge(graph, params, statistics)
    hidden = model.first(ROWS["x"])
    # The decay of flax's BatchNorm is 0.99; weight decay of 0.25 would have made it 0.75.
    np.testing.assert_allclose(state.model_state["norm"]["var"][...], 0.99 + 0.01 * hidden.var(axis=0), rtol=1e-5)


class LinenNormed(nn.Module):
    """The same in Linen."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))
        return nn.Dense(1)(nn.relu(x))[:, 0]


def test_linen_variables_given_whole_are_refused_and_train_as_the_message_says() -> None:
    model = LinenNormed()
    variables = jax.tree.map(np.asarray, model.init(jax.random.key(0), ROWS["x"]))

    def whole(variables: Any, rows: Any) -> jax.Array:
        predicted, _ = model.apply(variables, rows["x"], mutable=["batch_stats"])
        return jnp.mean((predicted - rows["y"]) ** 2)

    step = sc.compile(ADAMW @ sc.grad(whole))
    with pytest.raises(sc.LossError, match=r"`batch_stats/BatchNorm_\*/mean`|`batch_stats/BatchNorm_0/mean`"):
        step(step.init(variables), ROWS)

    def split(params: Any, rows: Any, statistics: Any) -> tuple[jax.Array, Any]:
        predicted, new = model.apply({"params": params, "batch_stats": statistics}, rows["x"], mutable=["batch_stats"])
        return jnp.mean((predicted - rows["y"]) ** 2), new["batch_stats"]

    step = sc.compile(ADAMW @ sc.grad(split, model_state=True))
    state, _ = step(step.init(variables["params"], model_state=variables["batch_stats"]), ROWS)
    hidden = ROWS["x"] @ variables["params"]["Dense_0"]["kernel"] + variables["params"]["Dense_0"]["bias"]
    found = state.model_state["BatchNorm_0"]["var"]
    np.testing.assert_allclose(found, 0.99 + 0.01 * hidden.var(axis=0), rtol=1e-5)
