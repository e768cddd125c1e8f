"""`alternate`: several steps on one state and one batch, with optimizers of their own."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import AXES, KINDS_OF_SOURCES, PROBES, probe_batch, probe_model_state
from conftest import mesh_of
from jax.sharding import PartitionSpec as P

import stepc as sc
from stepc._compiler import lowering
from stepc._compiler.validation import bind
from stepc._language.pipeline import expand_transforms
from stepc.testing import assert_equal_trees, assert_equivalent
from stepc.testing.evaluate import evaluate
from stepc.testing.probes import drawing, probe_params
from stepc.testing.transforms import compared_leaves, evaluation_state

SGD, MOMENTUM = sc.update(optax.sgd(0.5)), sc.update(optax.sgd(0.25, momentum=0.5))
DATA = sc.shard(sc.dp("data"))
HALVES = {"d": jax.tree.map(jnp.asarray, probe_params()), "g": jax.tree.map(lambda leaf: leaf + 1.0, probe_params())}


def on_half(loss: Callable[..., Any], own: str, other: str) -> Callable[..., Any]:
    """A probe of the sum of both halves: each turn sees what the other has changed."""

    def half(params: Any, rows: Any, *more: Any, **read: Any) -> Any:
        return loss(jax.tree.map(lambda one, two: one + 2 * two, params[own], params[other]), rows, *more, **read)

    half.__name__ = f"{getattr(loss, '__name__', 'probe')}_{own}"
    return half


def turn(own: str, *transforms: sc.Transform, source: Any = None, update: sc.Transform = SGD) -> sc.Pipeline:
    source = sc.grad(drawing, rng="example") if source is None else source
    other = "g" if own == "d" else "d"
    loss: Any = source.loss
    if isinstance(loss, sc.Pipeline):  # a loss of the whole batch: a head of an encoder
        head, encoder = (on_half(function, own, other) for function in functions_of(loss))
        loss = sc.across(head) @ encoder
    else:
        loss = on_half(loss.value, own, other)
    gradient: Any = sc.grad(
        loss, wrt=f"{own}/**", rng=source.rng, has_aux=source.has_aux, model_state=source.model_state
    )
    for transform in reversed(transforms):
        gradient = transform @ gradient
    return update @ gradient


def functions_of(loss: Any) -> tuple[Any, Any]:
    head, encoder = loss.transforms
    return head.head.value, encoder.loss.value


def both(*transforms: sc.Transform, source: Any = None, **options: Any) -> sc.Transform:
    return sc.alternate(
        d=turn("d", *transforms, source=source), g=turn("g", *transforms, source=source, update=MOMENTUM), **options
    )


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("k", [1, 2, 8])
def test_turns_equal_their_reference(devices: int, k: int) -> None:
    pipeline = sc.skip_nonfinite() @ sc.ema(0.5) @ both(sc.accumulate(k), DATA, every={"g": 2})
    step = sc.compile(pipeline, mesh=mesh_of(data=devices))
    state = step.init(HALVES, seed=3)
    for number in range(2):
        assert_equivalent(step, state, probe_batch(64, seed=number))
        state, _ = step(state, probe_batch(64, seed=number))
    assert step.traces == 1


def start(step: sc.Step, source: Any, num_rows: int = 32) -> sc.State:
    return step.init(halves_of(source), seed=3, model_state=probe_model_state(source, num_rows))


def halves_of(source: Any) -> Any:
    return {"d": jax.tree.map(jnp.asarray, probe_params(source)), "g": jax.tree.map(jnp.asarray, probe_params(source))}


# A source that freezes leaves of its own trains all of its half here, which whole numbers cannot be.
SOURCES = {name: source for name, source in KINDS_OF_SOURCES.items() if name != "on_frozen"}


@pytest.mark.parametrize("source", SOURCES)
def test_expansion_of_turns_equals_their_reference(source: str) -> None:
    grad = SOURCES[source]
    pipeline = sc.skip_nonfinite() @ sc.ema(0.5) @ both(sc.accumulate(2), DATA, source=grad, every={"d": 2})
    reference = sc.reference(pipeline, axes=AXES)
    state = reference.init(halves_of(grad), seed=3, model_state=jax.tree.map(jnp.asarray, probe_model_state(grad, 16)))
    program, batch = bind(expand_transforms(pipeline.transforms), AXES), jax.tree.map(jnp.asarray, probe_batch(16))
    evaluated = evaluation_state(state)
    for _ in range(2):
        evaluated, got = evaluate(program, evaluated, batch)
        state, metrics = reference(state, batch)
        expected = (compared_leaves(evaluation_state(state)), metrics)
        # The two add up what a head pulls back in another order, which rounds once parameters are no whole numbers.
        tolerance = 1e-6 if source.startswith("whole") else 0.0
        assert_equal_trees((compared_leaves(evaluated), got), expected, tolerance=tolerance, of=source)


@pytest.mark.parametrize("source", SOURCES)
def test_turns_with_every_probe_equal_their_reference(source: str) -> None:
    grad = SOURCES[source]
    step = sc.compile(both(sc.accumulate(2), DATA, source=grad, every={"d": 2}), mesh=mesh_of(data=2))
    state = start(step, grad)
    for _ in range(2):
        # Sums in another order, and means of counts that are no powers of two.
        assert_equivalent(step, state, probe_batch(32), tolerance=1e-4)
        state, _ = step(state, probe_batch(32))


INSIDE = {
    "clip": (sc.clip(1.0), sc.accumulate(3), DATA),
    "clip_inside": (sc.accumulate(2), sc.clip(1.0), DATA),
    "loss_scale": (sc.clip(1.0), sc.loss_scale(initial=8.0), sc.accumulate(2), DATA),
    "noise": (sc.noise(0.5), DATA),
    "sam": (sc.sam(0.125), sc.accumulate(2), DATA),
    "rows": (DATA, sc.rows(), sc.clip(1.0)),
    "measure": (sc.measure(lambda grads, params: {"size": optax.tree.norm(params)}), DATA),
    **{f"zero{zero}": (sc.clip(1.0), sc.accumulate(2), sc.shard(sc.dp("data", zero=zero))) for zero in (1, 2, 3)},
    "zero3_microbatch": (sc.accumulate(2), sc.shard(sc.dp("data", zero=3, gather="microbatch"))),
    "auto": (sc.accumulate(2), sc.shard(sc.dp("data"), mode="auto")),
}
OUTSIDE = {
    "alone": (),
    "repeat": (sc.repeat(2), sc.skip_nonfinite(), sc.ema(0.5)),
    "epochs": (sc.epochs(2, minibatches=2), sc.ema(0.5, every=2), sc.skip_nonfinite()),
}


def around(outside: tuple[sc.Transform, ...], inner: Any) -> Any:
    for transform in reversed(outside):
        inner = transform @ inner
    return inner


@pytest.mark.parametrize(
    ("inside", "outside"),
    [*((name, "alone") for name in INSIDE), *product(("clip", "loss_scale", "zero2"), ("repeat", "epochs"))],
)
def test_turns_among_other_transforms_equal_their_reference(inside: str, outside: str) -> None:
    step = sc.compile(around(OUTSIDE[outside], both(*INSIDE[inside], every={"g": 2})), mesh=mesh_of(data=4))
    batch = probe_batch(96)
    batch = jax.tree.map(lambda leaf: np.stack([leaf, leaf + 1]), batch) if step.rows_axis else batch
    state = step.init(HALVES, seed=3)
    for _ in range(2):
        # Roots and draws round, and a step more multiplies what is rounded.
        assert_equivalent(step, state, batch, tolerance=1e-4)
        state, _ = step(state, batch)


def test_turns_equal_two_steps_by_hand() -> None:
    optimizers = {"d": optax.adam(0.01), "g": optax.sgd(0.1, momentum=0.9)}
    losses = {own: on_half(PROBES["over_rows"], own, other) for own, other in ("dg", "gd")}
    pipelines = {own: sc.update(optimizers[own]) @ sc.grad(losses[own], wrt=f"{own}/**") for own in "dg"}
    step = sc.compile(sc.ema(0.9) @ sc.alternate(**pipelines, every={"g": 3}))
    params = {"d": HALVES["d"], "g": HALVES["g"]}
    states, average = {own: optimizers[own].init(params[own]) for own in "dg"}, params

    @partial(jax.jit, static_argnums=0)
    def by_hand(own: str, params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        loss, grads = jax.value_and_grad(lambda half: losses[own]({**params, own: half}, batch))(params[own])
        updates, opt_state = optimizers[own].update(grads, opt_state, params[own])
        return {**params, own: optax.apply_updates(params[own], updates)}, opt_state, loss

    state = step.init(HALVES)
    for number in range(1, 7):
        batch, found = probe_batch(16, seed=number), {}
        for own in "dg" if number % 3 == 0 else "d":
            params, states[own], found[f"{own}/loss"] = by_hand(own, params, states[own], batch)
        average = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, average, params)
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], sum(found.values()), rtol=1e-5)
        assert np.isnan(metrics["g/loss"]) == (number % 3 != 0)
        assert int(state.step) == number
    # Sums in another order, and Adam divides by the root of a small number.
    assert_equal_trees((state.params, state.slots["ema"]), (params, average), tolerance=1e-6, of="six steps by hand")
    assert int(state.opt_state["d"][0].count) == 6
    assert_equal_trees(state.opt_state["g"][0].trace["g"], states["g"][0].trace, tolerance=1e-6, of="the momentum")


def test_turn_that_is_not_made_moves_nothing_and_says_nothing() -> None:
    def counting(params: Any, rows: Any, model_state: Any) -> Any:
        total = {"num": model_state["num"] + rows["y"].size}
        return PROBES["over_rows"](params["g"], rows), {"rows": sc.Sum(jnp.int32(rows["y"].size))}, total

    g = sc.ema(0.5) @ sc.update(optax.adam(0.1)) @ sc.grad(counting, wrt="g/**", has_aux=True, model_state=True)
    step = sc.compile(sc.alternate(d=turn("d"), g=g, every={"g": 2}))
    state = step.init(HALVES, model_state={"num": np.float32(0)})
    before = jax.device_get(state)
    state, metrics = step(state, probe_batch(8))
    own = {
        "params": state.params["g"],
        "opt": state.opt_state["g"],
        "ema": state.slots["g/ema"],
        "num": state.model_state,
    }
    was = {
        "params": before.params["g"],
        "opt": before.opt_state["g"],
        "ema": before.slots["g/ema"],
        "num": before.model_state,
    }
    assert_equal_trees(own, was, tolerance=0.0, of="the turn that was not made")
    assert np.isnan(metrics["g/loss"])
    assert int(metrics["g/rows"]) == 0
    assert metrics["loss"] == metrics["d/loss"]
    state, metrics = step(state, probe_batch(8))
    assert int(metrics["g/rows"]) == 8
    assert float(state.model_state["num"]) == 8
    assert int(state.opt_state["g"][0].count) == 1
    assert metrics["loss"] == metrics["d/loss"] + metrics["g/loss"]


def test_turns_draw_apart_and_not_by_their_order() -> None:
    def drawn(params: Any, rows: Any, key: jax.Array) -> Any:
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)), {"drawn": jax.random.uniform(key)}

    one = {name: SGD @ sc.grad(drawn, wrt=f"{name}/**", rng="microbatch", has_aux=True) for name in "dg"}
    steps = [sc.compile(sc.alternate(**turns)) for turns in (one, {"g": one["g"], "d": one["d"]})]
    found = [step(step.init(HALVES), probe_batch(8))[1] for step in steps]
    assert found[0]["d/drawn"] != found[0]["g/drawn"]
    assert found[0]["d/drawn"] == found[1]["d/drawn"]


def test_every_turn_reads_the_average_of_the_whole() -> None:
    def reading(params: Any, rows: Any, *, ema: Any, step: Any) -> Any:
        return jnp.mean(params["d"]["w"] * ema["g"]["w"]) * (1.0 + step) + 0.0 * jnp.sum(rows["y"])

    def own(params: Any, rows: Any, *, ema: Any) -> Any:
        return jnp.mean(params["g"]["w"] * ema["g"]["w"]) + 0.0 * jnp.sum(rows["y"])

    d = SGD @ sc.grad(reading, wrt="d/w", reads=("ema", "step"))
    g = sc.ema(0.25) @ SGD @ sc.grad(own, wrt="g/w", reads="ema")  # its own, which hides that of the whole
    step = sc.compile(sc.ema(0.5) @ sc.alternate(d=d, g=g), mesh=mesh_of(data=1))
    state = step.init(HALVES)
    assert sorted(state.slots) == ["ema", "g/ema"]
    for _ in range(3):
        assert_equivalent(step, state, probe_batch(8))
        state, _ = step(state, probe_batch(8))


def test_step_that_is_not_finite_in_any_turn_is_skipped_as_a_whole() -> None:
    def bad(params: Any, rows: Any) -> jax.Array:
        return PROBES["over_rows"](params["g"], rows) + jnp.where(rows["x"][0, 0] > 50, jnp.nan, 0.0)

    pipeline = (
        sc.ema(0.5)
        @ sc.skip_nonfinite()
        @ sc.alternate(d=turn("d", sc.loss_scale(initial=8.0, interval=1)), g=MOMENTUM @ sc.grad(bad, wrt="g/**"))
    )
    step = sc.compile(pipeline)
    state = step.init(HALVES)
    batch = probe_batch(8)
    batch["x"][0, 0] = 100
    before = jax.device_get(state)
    assert_equivalent(step, state, batch)
    state, metrics = step(state, batch)
    assert int(metrics["skipped"]) == 1
    assert float(state.slots["d/loss_scale"].scale) == 16.0  # what the turn d learned of its scale is kept
    kept = {name: slot for name, slot in state.slots.items() if name not in ("skip_nonfinite", "d/loss_scale")}
    was = {name: before.slots[name] for name in kept}
    assert_equal_trees(replace(state, slots=kept), replace(before, slots=was), tolerance=0.0, of="a skipped step")
    state, metrics = step(state, probe_batch(8))
    assert (int(metrics["skipped"]), int(state.step)) == (0, 1)


def test_report_of_a_step_that_is_not_finite_names_the_turn() -> None:
    def bad(params: Any, rows: Any) -> jax.Array:
        return PROBES["over_rows"](params["g"], rows) * jnp.where(rows["y"][0] > 50, jnp.nan, 1.0)

    step = sc.compile(sc.alternate(d=turn("d"), critic=MOMENTUM @ sc.clip(1.0) @ sc.grad(bad, wrt="g/**")))
    batch = probe_batch(8)
    batch["y"][0] = 100
    with pytest.raises(sc.NonFiniteError) as caught:
        sc.run(step, step.init(HALVES), [probe_batch(8), batch])
    text = str(caught.value)
    assert caught.value.step == 2
    assert "in the turn 'critic'" in text
    assert "critic/grad_norm" in text
    assert "the turn 'd'" not in text


def test_run_resumes_turns_from_a_checkpoint(tmp_path: Path) -> None:
    pipeline = (
        sc.skip_nonfinite()
        @ sc.ema(0.5)
        @ sc.alternate(
            d=turn("d", sc.loss_scale(initial=8.0)), g=sc.ema(0.25) @ turn("g", update=MOMENTUM), every={"g": 3}
        )
    )
    batches = [probe_batch(8, seed=number) for number in range(8)]

    def run(steps: int, batches: list[Any], saved: str) -> sc.State:
        step = sc.compile(pipeline)
        checkpoint = sc.Checkpoints(tmp_path / saved, every=4)
        return sc.run(step, step.init(HALVES), batches, steps=steps, checkpoint=checkpoint).state

    whole = run(8, batches, "whole")
    run(4, batches[:4], "parts")
    resumed = run(8, batches[4:], "parts")
    assert_equal_trees(resumed, whole, tolerance=0.0, of="a run and one that was resumed")
    step = sc.compile(pipeline)
    only = sc.restore(tmp_path / "whole", like=step.init(HALVES), only="slots/g/**")
    assert_equal_trees(only.slots["g/ema"], whole.slots["g/ema"], tolerance=0.0, of="one slot")


def test_state_goes_on_where_what_the_turns_train_stays() -> None:
    step = sc.compile(both())
    state, _ = step(step.init(HALVES), probe_batch(8))
    averaging = sc.compile(sc.ema(0.5) @ both())
    new = averaging.init(state.params, like=state)
    assert_equal_trees(new.opt_state, state.opt_state, tolerance=0.0, of="the optimizer states")
    assert int(new.step) == 1


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_every_leaf_is_donated_and_frozen_leaves_are_not_copied(zero: int) -> None:
    params = {**HALVES, "table": np.ones((64, 64), np.int8)}
    rules = sc.shard(sc.dp("data", zero=zero))
    pipeline = sc.ema(0.5) @ both(sc.accumulate(2), rules, every={"g": 2})
    step = sc.compile(pipeline, mesh=mesh_of(data=2))
    program = step.lower(step.init(params), probe_batch(16)).compile()
    assert all(leaf.donated and leaf.aliased for leaf in program.donated())
    assert "s8[64,64]{1,0} copy" not in program.hlo()


def test_function_of_turns_is_their_call_also_in_scan_and_vmap() -> None:
    step = sc.compile(sc.skip_nonfinite() @ both(sc.accumulate(2), DATA, every={"g": 2}), mesh=mesh_of(data=2))
    states = [step.init(HALVES, seed=seed) for seed in range(2)]
    batches = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), probe_batch(16))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    many, _ = jax.jit(jax.vmap(lambda state: jax.lax.scan(step.function, state, batches)))(stacked)
    for number, state in enumerate(states):
        for _ in range(3):
            state, _ = step(state, probe_batch(16))
        got = jax.tree.map(lambda leaf, number=number: leaf[number], many)
        assert_equal_trees(got.params, state.params, tolerance=1e-5, of="a member")  # sums in another order


def test_turns_reduce_each_gradient_once_and_the_plan_says_so() -> None:
    pipeline = sc.ema(0.5) @ both(sc.clip(1.0), sc.accumulate(4), DATA)
    step = sc.compile(pipeline, mesh=mesh_of(data=8))
    lowered = step.lower(step.init(HALVES), probe_batch(64))
    planned = [(one.kind, one.executions, one.in_loop) for one in lowered.plan.collectives]
    found = [(one.kind, one.executions, one.in_loop) for one in lowered.compile().collectives()]
    assert planned == found == [("all-reduce", 1, False)] * 2
    lowered.compile().check(sc.Budget(gradient_reductions=1, donated=True), traces=step.traces)


def test_turns_are_sharded_along_model_axes_too() -> None:
    rules = sc.shard(sc.dp("data", zero=1), sc.tp({"*/w": P("model")}, default=P()))
    params = {own: {"w": np.ones(4, np.float32), "b": np.float32(0)} for own in "dg"}

    def loss(params: Any, rows: Any) -> jax.Array:
        both = jax.tree.map(lambda one, two: one + 2 * two, params["d"], params["g"])
        return jnp.mean((jnp.pad(rows["x"], ((0, 0), (0, 1))) @ both["w"] + both["b"] - rows["y"]) ** 2)

    turns = {
        own: sc.update(optax.adam(0.1)) @ sc.accumulate(2) @ rules @ sc.grad(loss, wrt=f"{own}/**") for own in "dg"
    }
    step = sc.compile(sc.skip_nonfinite() @ sc.ema(0.5) @ sc.alternate(**turns), mesh=mesh_of(data=2, model=2))
    assert_equivalent(step, step.init(params), probe_batch(16))


def mistaken(name: str, real: Any) -> Any:
    """A function of the lowering, with one mistake."""

    def reversed_order(instruction: Any, regions: Any, state: Any, batch: Any) -> Any:
        return real(replace(instruction, turns=instruction.turns[::-1]), regions[::-1], state, batch)

    def one_too_late(instruction: Any, regions: Any, state: Any, batch: Any) -> Any:
        outputs = real(instruction, regions, replace(state, step=state.step - 1), batch)
        return outputs._replace(state=replace(outputs.state, step=outputs.state.step + 1))

    def one_key(now: Any, turn: Any, key: Any) -> Any:
        return real(now, turn, now.rng)

    def unmoved(now: Any, turn: Any, made: Any) -> Any:
        return real(now, turn, replace(made, params=now.params))

    def never_skipped(condition: Any, one: Any, other: Any) -> Any:
        return one

    return locals()[name]


@pytest.mark.parametrize(
    ("of", "name"),
    [
        ("_take_turns", "reversed_order"),
        ("_take_turns", "one_too_late"),
        ("state_of_turn", "one_key"),
        ("after_turn", "unmoved"),
        ("_either_state", "never_skipped"),
    ],
)
def test_wrong_turns_are_caught(of: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, of, mistaken(name, getattr(lowering, of)))
    step = sc.compile(sc.skip_nonfinite() @ both(sc.accumulate(2), every={"g": 2}))
    batch = probe_batch(16)
    batch["y"][0] = np.inf if name == "never_skipped" else batch["y"][0]
    state = step.init(HALVES)
    with pytest.raises(sc.EquivalenceError):
        assert_equivalent(step, replace(state, step=state.step + 1), batch)


def test_settings_hold_the_numbers_of_every_turn() -> None:
    ((written, numbers),) = sc.compile(sc.alternate(d=turn("d"), g=turn("g", update=MOMENTUM))).settings()
    assert written.startswith("alternate(d=")
    assert {"-0.5", "-0.25"} <= set(numbers.values())


def test_hyperparameters_of_each_turn_are_metrics_of_its_own() -> None:
    rates = {"d": optax.inject_hyperparams(optax.sgd)(0.5), "g": optax.inject_hyperparams(optax.sgd)(0.25)}
    step = sc.compile(sc.alternate(**{own: turn(own, update=sc.update(rate)) for own, rate in rates.items()}))
    state = step.init(HALVES)
    assert_equivalent(step, state, probe_batch(8))
    _, metrics = step(state, probe_batch(8))
    assert (metrics["d/learning_rate"], metrics["g/learning_rate"]) == (0.5, 0.25)


def test_split_invariance_asks_for_one_gradient() -> None:
    step = sc.compile(both(sc.accumulate(2)))
    with pytest.raises(sc.ConfigError, match="each turn of `alternate` has one"):
        sc.testing.assert_split_invariant(step, step.init(HALVES), probe_batch(8))
