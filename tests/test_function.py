"""`step.function`: the step as a pure function under a `jit`, `scan`, `vmap` and `grad` of the user's own."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import PROBES, probe_batch, probe_params
from conftest import mesh_of

import stepc as sc
from stepc.testing import assert_equal_trees
from stepc.testing.probes import WIDE, drawing, wide_params

NUM_STEPS = 3
ADAM = sc.update(optax.inject_hyperparams(optax.adam)(learning_rate=0.01))
# The programs differ from that of a call, so XLA fuses and rounds otherwise; Adam divides by small numbers.
TOLERANCE = 1e-5


def alone() -> sc.Step:
    return sc.compile(sc.skip_nonfinite() @ sc.ema(0.9) @ ADAM @ sc.clip(1.0) @ sc.accumulate(2) @ dropout())


def dropout() -> sc.Transform:
    return sc.grad(drawing, rng="example")


def on_mesh() -> sc.Step:
    pipeline = ADAM @ sc.noise(0.5) @ sc.accumulate(2) @ sc.shard(sc.dp("data")) @ sc.rows() @ sc.clip(1.0) @ dropout()
    return sc.compile(pipeline, mesh=mesh_of(data=2, model=2))


def sharded(zero: int) -> sc.Step:
    shard = sc.shard(sc.dp("data", zero=zero))  # pyright: ignore[reportArgumentType]
    pipeline = sc.skip_nonfinite() @ ADAM @ sc.clip(1.0) @ sc.accumulate(2) @ shard @ sc.grad(WIDE["over_rows"])
    return sc.compile(pipeline, mesh=mesh_of(data=2))


STEPS: dict[str, Callable[[], sc.Step]] = {
    "alone": alone,
    "on a mesh": on_mesh,
    "zero=1": lambda: sharded(1),
    "zero=3": lambda: sharded(3),
}


def fresh(step: sc.Step, seed: int) -> sc.State:
    return step.init(wide_params() if "zero" in repr(step) else probe_params(), seed=seed)


def batches() -> list[Any]:
    random = np.random.default_rng(0)
    return [
        {name: random.integers(-2, 3, leaf.shape).astype(leaf.dtype) for name, leaf in probe_batch(8).items()}
        for _ in range(NUM_STEPS)
    ]


def stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def by_calls(step: sc.Step, state: sc.State) -> tuple[sc.State, Any]:
    """The state after one call for each batch, and the metrics of all of them."""
    reported = []
    for batch in batches():
        state, metrics = jax.block_until_ready(step(state, batch))
        reported.append(metrics)
    return state, stacked(reported)


def at_rate(state: sc.State, rate: Any) -> sc.State:
    rates = {**state.opt_state.hyperparams, "learning_rate": jnp.asarray(rate, jnp.float32)}
    return replace(state, opt_state=state.opt_state._replace(hyperparams=rates))


@pytest.mark.parametrize("name", STEPS)
def test_scan_is_as_many_calls(name: str) -> None:
    step = STEPS[name]()
    state = fresh(step, seed=1)
    got = jax.jit(lambda state, all_batches: jax.lax.scan(step.function, state, all_batches))(state, stacked(batches()))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert_equal_trees(got, by_calls(step, state), tolerance=TOLERANCE, of="a scan and its calls")


@pytest.mark.parametrize("name", STEPS)
def test_vmap_over_states_is_an_ensemble(name: str) -> None:
    step, seeds = STEPS[name](), range(8)
    states = stacked([fresh(step, seed) for seed in seeds])
    train = jax.jit(jax.vmap(lambda state, all_batches: jax.lax.scan(step.function, state, all_batches), (0, None)))
    got = train(states, stacked(batches()))
    for seed in seeds:
        one = jax.tree.map(lambda leaf, seed=seed: leaf[seed], got)
        assert_equal_trees(
            one, by_calls(step, fresh(step, seed)), tolerance=TOLERANCE, of="an ensemble and its members"
        )


@pytest.mark.parametrize("name", STEPS)
def test_vmap_over_the_learning_rate_is_a_sweep(name: str) -> None:
    step, rates = STEPS[name](), [0.001, 0.01, 0.1]
    state, all_batches = fresh(step, seed=1), stacked(batches())
    got = jax.jit(jax.vmap(lambda rate: jax.lax.scan(step.function, at_rate(state, rate), all_batches)))(
        jnp.array(rates)
    )
    assert np.unique(np.asarray(got[0].params["b"])).size == len(rates)
    for index, rate in enumerate(rates):
        one = jax.tree.map(lambda leaf, index=index: leaf[index], got)
        expected = by_calls(step, at_rate(fresh(step, seed=1), rate))
        assert_equal_trees(one, expected, tolerance=TOLERANCE, of="a sweep and its runs")


def test_member_of_an_ensemble_skips_its_own_step_alone() -> None:
    step = alone()
    each = [batches()[0], {**batches()[0], "x": np.full((8, 3), np.nan, np.float32)}]
    new, metrics = jax.vmap(step.function)(stacked([fresh(step, seed) for seed in (1, 2)]), stacked(each))
    assert metrics["skipped"].tolist() == [0, 1]
    expected, _ = step(fresh(step, 1), each[0])
    assert_equal_trees(
        jax.tree.map(lambda leaf: leaf[0], new.params), expected.params, tolerance=TOLERANCE, of="the first member"
    )
    assert_equal_trees(
        jax.tree.map(lambda leaf: leaf[1], new.params), fresh(step, 2).params, tolerance=0.0, of="the skipped member"
    )


def test_each_step_of_a_scan_reduces_the_gradient_once() -> None:
    pipeline = ADAM @ sc.clip(1.0) @ sc.accumulate(4) @ sc.shard(sc.dp("data")) @ sc.grad(PROBES["over_rows"])
    step = sc.compile(pipeline, mesh=mesh_of(data=8))
    state, all_batches = step.init(probe_params()), stacked([probe_batch(64)] * NUM_STEPS)
    train = jax.jit(lambda state, all_batches: jax.lax.scan(step.function, state, all_batches), donate_argnums=0)
    compiled = train.lower(state, all_batches).compile()
    (row,) = [row for row in sc.inspect.collectives(compiled) if row.kind == "all-reduce"]
    assert (row.executions, row.bytes) == (NUM_STEPS, 4 * (3 + 1 + 1))
    after, _ = train(state, all_batches)
    assert state.params["w"].is_deleted()
    assert int(after.step) == NUM_STEPS


def mean_of_squares(params: Any, rows: Any) -> jax.Array:
    return 0.5 * jnp.mean((params["w"] - rows["x"]) ** 2)


@pytest.mark.parametrize("devices", [None, 4])
def test_gradient_through_training_is_the_derivative_of_its_result(devices: int | None) -> None:
    shard = sc.shard(sc.dp("data")) @ sc.grad(mean_of_squares) if devices else sc.grad(mean_of_squares)
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.5)
    step = sc.compile(sc.update(tx) @ sc.accumulate(2) @ shard, mesh=devices and mesh_of(data=devices))
    state, batch = step.init({"w": np.float32(3.0)}), {"x": np.arange(8, dtype=np.float32)}

    def last_loss(rate: jax.Array) -> jax.Array:
        after, _ = step.function(at_rate(state, rate), batch)
        return step.function(after, batch)[1]["loss"]

    # w' = w - r (w - m), loss = (w' - m)^2 / 2 + a constant: its derivative in r is -(w' - m) (w - m), m = 3.5.
    assert float(jax.jit(jax.grad(last_loss))(jnp.float32(0.25))) == -(0.75 * -0.5) * -0.5


def test_function_of_a_tuned_step_and_of_a_repeated_one_are_their_calls() -> None:
    tuned = sc.compile(ADAM @ sc.accumulate(memory="1 MiB") @ sc.grad(PROBES["over_rows"]))
    repeated = sc.compile(sc.repeat(NUM_STEPS) @ ADAM @ sc.grad(PROBES["over_rows"]))
    for step, batch in ((tuned, batches()[0]), (repeated, stacked(batches()))):
        got = jax.jit(step.function)(step.init(probe_params()), batch)
        assert_equal_trees(got, step(step.init(probe_params()), batch), tolerance=TOLERANCE, of="a function and a call")


def test_function_is_no_trace_of_the_step() -> None:
    step = alone()
    jax.eval_shape(step.function, fresh(step, 1), batches()[0])
    assert step.traces == 0


TRANSFORMATIONS: dict[str, Callable[[sc.Step, sc.State, Any], object]] = {
    "jit": lambda step, state, batch: jax.jit(step)(state, batch),
    "scan": lambda step, state, batch: jax.lax.scan(step, state, stacked([batch] * 2)),
    "vmap": lambda step, state, batch: jax.vmap(step)(stacked([state] * 2), stacked([batch] * 2)),
    "vmap of batches": lambda step, state, batch: jax.vmap(lambda one: step(state, one))(stacked([batch] * 2)),
    "grad": lambda step, state, batch: jax.grad(lambda x: step(state, {**batch, "x": x})[1]["loss"])(batch["x"]),
    "eval_shape": lambda step, state, batch: jax.eval_shape(step, state, batch),
    "jit of nothing": lambda step, state, batch: jax.jit(lambda: step(state, batch))(),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("devices", [None, 2])
def test_call_under_a_transformation_names_the_function(name: str, devices: int | None) -> None:
    shard = sc.shard(sc.dp("data")) @ sc.grad(PROBES["over_rows"]) if devices else sc.grad(PROBES["over_rows"])
    step = sc.compile(ADAM @ shard, mesh=devices and mesh_of(data=devices))
    state = step.init(probe_params())
    with pytest.raises(sc.ConfigError, match=r"step\.function"):
        TRANSFORMATIONS[name](step, state, jax.tree.map(jnp.asarray, probe_batch(8)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    step(state, probe_batch(8))
