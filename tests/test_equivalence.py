"""`assert_equivalent` accepts right steps whose gradient is mostly rounding, and still refuses wrong ones."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import PROBES, probe_batch, probe_params
from conftest import mesh_of
from flax import nnx

import stepc as sc
from stepc.testing import assert_equivalent
from stepc.testing.assertions import _with_moved_gradient, assert_equal_trees
from stepc.testing.probes import Evaluating

WIDTH, ROWS = 16, 64
OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "adam": optax.adam(1e-2),
    "lion": optax.lion(1e-2),
    "adamw after clip": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
}
SETTINGS = [(1, None), (4, None), (2, 2)]


def batch() -> Any:
    random = np.random.default_rng(0)
    return {name: random.normal(size=(ROWS, WIDTH)).astype(np.float32) for name in ("x", "y")}


def by_hand() -> tuple[Any, Any, Any]:
    random = np.random.default_rng(1)
    weights = {name: np.float32(random.normal(size=(WIDTH, WIDTH)) / 4) for name in ("in", "out")}
    params = {**weights, "before": np.zeros(WIDTH, np.float32), "after": np.zeros(WIDTH, np.float32)}

    def loss(params: Any, rows: Any) -> jax.Array:
        hidden = jnp.matmul(rows["x"], params["in"]) + params["before"][None]
        # Each column loses its mean over the rows: the derivative in `before` is 0.
        hidden = (hidden - hidden.mean(axis=0, keepdims=True)) / (hidden.std(axis=0, keepdims=True) + 1e-3)
        out = jnp.matmul(jnp.tanh(hidden), params["out"]) + params["after"][None]
        return jnp.mean((out - rows["y"]) ** 2)

    return params, None, loss


def by_nnx() -> tuple[Any, Any, Any]:
    rngs = nnx.Rngs(0)
    layers = [nnx.Linear(WIDTH, WIDTH, rngs=rngs), nnx.BatchNorm(WIDTH, rngs=rngs), nnx.Linear(WIDTH, 1, rngs=rngs)]
    definition, params, statistics = nnx.split(nnx.Sequential(*layers), nnx.Param, ...)

    def loss(params: Any, rows: Any, statistics: Any) -> tuple[jax.Array, Any]:
        model = nnx.merge(definition, params, statistics, copy=True)
        error = model(rows["x"]) - rows["y"][:, :1]
        return jnp.mean(error**2), nnx.state(model, nnx.Not(nnx.Param))

    return params, statistics, loss


def by_equinox() -> tuple[Any, Any, Any]:
    keys = jax.random.split(jax.random.key(0), 2)

    class Model(eqx.Module):
        first: eqx.nn.Linear
        norm: eqx.nn.BatchNorm
        second: eqx.nn.Linear

        def __call__(self, x: jax.Array, state: eqx.nn.State) -> tuple[jax.Array, eqx.nn.State]:
            hidden, state = self.norm(self.first(x), state)
            return self.second(jnp.tanh(hidden)), state

    linears = [eqx.nn.Linear(WIDTH, size, key=key) for size, key in zip((WIDTH, 1), keys, strict=True)]
    norm = eqx.nn.BatchNorm(WIDTH, axis_name="rows", mode="batch")
    model, state = eqx.nn.make_with_state(Model)(linears[0], norm, linears[1])
    params, static = eqx.partition(model, eqx.is_inexact_array)
    numbers, rest = eqx.partition(state, eqx.is_array)

    def loss(params: Any, rows: Any, numbers: Any) -> tuple[jax.Array, Any]:
        model, state = eqx.combine(params, static), eqx.combine(numbers, rest)
        out, state = jax.vmap(model, axis_name="rows", in_axes=(0, None), out_axes=(0, None))(rows["x"], state)
        return jnp.mean((out - rows["y"][:, :1]) ** 2), eqx.filter(state, eqx.is_array)

    return params, numbers, loss


MODELS: dict[str, Callable[[], tuple[Any, Any, Any]]] = {"by hand": by_hand, "nnx": by_nnx, "equinox": by_equinox}


def pipeline_of(loss: Any, optimizer: Any, k: int, *, model_state: bool) -> sc.Pipeline:
    gradient = sc.accumulate(k) @ sc.shard(sc.dp("data")) @ sc.grad(loss, model_state=model_state)
    return sc.update(optimizer) @ sc.clip(1.0) @ gradient


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("k", "devices"), SETTINGS)
def test_step_whose_bias_has_no_gradient_is_equivalent(model: str, optimizer: str, k: int, devices: int | None) -> None:
    params, model_state, loss = MODELS[model]()
    pipeline = pipeline_of(loss, OPTIMIZERS[optimizer], k, model_state=model_state is not None)
    step = sc.compile(pipeline, mesh=mesh_of(data=devices or 1))
    state = step.init(params, model_state=model_state)
    for _ in range(2):
        assert_equivalent(step, state, batch())
        state, _ = step(state, batch())


def scaled(factor: float, of: str | None = None) -> Any:
    """A factor on the gradient of every parameter, or of one."""

    def scale(name: str, leaf: jax.Array) -> jax.Array:
        constant = jax.lax.stop_gradient(leaf)
        return constant + factor * (leaf - constant) if of in (None, name) else leaf

    _, _, loss = by_hand()
    return lambda params, rows: loss({name: scale(name, leaf) for name, leaf in params.items()}, rows)


def of_half_the_rows(params: Any, rows: Any) -> jax.Array:
    return by_hand()[2](params, jax.tree.map(lambda leaf: leaf[: ROWS // 8], rows))


@pytest.mark.parametrize(
    "wrong",
    [
        scaled(1.001),
        scaled(2.0),
        scaled(-1.0),
        scaled(1.001, of="after"),
        scaled(0.0, of="after"),
        scaled(1.01, of="in"),
        of_half_the_rows,
    ],
    ids=["1.001", "2", "-1", "1.001 of a bias", "0 of a bias", "1.01 of a matrix", "rows lost"],
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_step_of_a_wrong_gradient_is_not_equivalent(
    wrong: Any, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, _, loss = by_hand()
    right, other = (
        sc.compile(sc.update(OPTIMIZERS[optimizer]) @ sc.accumulate(4) @ sc.grad(one)) for one in (loss, wrong)
    )
    state = right.init(params)
    state, _ = right(state, batch())
    assert_equivalent(right, state, batch())
    monkeypatch.setattr(type(other), "reference", right.reference)
    with pytest.raises(sc.EquivalenceError):
        assert_equivalent(other, state, batch())


@pytest.mark.parametrize(
    "optimizer", [optax.sgd(0.1001), optax.sgd(0.1, momentum=0.9), optax.adam(1e-2), optax.sgd(0.0)]
)
def test_step_of_a_wrong_optimizer_is_not_equivalent(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params, _, loss = by_hand()
    right, other = (sc.compile(sc.update(tx) @ sc.accumulate(4) @ sc.grad(loss)) for tx in (optax.sgd(0.1), optimizer))
    state = other.init(params)
    monkeypatch.setattr(type(other), "reference", right.reference)
    with pytest.raises((sc.EquivalenceError, ValueError)):
        assert_equivalent(other, state, batch())


def test_gradient_is_moved_where_the_optimizer_differentiates_the_loss() -> None:
    """It took the largest magnitude of a gradient as a number of Python, which a tracer is not."""
    step = sc.compile(sc.update(Evaluating()) @ sc.accumulate(2) @ sc.sam(0.125) @ sc.grad(PROBES["over_rows"]))
    state, batch = step.init(probe_params()), probe_batch(8)
    moved, _ = _with_moved_gradient(step, state, batch, 1.0)
    still, _ = step.reference(state, batch)
    # This optimizer goes down the gradient that it computes itself, which is not moved.
    assert_equal_trees(moved, still, tolerance=0.0, of="the moved step and the reference")
