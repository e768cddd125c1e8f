"""`grad(loss, wrt=...)`: what is frozen has no gradient, no reduction and no optimizer state, and keeps its place."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import SOURCES, probe_batch, probe_params
from conftest import mesh_of
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import stepc as sc
from stepc._language.state import is_typed_key, leaves_by_path, with_frozen
from stepc.testing import assert_equal_trees, assert_equivalent
from stepc.testing.probes import WIDE, wide_params
from stepc.testing.strategies import batches, meshes, pipelines

SGD = sc.update(optax.sgd(0.5))
DATA = sc.shard(sc.dp("data"))
FROZEN = SOURCES["on_frozen"]
LEVELS = {
    "0": sc.dp("data"),
    "1": sc.dp("data", zero=1),
    "2": sc.dp("data", zero=2),
    "3": sc.dp("data", zero=3),
    "3_microbatch": sc.dp("data", zero=3, gather="microbatch"),
    "3_layer": sc.dp("data", zero=3, gather="layer"),
    "3_layer_step": sc.dp("data", zero=3, gather=("layer", "step")),
}


def loss(params: Any, rows: Any) -> jax.Array:
    return jnp.mean((jnp.matmul(rows["x"], params["w"]) + params["b"] - rows["y"]) ** 2)


def numbers(tree: Any) -> Any:
    return jax.tree.map(np.asarray, jax.device_get(tree))


def test_frozen_leaf_stays_and_is_in_no_norm() -> None:
    step = sc.compile(SGD @ sc.clip(1.0) @ sc.accumulate(2) @ sc.grad(loss, wrt="b"))
    state, metrics = step(step.init(probe_params()), probe_batch(16))
    batch, (w, b) = probe_batch(16), (probe_params()["w"], probe_params()["b"])
    slope = 2 * np.mean(batch["x"] @ w + b - batch["y"])
    # The norm of the gradient is that of `b` alone, so it is clipped to 1 whatever the gradient of `w` would be.
    assert float(metrics["grad_norm"]) == pytest.approx(abs(slope))
    assert float(state.params["b"]) == pytest.approx(b - 0.5 * np.sign(slope) * min(1.0, abs(slope)))
    np.testing.assert_array_equal(state.params["w"], w)


def test_optimizer_and_average_have_the_trained_leaves_alone() -> None:
    step = sc.compile(sc.ema(0.5) @ sc.update(optax.adam(0.1)) @ FROZEN)
    state = step.init(probe_params(FROZEN))
    paths = [path for path, _ in leaves_by_path((state.opt_state, state.slots))]
    assert paths == ["0/0/count", "0/0/mu/b", "0/0/mu/w", "0/0/nu/b", "0/0/nu/w", "1/ema/b", "1/ema/w"]
    assert state.slots["ema"]["base"] == {"codes": None, "key": None, "on": None}


def test_optimizer_is_given_none_in_the_place_of_what_is_frozen() -> None:
    seen: list[Any] = []

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        seen.append((grads["base"], params["base"]))
        return grads, state

    step = sc.compile(sc.update(optax.GradientTransformation(lambda params: (), update)) @ FROZEN)
    step(step.init(probe_params(FROZEN)), probe_batch(8))
    nothing = {"codes": None, "key": None, "on": None}
    assert seen == [(nothing, nothing)]


@pytest.mark.parametrize("around", [None, sc.skip_nonfinite(), sc.repeat(3), sc.ema(0.5)], ids=str)
@pytest.mark.parametrize("devices", [1, 8])
def test_frozen_leaves_are_aliased_and_never_copied(around: Any, devices: int) -> None:
    def large(params: Any, rows: Any) -> jax.Array:
        return jnp.mean((jnp.matmul(rows["x"], params["w"]) * params["base"].astype(jnp.float32).sum()) ** 2)

    inner = sc.update(optax.adam(1e-3)) @ sc.clip(1.0) @ sc.accumulate(2) @ DATA @ sc.grad(large, wrt="w")
    step = sc.compile(around @ inner if around else inner, mesh=mesh_of(data=devices))
    batch = probe_batch(32)
    if step.steps_per_call > 1:
        batch = jax.tree.map(lambda leaf: np.stack([leaf] * 3), batch)
    state = step.init({"w": np.ones(3, np.float32), "base": np.ones((7, 1000), np.int8)})
    compiled = step.lower(state, batch).compile()
    assert {leaf.path: leaf.aliased for leaf in compiled.donated()}["params/base"]
    assert not re.findall(r"= s8\[7,1000\]\S* copy\(", compiled.hlo())


@pytest.mark.parametrize("level", LEVELS)
def test_reduced_bytes_are_those_of_the_trained_leaves(level: str) -> None:
    pipeline = SGD @ sc.accumulate(2) @ sc.shard(LEVELS[level]) @ sc.grad(WIDE["over_rows"], wrt=("out", "b"))
    step = sc.compile(pipeline, mesh=mesh_of(data=8))
    rows = step.lower(step.init(wide_params(deep=jnp.int8)), probe_batch(32)).compile().collectives()
    reduced = sum(row.bytes * row.executions for row in rows if row.kind in ("all-reduce", "reduce-scatter"))
    out, b, reported = 16 * 4, 4, 4
    if level == "0":
        assert reduced == out + b + reported
    assert reduced <= 2 * (out + b + reported)  # `deep/w` has 192 elements
    # The base of 192 bytes is gathered as it is, in 8 bits.
    gathered = {row.bytes for row in rows if row.kind == "all-gather"}
    assert (192 in gathered) == level.startswith("3")
    assert 4 * 192 not in gathered


@pytest.mark.parametrize("level", LEVELS)
def test_levels_equal_the_reference_with_a_frozen_base(level: str) -> None:
    data, tp = sc.shard(LEVELS[level]), sc.shard(sc.tp({"deep/*": P("model")}, default=P()))
    for mesh, transforms, num_rows in (
        (mesh_of(data=8), sc.accumulate(2) @ data, 32),
        (mesh_of(data=2, model=2), data @ sc.accumulate(3) @ tp, 48),
    ):
        step = sc.compile(sc.ema(0.5) @ SGD @ transforms @ sc.grad(WIDE["in_order"], wrt=("out", "b")), mesh=mesh)
        state = step.init(wide_params(deep=jnp.int8))
        spec = {path: leaf.sharding.spec for path, leaf in leaves_by_path(state.params)}["deep/w"]
        assert ("data" in spec) == level.startswith("3")
        assert ("model" in spec) == ("model" in mesh.shape)
        # Three microbatches make thirds, which are not exact; the rest is compared bitwise.
        assert_equivalent(step, state, probe_batch(num_rows), tolerance=1e-5 if num_rows == 48 else 0.0)


@settings(max_examples=15)
@given(data=st.data())
def test_random_sharded_pipeline_with_a_frozen_base_equals_its_reference(data: st.DataObject) -> None:
    mesh = data.draw(meshes(axes=data.draw(st.sampled_from([("data",), ("data", "model")]))))
    axes = {name: size for name, size in mesh.shape.items() if name != "model"}
    wrt = data.draw(st.sampled_from([("out", "b"), ("b",), ("out",)]))
    gradient = sc.grad(WIDE[data.draw(st.sampled_from(list(WIDE)))], wrt=wrt)
    pipeline = data.draw(pipelines(axes=axes, loss=loss))
    pipeline = sc.Pipeline((*pipeline.transforms[:-1], gradient))
    step = sc.compile(pipeline, mesh=mesh)
    assert_equivalent(
        step, step.init(wide_params(deep=jnp.int8)), data.draw(batches(pipeline, axes=axes)), tolerance=1e-3
    )


def test_diagnostics_and_nan_of_a_frozen_leaf_do_not_mix() -> None:
    step = sc.compile(sc.skip_nonfinite() @ SGD @ sc.grad(lambda p, rows: loss(p, rows), wrt="w"))
    state = step.init({**probe_params(), "never": np.array(np.nan, np.float32)})
    _, metrics, diagnostics = step.step_with_diagnostics(state, probe_batch(8))
    assert int(metrics["skipped"]) == 0
    assert diagnostics.paths == ("w",)


def test_cast_asks_the_trained_parameters_for_float32_and_no_others() -> None:
    params = {**probe_params(), "b": np.asarray(1.0, jnp.bfloat16)}
    step = sc.compile(SGD @ sc.grad(sc.cast(jnp.bfloat16) @ loss, wrt="w"))
    state = step.init(params)
    assert_equivalent(step, state, probe_batch(8), tolerance=1e-2)
    assert state.params["b"].dtype == jnp.bfloat16
    narrow = sc.compile(SGD @ sc.grad(sc.cast(jnp.bfloat16) @ loss))
    with pytest.raises(sc.ConfigError, match="`b` is bfloat16, expected float32"):
        narrow(narrow.init(params), probe_batch(8))


def test_plan_says_what_is_frozen() -> None:
    step = sc.compile(SGD @ FROZEN)
    plan = step.lower(step.init(probe_params(FROZEN)), probe_batch(8)).plan
    assert [leaf.path for leaf in plan.frozen] == ["params/base/codes", "params/base/key", "params/base/on"]
    assert "3 leaves, 12 bytes: no gradient" in str(plan)
    assert plan.accumulator == ((), (3,))


def test_single_pattern_and_a_tuple_of_it_mean_the_same() -> None:
    one, two = (sc.compile(SGD @ sc.grad(loss, wrt=wrt)) for wrt in ("w", ("w",)))
    got = [numbers(step(step.init(probe_params()), probe_batch(8))[0].params) for step in (one, two)]
    assert_equal_trees(got[0], got[1], tolerance=0.0, of="one pattern and a tuple of it")
    assert repr(sc.grad(loss, wrt=("w", "b"))) == 'grad(loss, wrt=("w", "b"))'


@pytest.mark.parametrize("zero", [0, 3])
def test_state_goes_on_where_more_is_trained(zero: int) -> None:
    def pipeline(wrt: Any) -> sc.Pipeline:
        data = sc.shard(sc.dp("data", zero=zero))
        return sc.ema(0.5) @ sc.update(optax.adam(0.1)) @ data @ sc.grad(WIDE["over_rows"], wrt=wrt)

    first = sc.compile(pipeline("out"), mesh=mesh_of(data=4))
    state = first.init(wide_params(), seed=7)
    for seed in range(2):
        state, _ = first(state, probe_batch(16, seed=seed))
    before = numbers(replace(state, rng=jax.random.key_data(state.rng)))
    second = sc.compile(pipeline(("out", "b")), mesh=mesh_of(data=4))
    goes_on = second.init(state.params, like=state)
    after = numbers(replace(goes_on, rng=jax.random.key_data(goes_on.rng)))
    assert int(after.step) == 2
    for name in ("mu", "nu"):
        np.testing.assert_array_equal(
            getattr(after.opt_state[0], name)["out"], getattr(before.opt_state[0], name)["out"]
        )
        assert getattr(after.opt_state[0], name)["b"] == 0
        assert np.any(getattr(after.opt_state[0], name)["out"])
    assert after.opt_state[0].count == 2
    np.testing.assert_array_equal(after.rng, before.rng)
    np.testing.assert_array_equal(after.slots["ema"]["out"], before.slots["ema"]["out"])
    assert after.slots["ema"]["b"] == before.params["b"]
    # The old state is alive, and the new one is no alias of it.
    goes_on, _ = second(goes_on, probe_batch(16))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert np.any(numbers(goes_on.params["b"]) != before.params["b"])
    with pytest.raises(sc.ConfigError, match="`init` was given `like` and `seed`: a state that goes on keeps its own"):
        second.reference.init(state.params, like=state, seed=3)
    # Back again: what is frozen now loses its moments, and `out` keeps its own.
    back = first.init(goes_on.params, like=goes_on)
    np.testing.assert_array_equal(back.opt_state[0].mu["out"], goes_on.opt_state[0].mu["out"])
    assert back.opt_state[0].mu["b"] is None


def test_checkpoint_of_a_frozen_base_goes_on_where_more_is_trained(tmp_path: Path) -> None:
    batches = [probe_batch(16, seed=seed) for seed in range(4)]

    def step_of(wrt: Any) -> sc.Step:
        return sc.compile(sc.update(optax.adam(0.1)) @ sc.grad(WIDE["over_rows"], wrt=wrt))

    first, second = step_of("out"), step_of(("out", "b"))
    sc.run(first, first.init(wide_params(), seed=7), batches[:2], checkpoint=sc.Checkpoints(tmp_path, every=2))
    with pytest.raises(sc.ResumeError, match=r"opt_state/0/mu/b +saved nothing, `like` has float32"):
        sc.restore(tmp_path, like=second.init(wide_params()))
    saved = sc.restore(tmp_path, like=first.init(jax.eval_shape(wide_params)))
    state = second.init(saved.params, like=saved)
    assert (int(state.step), int(state.opt_state[0].count)) == (2, 2)
    expected = first.init(wide_params(), seed=7)
    for batch in batches[:2]:
        expected, _ = first(expected, batch)
    expected = second.init(expected.params, like=expected)
    for batch in batches[2:]:
        state, metrics = second(state, batch)
        expected, others = second(expected, batch)
        assert metrics["loss"] == others["loss"]
    jax.tree.map(np.testing.assert_array_equal, numbers(state.params), numbers(expected.params))


def test_reference_goes_on_as_the_step_does() -> None:
    first, second = (sc.compile(sc.update(optax.adam(0.1)) @ sc.grad(loss, wrt=wrt)) for wrt in ("w", "**"))
    state, _ = first(first.init(probe_params()), probe_batch(8))
    got, expected = (one.init(state.params, like=state) for one in (second, second.reference))
    assert_equal_trees(got, expected, tolerance=0.0, of="the states")
    assert_equivalent(second, got, probe_batch(8))


WRONG = {
    "frozen leaves that are not the state's": lambda trained, params, wrt: with_frozen(
        trained, jax.tree.map(lambda leaf: leaf if is_typed_key(leaf) else jnp.zeros_like(leaf), params), wrt
    ),
    "trained leaves that stay": lambda trained, params, wrt: params,
}


@pytest.mark.parametrize("name", WRONG)
def test_probe_catches_a_wrong_variant(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepc._compiler.lowering.with_frozen", WRONG[name])
    step = sc.compile(SGD @ sc.accumulate(2) @ FROZEN)
    with pytest.raises(sc.EquivalenceError):
        assert_equivalent(step, step.init(probe_params(FROZEN)), probe_batch(8))
