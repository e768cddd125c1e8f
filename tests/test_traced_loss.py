"""A step runs the operations that one trace of the loss found."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of
from jax.interpreters import ad

import stepc as sc
from stepc._compiler.layers import trace_function
from stepc.testing import assert_equivalent

SGD = sc.update(optax.sgd(0.1))
PARAMS = {"w": np.linspace(0.1, 0.8, 8, dtype=np.float32), "v": np.ones((2, 8), np.float32)}
BATCH = {"x": np.arange(128, dtype=np.float32).reshape(16, 8) / 100, "y": np.linspace(0, 1, 16, dtype=np.float32)}


class Counted:
    """A loss that counts its calls. What it takes besides parameters and rows, it hands on or leaves alone."""

    def __init__(self, returned: Callable[..., Any] = lambda value, *_: value) -> None:
        self.calls = 0
        self.returned = returned
        self.counts = "positive" in inspect.signature(returned).parameters

    def __call__(self, params: Any, rows: Any, *rest: Any, **reads: Any) -> Any:
        self.calls += 1
        hidden, _ = jax.lax.scan(lambda x, layer: (jnp.tanh(x * layer[None]), None), rows["x"], params["v"])
        errors = (hidden @ params["w"] - rows["y"]) ** 2
        return self.returned(errors.mean(), errors, *rest, **({"positive": rows["y"] > 0.1} if self.counts else {}))


def data(**level: Any) -> sc.Transform:
    return sc.shard(sc.dp("data", **level))


def on(devices: int | None) -> sc.Transform:
    return sc.accumulate(1) if devices is None else data()


def mesh_with(devices: int | None) -> jax.sharding.Mesh | None:
    return None if devices is None else mesh_of(data=devices)


PLAIN: dict[str, Callable[[Any], Any]] = {
    "alone": lambda loss: SGD @ sc.grad(loss),
    "accumulate": lambda loss: SGD @ sc.accumulate(4) @ sc.grad(loss),
    "skip_nonfinite": lambda loss: sc.skip_nonfinite() @ SGD @ sc.loss_scale() @ sc.accumulate(2) @ sc.grad(loss),
    "sam": lambda loss: SGD @ sc.sam(0.1) @ sc.accumulate(2) @ sc.grad(loss),
    "rows": lambda loss: SGD @ sc.rows() @ sc.clip(1.0) @ sc.grad(loss),
    "remat": lambda loss: SGD @ sc.accumulate(2) @ sc.grad(sc.remat() @ loss),
    "cast": lambda loss: SGD @ sc.accumulate(2) @ sc.grad(sc.cast(jnp.bfloat16) @ loss),
    "line search": lambda loss: sc.update(optax.lbfgs()) @ sc.grad(loss),
}
SHARDED: dict[str, Callable[[Any], Any]] = {
    "zero=0": lambda loss: SGD @ sc.clip(1.0) @ sc.accumulate(2) @ data() @ sc.grad(loss),
    "zero=1": lambda loss: SGD @ sc.clip(1.0) @ sc.accumulate(2) @ data(zero=1) @ sc.grad(loss),
    "zero=3": lambda loss: SGD @ sc.accumulate(2) @ data(zero=3) @ sc.grad(loss),
    "layer": lambda loss: SGD @ sc.accumulate(2) @ data(zero=3, gather="layer") @ sc.grad(loss),
    "layer, step": lambda loss: SGD @ sc.accumulate(2) @ data(zero=3, gather=("layer", "step")) @ sc.grad(loss),
    "auto": lambda loss: SGD @ sc.accumulate(2) @ sc.shard(sc.dp("data"), mode="auto") @ sc.grad(loss),
    "auto, layer": lambda loss: (
        SGD @ sc.accumulate(2) @ sc.shard(sc.dp("data", zero=3, gather="layer"), mode="auto") @ sc.grad(loss)
    ),
}


@pytest.mark.parametrize(
    ("pipeline", "devices"),
    [(one, None) for one in PLAIN.values()] + [(one, 4) for one in SHARDED.values()],
    ids=[*PLAIN, *SHARDED],
)
def test_loss_is_called_once_and_gives_what_the_reference_gives(
    pipeline: Callable[[Any], Any], devices: int | None
) -> None:
    loss = Counted()
    step = sc.compile(pipeline(loss), mesh=mesh_with(devices))
    state = step.init(PARAMS)
    loss.calls = 0  # that of a line search is called by `init` too
    step.lower(state, BATCH)
    assert loss.calls == 1
    assert_equivalent(step, state, BATCH, tolerance=1e-2 if pipeline is PLAIN["cast"] else 1e-5)


RETURNED: dict[str, tuple[dict[str, Any], Callable[..., Any], Any]] = {
    "metrics": (
        {"has_aux": True},
        lambda value, errors: (
            value,
            {"mean": errors.mean(), "of two": sc.Mean(errors.sum(), 2), "largest": sc.Max(errors.max()), "one": 1.0},
        ),
        None,
    ),
    "counted": ({}, lambda value, errors, positive: sc.Mean((errors * positive).sum(), positive.sum()), None),
    "two terms": ({}, lambda value, errors: sc.Mean(errors.sum(), errors.size) + sc.Mean(errors[0], 1), None),
    "one count": (
        {},
        lambda value, errors, positive: (lambda count: sc.Mean(errors.sum(), count) + sc.Mean(errors[0], count))(
            positive.sum(dtype=np.float32)
        ),
        None,
    ),
    "keys": (
        {"rng": "example"},
        lambda value, errors, keys: (errors * jax.vmap(jax.random.uniform)(keys)).mean(),
        None,
    ),
    "model state": (
        {"model_state": True},
        lambda value, errors, state: (value * state["scale"], {**state, "seen": state["seen"] * 0.9 + errors.mean()}),
        {"scale": np.float32(2), "seen": np.float32(0)},
    ),
    "numpy": (
        {"model_state": True},
        lambda value, errors, state: (value, {"constant": np.ones(3, np.float32)}),
        {"constant": np.zeros(3, np.float32)},
    ),
}


@pytest.mark.parametrize(("options", "returned", "model_state"), RETURNED.values(), ids=RETURNED)
@pytest.mark.parametrize("devices", [None, 4])
def test_whatever_a_loss_takes_and_returns_is_in_its_one_trace(
    options: dict[str, Any], returned: Callable[..., Any], model_state: Any, devices: int | None
) -> None:
    loss = Counted(returned)
    gradient = sc.grad(loss, **options)
    step = sc.compile(SGD @ sc.accumulate(2) @ (data() @ gradient if devices else gradient), mesh=mesh_with(devices))
    state = step.init(PARAMS, model_state=model_state)
    step.lower(state, BATCH)
    assert loss.calls == 1
    assert_equivalent(step, state, BATCH)


def test_turns_have_a_trace_each() -> None:
    one, two = Counted(), Counted(lambda value, errors: errors.max())
    step = sc.compile(sc.alternate(one=SGD @ sc.grad(one, wrt="w"), two=SGD @ sc.accumulate(2) @ sc.grad(two, wrt="v")))
    state = step.init(PARAMS)
    step.lower(state, BATCH)
    assert (one.calls, two.calls) == (1, 1)
    assert_equivalent(step, state, BATCH)


def test_a_batch_of_weak_type_has_a_trace_of_its_own() -> None:
    """The trace is for numbers of the batch's dtype; of a weak type they take that of the other operand."""
    loss, dtypes = Counted(lambda value, errors: errors.mean()), list[Any]()

    def with_weak_rows(params: Any, rows: Any) -> jax.Array:
        product = rows["x"] * params["half"][None]
        dtypes.append(product.dtype)
        return product.astype(jnp.float32).mean() + loss({**params}, {**rows, "x": rows["x"].astype(jnp.float32)})

    params = {**PARAMS, "half": np.float16(0.5) * np.ones(8, np.float16)}
    batch = {"x": jnp.full((16, 8), 0.5) * 1, "y": jnp.asarray(BATCH["y"])}
    assert batch["x"].weak_type
    step = sc.compile(SGD @ sc.accumulate(2) @ sc.grad(with_weak_rows))
    assert_equivalent(step, step.init(params), batch)
    assert set(dtypes) == {jnp.dtype("float32"), jnp.dtype("float16")}


@pytest.mark.parametrize("devices", [None, 4])
def test_a_loss_may_close_over_what_is_differentiated_or_mapped_outside(devices: int | None) -> None:
    rows = BATCH["x"], BATCH["y"]

    def after(decay: jax.Array) -> jax.Array:
        def loss(params: Any, rows: Any) -> jax.Array:
            return jnp.mean((rows["x"] @ params - rows["y"]) ** 2) + decay * jnp.sum(params**2)

        step = sc.compile(SGD @ sc.accumulate(2) @ on(devices) @ sc.grad(loss), mesh=mesh_with(devices))
        return jnp.sum(step.function(state, BATCH)[0].params ** 2)

    def by_hand(decay: jax.Array) -> jax.Array:
        loss = lambda params: jnp.mean((rows[0] @ params - rows[1]) ** 2) + decay * jnp.sum(params**2)  # noqa: E731
        return jnp.sum((PARAMS["w"] - 0.1 * jax.grad(loss)(PARAMS["w"])) ** 2)

    made = sc.compile(SGD @ (data() @ sc.grad(jnp.vdot) if devices else sc.grad(jnp.vdot)), mesh=mesh_with(devices))
    state, decays = made.init(PARAMS["w"]), jnp.asarray([0.1, 0.7])
    for transformed, given in ((jax.grad, decays[0]), (jax.vmap, decays), (jax.jit, decays[0])):
        np.testing.assert_allclose(transformed(after)(given), transformed(by_hand)(given), rtol=1e-5)


def test_operations_are_shared_only_where_they_are_the_same() -> None:
    def function(x: jax.Array, n: jax.Array) -> jax.Array:
        one, two = jnp.sin(x), jnp.sin(x[:4])
        three = jax.lax.mul(one, 2.0 * jnp.ones(8)) + jax.lax.mul(one, one) + jax.lax.mul(x, x)
        four = jnp.sum(jnp.reshape(x, (2, 4)), 0) + jnp.sum(jnp.reshape(x, (4, 2)), 1) + two * 2 + two * 3
        return (three.sum() + four.sum()) * n.astype(jnp.float32).sum() + jax.lax.top_k(x, 3)[0].sum()

    x, n = jnp.linspace(0.0, 1.0, 8), jnp.arange(3)
    traced = trace_function(function, x, n)
    np.testing.assert_allclose(traced(x, n), function(x, n), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(traced)(x, n), jax.grad(function)(x, n), rtol=1e-6)
    assert traced.takes(x, n)
    assert not traced.takes(x[:4], n)
    assert not traced.takes(x.astype(jnp.float16), n)


def test_numbers_are_the_same_only_bit_by_bit() -> None:
    def function(x: jax.Array) -> jax.Array:
        return jnp.stack([jax.lax.div(x, zero) for zero in (0.0, 0.0, -0.0, -0.0, float("nan"), float("nan"))])

    found = trace_function(function, jnp.ones(()))(jnp.ones(()))
    np.testing.assert_array_equal(found, [np.inf, np.inf, -np.inf, -np.inf, np.nan, np.nan])


def test_operations_of_many_layers_are_differentiated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """jax differentiates an operation each time that it comes, and a program once."""
    differentiated, rules = [], ad.primitive_jvps
    rule = rules[jax.lax.tanh_p]

    def function(x: jax.Array) -> jax.Array:
        for _ in range(10):
            x = jax.lax.tanh(x)
        return x.sum()

    def counted(primals: Any, tangents: Any, **params: Any) -> Any:
        differentiated.append(1)
        return rule(primals, tangents, **params)

    traced = trace_function(function, jnp.ones(3))
    monkeypatch.setitem(rules, jax.lax.tanh_p, counted)
    jax.make_jaxpr(jax.grad(traced))(jnp.ones(3))
    assert len(differentiated) == 1
    differentiated.clear()
    jax.make_jaxpr(jax.grad(function))(jnp.ones(3))
    assert len(differentiated) == 10
