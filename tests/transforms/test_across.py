"""Losses of the whole batch: the head is given what the encoder makes of every row, whatever the split is."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import AXES, EXACT, LOSSES, ROUNDED, SAMPLES, WHOLE, probe_batch, probe_model_state, probe_params
from conftest import mesh_of
from jax.sharding import PartitionSpec as P

import stepc as sc
from stepc._compiler import lowering
from stepc._compiler.normalize import normalize
from stepc._compiler.validation import bind
from stepc._core.laws import LAWS
from stepc._language.encoded import Encoded
from stepc._language.pipeline import expand_transforms
from stepc._language.transforms import grad as grad_module
from stepc.errors import EquivalenceError
from stepc.testing import assert_equal_trees, assert_equivalent
from stepc.testing.evaluate import evaluate
from stepc.testing.probes import Evaluating, encoding, over_pairs, wide, wide_params
from stepc.testing.transforms import compared_leaves, evaluation_state

SGD = sc.update(optax.sgd(0.5))
DATA = sc.shard(sc.dp("data"))
ROWS = 32
WIDE_SOURCE = sc.grad(sc.across(wide(over_pairs)) @ wide(encoding))
LEVELS: dict[str, dict[str, Any]] = {
    "zero0": {}, "zero1": {"zero": 1}, "zero2": {"zero": 2}, "zero3": {"zero": 3},
    "zero3_microbatch": {"zero": 3, "gather": "microbatch"}, "zero3_layer": {"zero": 3, "gather": "layer"},
    "zero3_layer_step": {"zero": 3, "gather": ("layer", "step")},
}  # fmt: skip


def fresh(step: Any, source: Any, num_rows: int) -> sc.State:
    return step.init(probe_params(), seed=3, model_state=probe_model_state(source, num_rows))


def gradient_of(step: sc.Step, params: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    """What `update(optax.sgd(1.0))` subtracted."""
    state, metrics = step(step.init(params), batch)
    return jax.device_get((jax.tree.map(lambda old, new: old - new, params, state.params), metrics))


# The meaning, and that it does not depend on the split.


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_gradient_is_that_of_the_head_of_the_whole_batch(k: int, devices: int) -> None:
    params, batch = jax.tree.map(jnp.asarray, (probe_params(), probe_batch(k * devices * 2)))
    value, grads = jax.value_and_grad(lambda params: over_pairs(params, encoding(params, batch)))(params)
    for middle in (sc.accumulate(k) @ DATA, DATA @ sc.accumulate(k)):
        step = sc.compile(sc.update(optax.sgd(1.0)) @ middle @ WHOLE["whole"], mesh=mesh_of(data=devices))
        got, metrics = gradient_of(step, params, batch)
        # Whole numbers, but for a division by three and a subtraction from the parameters.
        assert_equal_trees(got, grads, tolerance=1e-5, of=f"k={k} on {devices} devices")
        assert np.allclose(metrics["loss"], value, rtol=1e-6)


@pytest.mark.parametrize("source", WHOLE)
def test_split_changes_nothing_of_a_loss_of_the_whole_batch(source: str) -> None:
    if source == "whole_recurrent":
        return  # its encoder reads the model state, which the calls hand on
    step = sc.compile(SGD @ sc.accumulate(4) @ DATA @ WHOLE[source], mesh=mesh_of(data=4))
    sc.testing.assert_split_invariant(step, fresh(step, WHOLE[source], ROWS), probe_batch(ROWS))


# The ladder.


@pytest.mark.parametrize(
    "source", [one if one == "whole_terms" else pytest.param(one, marks=pytest.mark.long) for one in WHOLE]
)
@pytest.mark.parametrize("name", [name for name in (*EXACT, *ROUNDED) if name != "rows"])
def test_expansion_equals_the_reference(name: str, source: str) -> None:
    transform, replica = SAMPLES[name], sc.shard(sc.dp("replica"))
    batch = jax.tree.map(jnp.asarray, probe_batch(ROWS))
    for middle in (transform, sc.accumulate(2) @ transform @ replica):
        pipeline = SGD @ middle @ WHOLE[source]
        reference = sc.reference(pipeline, axes=AXES)
        given = probe_params(), probe_model_state(WHOLE[source], ROWS)
        params, model_state = jax.tree.map(jnp.asarray, given)
        state = reference.init(params, seed=3, model_state=model_state)
        after, metrics = reference(state, batch)
        evaluated = evaluate(bind(expand_transforms(pipeline.transforms), AXES), evaluation_state(state), batch)
        expected = (compared_leaves(evaluation_state(after)), metrics)
        # The evaluator sums the products of each call, in another order; and does not narrow.
        tolerance = 2e-2 if name == "accumulate_narrow" else 1e-5
        assert_equal_trees(
            (compared_leaves(evaluated[0]), evaluated[1]), expected, tolerance=tolerance, of=repr(middle)
        )


@pytest.mark.parametrize(("k", "devices"), [(1, 1), (8, 1), (1, 8), (2, 8), (8, 2)])
@pytest.mark.parametrize("source", ["whole", "whole_drawn"])
def test_lowered_equals_the_core_bitwise_with_and_without_laws(source: str, k: int, devices: int) -> None:
    mesh, batch = mesh_of(data=devices), probe_batch(64)
    for pipeline in (SGD @ sc.accumulate(k) @ DATA @ WHOLE[source], SGD @ DATA @ sc.accumulate(k) @ WHOLE[source]):
        expected: Any = None
        for laws in (LAWS, ()):
            step = sc.Step(pipeline, mesh, normalize(pipeline.transforms, mesh, laws))
            state = fresh(step, WHOLE[source], 64)
            if expected is None:
                before, rows = jax.device_put((state, jax.tree.map(jnp.asarray, batch)), jax.devices()[0])
                evaluated, metrics = evaluate(step.normal_form.core, evaluation_state(before), rows)
                expected = jax.device_get((compared_leaves(evaluated), metrics))
            after, metrics = step(state, batch)
            got = (compared_leaves(evaluation_state(after)), metrics)
            assert_equal_trees(got, expected, tolerance=0.0, of=f"{pipeline!r}, laws {bool(laws)}")


MIDDLES: dict[str, Any] = {
    "clip_outside": sc.clip(1.0) @ sc.accumulate(2) @ DATA,
    "clip_between": sc.accumulate(2) @ sc.clip(1.0) @ DATA @ sc.accumulate(2),
    "two_axes": sc.accumulate(2) @ sc.shard(sc.dp("replica")) @ DATA,
    "clip_on_an_axis": sc.shard(sc.dp("replica")) @ sc.clip(1.0) @ DATA @ sc.accumulate(2),
    "sam_outside": sc.sam(0.125) @ sc.accumulate(2) @ DATA,
    "sam_between": sc.accumulate(2) @ sc.sam(0.125) @ DATA @ sc.accumulate(2),
    "loss_scale": sc.loss_scale(initial=8.0) @ sc.accumulate(2) @ DATA,
    "scales": sc.scale(0.5) @ sc.accumulate(2) @ sc.scale(-2.0) @ DATA,
}  # fmt: skip


@pytest.mark.parametrize("middle", MIDDLES)
@pytest.mark.parametrize("source", WHOLE)
def test_compiled_step_equals_its_reference(source: str, middle: str) -> None:
    step = sc.compile(SGD @ MIDDLES[middle] @ WHOLE[source], mesh=mesh_of(data=2, replica=2))
    assert_equivalent(step, fresh(step, WHOLE[source], ROWS), probe_batch(ROWS))


@pytest.mark.parametrize("optimizer", [Evaluating(), optax.lbfgs(), optax.adamw(1e-2)], ids=["here", "lbfgs", "adamw"])
def test_optimizer_may_ask_for_the_loss_of_the_whole_batch(optimizer: Any) -> None:
    for name in ("whole", "whole_terms"):
        step = sc.compile(sc.update(optimizer) @ sc.accumulate(2) @ DATA @ WHOLE[name], mesh=mesh_of(data=4))
        # A line search compares rounded values; a wrong evaluation is off by more.
        tolerance = 1e-3 if optimizer != Evaluating() else 1e-5
        assert_equivalent(step, fresh(step, WHOLE[name], ROWS), probe_batch(ROWS), tolerance=tolerance)


@pytest.mark.parametrize("middle", MIDDLES)
def test_head_is_given_the_rows_whose_value_is_taken_wherever_the_loss_is_evaluated(middle: str) -> None:
    source = WHOLE["whole_recurrent"]
    step = sc.compile(sc.update(Evaluating()) @ MIDDLES[middle] @ source, mesh=mesh_of(data=2, replica=2))
    assert_equivalent(step, fresh(step, source, ROWS), probe_batch(ROWS))


OUTSIDE: dict[str, Any] = {
    "skip": sc.skip_nonfinite(limit=3), "ema": sc.ema(0.5), "both": sc.skip_nonfinite() @ sc.ema(0.5),
    "repeat": sc.repeat(2),
}  # fmt: skip


@pytest.mark.parametrize("outside", OUTSIDE)
def test_transforms_of_steps_stand_outside(outside: str) -> None:
    step = sc.compile(OUTSIDE[outside] @ SGD @ sc.accumulate(2) @ DATA @ WHOLE["whole_terms"], mesh=mesh_of(data=2))
    batch = probe_batch(ROWS)
    if outside == "repeat":
        batch = jax.tree.map(lambda leaf: np.stack([leaf] * 2), batch)
    assert_equivalent(step, fresh(step, WHOLE["whole_terms"], ROWS), batch)


@pytest.mark.parametrize("name", LOSSES)
def test_transforms_of_the_encoder_stand_on_its_right(name: str) -> None:
    step = sc.compile(
        SGD @ sc.accumulate(2) @ DATA @ sc.grad(sc.across(over_pairs) @ SAMPLES[name] @ encoding), mesh=mesh_of(data=2)
    )
    # 8 or 11 bits; the sums over pairs cancel.
    tolerance = 1e-1 if name.startswith("cast") else 1e-5
    assert_equivalent(step, step.init(probe_params()), probe_batch(ROWS), tolerance=tolerance)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("level", LEVELS)
def test_levels_equal_the_reference_bitwise(level: str, k: int) -> None:
    for mesh in (mesh_of(data=8), mesh_of(data=2, replica=4), mesh_of(data=4, model=2)):
        data = sc.shard(sc.dp("data", **LEVELS[level]))
        if "model" in mesh.shape:
            data = sc.shard(sc.dp("data", **LEVELS[level]), sc.tp({"deep/*": P("model")}, default=P()))
        momentum = sc.update(optax.sgd(0.5, momentum=0.5))
        step = sc.compile(momentum @ sc.accumulate(k) @ data @ WIDE_SOURCE, mesh=mesh)
        assert_equivalent(step, step.init(wide_params()), probe_batch(32), tolerance=0.0)


@pytest.mark.parametrize("level", LEVELS)
def test_levels_equal_the_reference_where_the_optimizer_evaluates(level: str) -> None:
    data = sc.shard(sc.dp("data", **LEVELS[level]))
    step = sc.compile(sc.update(Evaluating()) @ sc.accumulate(2) @ data @ WIDE_SOURCE, mesh=mesh_of(data=4))
    assert_equivalent(step, step.init(wide_params()), probe_batch(32))


@pytest.mark.parametrize("level", ["zero1", "zero2", "zero3", "zero3_microbatch", "zero3_layer", "zero3_layer_step"])
def test_levels_equal_the_reference_under_clip_and_sam(level: str) -> None:
    data = sc.shard(sc.dp("data", **LEVELS[level]))
    for middle in (sc.clip(1.0) @ sc.accumulate(2) @ data, sc.sam(0.125) @ sc.accumulate(2) @ data):
        step = sc.compile(SGD @ middle @ WIDE_SOURCE, mesh=mesh_of(data=4))
        assert_equivalent(step, step.init(wide_params()), probe_batch(32))


def test_rows_that_xla_splits_are_one_batch_too() -> None:
    pipeline = SGD @ sc.accumulate(2) @ sc.shard(sc.dp("data"), mode="auto") @ WHOLE["whole"]
    step = sc.compile(pipeline, mesh=mesh_of(data=4))
    assert_equivalent(step, step.init(probe_params()), probe_batch(ROWS))


def test_frozen_parameters_and_reads_reach_the_encoder() -> None:
    def encode(params: Any, rows: Any, *, ema: Any, step: Any) -> Any:
        z = encoding({"w": params["w"] + params["base"].astype(jnp.float32), "b": params["b"]}, rows)
        return {**z, "target": jnp.matmul(rows["x"], ema["w"]) + step.astype(jnp.float32)}

    def head(params: Any, z: Any) -> jax.Array:
        scale = 1.0 + params["base"][0].astype(jnp.float32)
        return over_pairs(params, z) * scale + jnp.mean((z["a"] - z["target"]) ** 2)

    source = sc.grad(sc.across(head) @ encode, wrt=("w", "b"), reads=("ema", "step"))
    step = sc.compile(sc.ema(0.5) @ SGD @ sc.accumulate(2) @ DATA @ source, mesh=mesh_of(data=2))
    state = step.init({**probe_params(), "base": np.array([1, -1, 2], np.int8)})
    for seed in range(2):
        assert_equivalent(step, state, probe_batch(ROWS, seed=seed))
        state, _ = step(state, probe_batch(ROWS, seed=seed))


def test_memory_picks_the_number_of_microbatches() -> None:
    step = sc.compile(SGD @ sc.accumulate(memory="1MiB") @ DATA @ WHOLE["whole"], mesh=mesh_of(data=2))
    assert_equivalent(step, step.init(probe_params()), probe_batch(ROWS))


def test_head_inside_of_a_clip_sees_its_microbatch_alone() -> None:
    inside = sc.compile(SGD @ sc.accumulate(2) @ sc.clip(1e6) @ WHOLE["whole"])
    outside = sc.compile(SGD @ sc.clip(1e6) @ sc.accumulate(2) @ WHOLE["whole"])
    params, batch = jax.tree.map(jnp.asarray, (probe_params(), probe_batch(ROWS)))

    def loss_of(rows: Any) -> Any:
        return over_pairs(params, encoding(params, rows))

    halves = [loss_of(jax.tree.map(lambda leaf, j=j: leaf[j::2], batch)) for j in range(2)]
    assert inside(inside.init(params), batch)[1]["loss"] == sum(halves) / 2
    assert outside(outside.init(params), batch)[1]["loss"] == loss_of(batch)


def test_encoder_that_fails_in_one_microbatch_is_found() -> None:
    def encode(params: Any, rows: Any) -> Any:
        return {"a": jnp.where(rows["y"] > 99, jnp.nan, jnp.matmul(rows["x"], params["w"]) + params["b"])}

    step = sc.compile(SGD @ sc.accumulate(4) @ sc.grad(sc.across(lambda params, z: jnp.mean(z["a"]) ** 2) @ encode))
    batch = probe_batch(16)
    batch["y"][6] = 100
    _, _, diagnostics = step.step_with_diagnostics(step.init(probe_params()), batch)
    assert not diagnostics.finite
    assert dict(diagnostics.describe())["microbatches"] == "2 (of 4, counted from 0)"


def mean_of_squares(params: Any, z: Any) -> jax.Array:
    return jnp.mean(z.astype(jnp.float32)) ** 2 + params["b"]


FORMS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "one array": (mean_of_squares, lambda p, rows: jnp.matmul(rows["x"], p["w"]), {}),
    "bfloat16": (mean_of_squares, lambda p, rows: jnp.matmul(rows["x"], p["w"]).astype(jnp.bfloat16), {}),
    "several axes": (mean_of_squares, lambda p, rows: rows["x"][:, :, None] * p["w"][None, None, :], {}),
    "no rows": (
        lambda p, z: (z["t"].value * z["u"].value).sum() + p["b"],
        lambda p, rows: {"t": sc.Sum(jnp.matmul(rows["x"], p["w"]).sum()), "u": sc.Mean(rows["x"].sum(axis=0), 4)},
        {},
    ),
    "a leaf that is not used": (
        mean_of_squares_of_a := lambda p, z: mean_of_squares(p, z["a"]),
        lambda p, rows: {"a": jnp.matmul(rows["x"], p["w"]), "b": rows["x"] * p["w"][None], "on": rows["y"] > 0},
        {},
    ),
    "a key for each call": (
        mean_of_squares_of_a,
        lambda p, rows, key: {"a": jnp.matmul(rows["x"] * jax.random.normal(key, (3,))[None], p["w"])},
        {"rng": "microbatch"},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_encoder_returns_what_it_likes(form: str) -> None:
    head, encode, options = FORMS[form]
    source = sc.grad(sc.across(head) @ encode, **options)
    step = sc.compile(SGD @ sc.accumulate(2) @ DATA @ source, mesh=mesh_of(data=4))
    assert_equivalent(
        step, step.init(probe_params()), probe_batch(ROWS), tolerance=1e-2 if form == "bfloat16" else 1e-5
    )


def test_step_is_a_function_of_its_state_under_scan_and_vmap() -> None:
    step = sc.compile(SGD @ sc.accumulate(2) @ DATA @ WHOLE["whole_terms"], mesh=mesh_of(data=2))
    batches = [probe_batch(ROWS, seed=seed) for seed in range(2)]
    states = [step.init(jax.tree.map(lambda leaf, by=by: leaf * by, probe_params())) for by in (1, 2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    several = jax.jit(jax.vmap(lambda state: jax.lax.scan(step.function, state, stacked)))
    got = jax.device_get(several(together)[0].params)
    for number, state in enumerate(states):
        for batch in batches:
            state, _ = step(state, batch)
        one = jax.tree.map(lambda leaf, number=number: leaf[number], got)
        assert_equal_trees(one, jax.device_get(state.params), tolerance=1e-5, of="the members and each alone")


USES: dict[str, tuple[Any, str]] = {
    "alone": (encoding, "encoder"),
    "normalised": (
        lambda p, rows: {"a": (rows["x"] - rows["x"].mean(axis=0, keepdims=True)) ** 2 * p["w"][None]},
        "couples",
    ),
    "sum of means": (lambda p, rows: {"a": sc.Sum(jnp.mean(jnp.matmul(rows["x"], p["w"])))}, "encoder mean"),
    "mean of means": (lambda p, rows: {"a": sc.Mean(jnp.mean(jnp.matmul(rows["x"], p["w"])), 1)}, "encoder"),
    "in order": (lambda p, rows: {"a": jnp.arange(len(rows["x"])) * jnp.matmul(rows["x"], p["w"])}, "place"),
}


@pytest.mark.parametrize("use", USES)
def test_plan_says_what_the_encoder_does_with_its_rows(use: str) -> None:
    encode, kind = USES[use]

    def head(params: Any, z: Any) -> jax.Array:
        values = jax.tree.map(lambda one: getattr(one, "value", one), z, is_leaf=lambda one: hasattr(one, "value"))
        leaves = [leaf.astype(jnp.float32).mean() for leaf in jax.tree.leaves(values)]
        return sum(leaves, start=jnp.float32(0.0)) ** 2 + params["b"]

    step = sc.compile(SGD @ sc.accumulate(4) @ sc.grad(sc.across(head) @ encode))
    state = step.init(probe_params())
    ((_, found),) = step.lower(state, probe_batch(ROWS)).plan.losses
    assert found.kind == kind
    if found.depends_on_split:
        with pytest.raises(EquivalenceError, match="is not that of the whole batch"):
            sc.testing.assert_split_invariant(step, state, probe_batch(ROWS))
    else:
        sc.testing.assert_split_invariant(step, state, probe_batch(ROWS))


# Wrong variants, which the ladder must catch.


def _without_order(calls: Any, numbers: Any) -> Encoded:
    rows = tuple(jnp.concatenate(leaves) for leaves in zip(*(call.rows for call in calls), strict=True))
    return Encoded(rows, tuple(sum(leaves) for leaves in zip(*(call.sums for call in calls), strict=True)))


@pytest.mark.parametrize("middle", [sc.accumulate(4), sc.accumulate(2) @ DATA])
def test_reference_that_leaves_the_rows_in_the_order_of_the_calls_is_caught(
    middle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grad_module, "join_calls", _without_order)
    step = sc.compile(SGD @ middle @ WHOLE["whole"], mesh=mesh_of(data=2))
    with pytest.raises(EquivalenceError):
        assert_equivalent(step, step.init(probe_params()), probe_batch(ROWS))


def _rotated(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(instruction: Any, encoded: Any, region: Any) -> Any:
        rows, sums = right(instruction, encoded, region)
        return Encoded(tuple(jnp.roll(leaf, leaf.shape[0] // 2, axis=0) for leaf in rows), sums)

    return wrong


def _with_local_sums(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda instruction, encoded, region: Encoded(right(instruction, encoded, region).rows, encoded.sums)


def _without_the_head(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda instruction, microbatch, inputs, region: right(
        instruction, microbatch, replace(inputs, head_grads={}), region
    )


def _head_in_every_call(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(instruction: Any, microbatch: Any, inputs: Any, region: Any) -> Any:
        whole = jax.tree.map(lambda leaf: leaf / float(instruction.count), inputs.head_grads)
        return right(instruction, microbatch, replace(inputs, head_grads=whole), region)

    return wrong


def _cotangents_reversed(right: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(instruction: Any, microbatch: Any, inputs: Any, region: Any) -> Any:
        cotangents = tuple(leaf[::-1] for leaf in microbatch.cotangents)
        return right(instruction, replace(microbatch, cotangents=cotangents), inputs, region)

    return wrong


def _on_every_device(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda accumulators, is_first: accumulators


WRONG: dict[str, tuple[str, Callable[..., Any]]] = {
    "the rows of devices change places": ("gather_encoded", _rotated),
    "sums stay local": ("gather_encoded", _with_local_sums),
    "the gradient of the head itself is lost": ("_pull_back", _without_the_head),
    "it is added once a microbatch": ("_pull_back", _head_in_every_call),
    "cotangents meet other rows": ("_pull_back", _cotangents_reversed),
    "metrics are added on every device": ("reported_once", _on_every_device),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_lowering_is_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, wrong = WRONG[fault]
    step = sc.compile(SGD @ sc.accumulate(2) @ DATA @ WHOLE["whole_terms"], mesh=mesh_of(data=4))
    state = step.init(probe_params())
    assert_equivalent(step, state, probe_batch(ROWS))
    monkeypatch.setattr(lowering, name, wrong(getattr(lowering, name)))
    step = sc.compile(SGD @ sc.accumulate(2) @ DATA @ WHOLE["whole_terms"], mesh=mesh_of(data=4))
    with pytest.raises(EquivalenceError):
        assert_equivalent(step, state, probe_batch(ROWS))


# What it costs.


@pytest.mark.parametrize("k", [2, 8])
def test_z_is_gathered_once_and_the_gradient_reduced_once(k: int) -> None:
    """z is an array of float32 and one of int32, and three sums; the loss is reduced with the gradient."""
    step = sc.compile(SGD @ sc.accumulate(k) @ DATA @ WIDE_SOURCE, mesh=mesh_of(data=4))
    compiled = step.lower(step.init(wide_params()), probe_batch(64)).compile()
    rows = compiled.collectives()
    gathers = [one for one in rows if one.kind == "all-gather"]
    assert sorted(one.bytes for one in gathers) == [64 * 4, 64 * 4 * 4]
    assert all(one.executions == 1 and not one.in_loop for one in rows)
    assert [one.bytes for one in rows if one.parameters.startswith("z of the head/load")] == [3 * 4]
    compiled.check(sc.Budget(gradient_reductions=1, collectives_in_loops=0, collectives=4))
    parameters = sum(leaf.size * 4 for leaf in jax.tree.leaves(wide_params()))
    assert sum(one.bytes for one in gathers) < parameters * 2


def test_one_call_of_the_loss_is_differentiated_at_once() -> None:
    def num_products(pipeline: Any, mesh: Any) -> int:
        step = sc.compile(pipeline, mesh=mesh)
        return str(step.lower(step.init(probe_params()), probe_batch(ROWS)).jaxpr()).count("dot_general")

    def loss(params: Any, rows: Any) -> jax.Array:
        return over_pairs(params, encoding(params, rows))

    assert num_products(SGD @ WHOLE["whole"], None) == num_products(SGD @ sc.grad(loss), None)
    unit = SGD @ sc.accumulate(1) @ DATA @ WHOLE["whole"]
    assert num_products(unit, mesh_of(data=1)) == num_products(SGD @ sc.grad(loss), None)
