"""`value_fn` and `obj_fn`: the loss of the whole batch under the same pipeline, and its derivatives.

`Evaluating` asks for a value, a value with its gradient, and a product of the Hessian, and goes down that gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import EXACT_SOURCES, PROBES, SOURCES, probe_batch, probe_model_state, probe_params
from conftest import mesh_of

import stepc as sc
from stepc.testing import assert_equal_trees, assert_equivalent
from stepc.testing.probes import WIDE, Evaluating, wide_params

EVALUATING = sc.update(Evaluating())
DATA = sc.shard(sc.dp("data"))


def fresh(step: sc.Step, num_rows: int, params: Any = None) -> sc.State:
    source = step.pipeline.transforms[-1]
    model_state = probe_model_state(source, num_rows)
    return step.init(probe_params(source) if params is None else params, seed=3, model_state=model_state)


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize(
    ("k", "devices"),
    [(2, 8), *[pytest.param(*one, marks=pytest.mark.long) for one in [(1, 1), (1, 2), (2, 2), (1, 8)]], (3, 1)],
)
def test_evaluations_equal_those_of_the_reference(k: int, devices: int, name: str) -> None:
    step = sc.compile(EVALUATING @ sc.accumulate(k) @ DATA @ SOURCES[name], mesh=mesh_of(data=devices))
    # Whole numbers: sums are exact, unless they are divided by three, or by the counts of terms.
    exact = name in EXACT_SOURCES and k != 3
    num_rows = 48 if k == 3 else 64
    assert_equivalent(step, fresh(step, num_rows), probe_batch(num_rows), tolerance=0.0 if exact else 1e-5)


@pytest.mark.parametrize("name", ["over_rows", "drawing_per_call", "stateful", "terms"])
def test_evaluations_leave_out_what_changes_the_gradient_alone(name: str) -> None:
    """Clipping, noise and scales change the gradient that the optimizer is given, and no value of the loss."""
    loss_fn = SOURCES[name]
    plain = sc.accumulate(2) @ DATA @ sc.accumulate(2)
    changed = sc.noise(0.5) @ sc.accumulate(2) @ sc.clip(0.1) @ DATA @ sc.scale(3.0) @ sc.accumulate(2)
    steps = [sc.compile(EVALUATING @ inner @ loss_fn, mesh=mesh_of(data=2)) for inner in (plain, changed)]
    states = [step(fresh(step, 32), probe_batch(32)) for step in steps]
    assert_equal_trees(states[1][0].params, states[0][0].params, tolerance=1e-6, of="the steps with and without")
    assert_equal_trees(states[1][0].opt_state, states[0][0].opt_state, tolerance=1e-6, of="the evaluations")
    assert_equivalent(steps[1], fresh(steps[1], 32), probe_batch(32))


def test_the_scale_of_the_loss_does_not_reach_the_optimizer() -> None:
    step = sc.compile(EVALUATING @ sc.loss_scale(initial=8.0) @ sc.accumulate(2) @ sc.grad(PROBES["over_rows"]))
    state, metrics = step(fresh(step, 16), probe_batch(16))
    assert state.opt_state["here"] == metrics["loss"]
    assert_equivalent(step, state, probe_batch(16, seed=1), tolerance=0.0)


def test_the_first_value_is_the_loss_of_the_step_with_the_same_keys() -> None:
    step = sc.compile(EVALUATING @ sc.accumulate(2) @ DATA @ SOURCES["drawing_per_call"], mesh=mesh_of(data=2))
    state = fresh(step, 32)
    for number in range(2):  # other keys in every step
        state, metrics = step(state, probe_batch(32, seed=number))
        assert state.opt_state["here"] == metrics["loss"]


@pytest.mark.parametrize("gather", ["step", "microbatch", "layer"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_evaluations_of_sharded_parameters_equal_those_of_the_reference(zero: int, gather: str) -> None:
    if zero < 3 and gather != "step":
        pytest.skip("only sharded parameters are gathered in a loop")
    shard = sc.shard(sc.dp("data", zero=zero, gather=gather))
    step = sc.compile(EVALUATING @ sc.accumulate(2) @ shard @ sc.grad(WIDE["over_rows"]), mesh=mesh_of(data=8))
    state = fresh(step, 32, wide_params())
    for number in range(2):
        assert_equivalent(step, state, probe_batch(32, seed=number))
        state, _ = step(state, probe_batch(32, seed=number))
    assert step.traces == 1


def test_model_state_is_a_constant_of_every_gradient() -> None:
    """Also where it depends on the parameters, and passes from one microbatch to the next."""

    def loss(params: Any, rows: Any, model_state: Any) -> tuple[jax.Array, Any]:
        mean = jnp.mean(jnp.matmul(rows["x"], params["w"]))
        return PROBES["over_rows"](params, rows) + model_state * params["b"], 0.5 * model_state + mean

    step = sc.compile(EVALUATING @ sc.accumulate(4) @ sc.grad(loss, model_state=True))
    state = step.init(probe_params(), model_state=np.float32(1.0))
    new, _ = step(jax.tree.map(jnp.copy, state), probe_batch(16))
    assert_equivalent(step, state, probe_batch(16), tolerance=0.0)
    # By hand, at the parameters one step aside.
    params, seen, grads = jax.tree.map(lambda leaf: jnp.asarray(leaf) - 1.0, probe_params()), jnp.float32(1.0), []
    for j in range(4):
        rows = jax.tree.map(lambda leaf, j=j: jnp.asarray(leaf[j::4]), probe_batch(16))
        one, after = jax.grad(loss, has_aux=True)(params, rows, seen)
        grads.append(one)
        seen = after
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 4, *grads)
    expected = jax.tree.map(lambda leaf, grad: leaf - 0.5 * grad, probe_params(), mean)
    assert_equal_trees(new.params, expected, tolerance=0.0, of="the step and the loop by hand")


@pytest.mark.parametrize("outside", [sc.skip_nonfinite(), sc.ema(0.5), sc.repeat(2)])
def test_evaluations_inside_step_transforms_equal_those_of_the_reference(outside: sc.Transform) -> None:
    step = sc.compile(outside @ EVALUATING @ sc.accumulate(2) @ SOURCES["drawing"])
    batch = probe_batch(16)
    batch = jax.tree.map(lambda leaf: np.stack([leaf, leaf + 1]), batch) if step.steps_per_call > 1 else batch
    assert_equivalent(step, fresh(step, 16), batch)


def test_an_automatic_axis_is_left_to_xla() -> None:
    pipeline = EVALUATING @ sc.accumulate(2) @ sc.shard(sc.dp("data"), mode="auto") @ SOURCES["over_rows"]
    step = sc.compile(pipeline, mesh=mesh_of(data=4))
    assert_equivalent(step, fresh(step, 16), probe_batch(16), tolerance=0.0)


class Once:
    """An optimizer that takes one gradient elsewhere, and then one value of the loss."""

    def init(self, params: Any) -> Any:
        return 0.0

    def update(self, grads: Any, state: Any, params: Any, *, obj_fn: Any) -> Any:
        elsewhere = jax.grad(obj_fn)(jax.tree.map(lambda leaf, grad: leaf - 0.1 * grad, params, grads))
        updates = jax.tree.map(lambda leaf: -0.1 * leaf, elsewhere)
        return updates, obj_fn(optax.apply_updates(params, updates))


def test_the_plan_has_the_reductions_of_an_evaluation() -> None:
    step = sc.compile(
        sc.update(Once()) @ sc.clip(1.0) @ sc.accumulate(4) @ DATA @ SOURCES["tokens"], mesh=mesh_of(data=8)
    )
    lowered = step.lower(fresh(step, 64), probe_batch(64))
    planned = [(one.kind, one.executions, one.in_loop, one.per) for one in lowered.plan.collectives]
    assert planned == [
        ("all-reduce", 1, False, "step"),
        ("all-reduce", 1, False, "value of the loss"),
        ("all-reduce", 1, False, "gradient of the loss"),
    ]
    found = lowered.compile().collectives()
    assert [(one.kind, one.executions, one.in_loop) for one in found] == [("all-reduce", 1, False)] * 3
    # Two gradients of four numbers, each with a total and a count; a value has a total and a count alone.
    assert sum(one.bytes for one in found) <= 2 * (16 + 8) + 8


def test_an_evaluation_reduces_no_model_state() -> None:
    def loss(params: Any, rows: Any, state: Any) -> tuple[jax.Array, Any]:
        hidden = rows["x"] @ params["w"]
        return jnp.mean(hidden**2), {"mean": 0.5 * state["mean"] + 0.5 * hidden.mean(axis=0)}

    step = sc.compile(sc.update(Once()) @ DATA @ sc.grad(loss, model_state=True), mesh=mesh_of(data=8))
    state = step.init({"w": jnp.ones((4, 2))}, model_state={"mean": jnp.zeros(2)})
    lowered = step.lower(state, {"x": jnp.ones((64, 4))})
    planned = [one.per for one in lowered.plan.collectives]
    assert sorted(planned) == ["gradient of the loss", "step", "step", "value of the loss"], planned


def test_a_line_search_holds_the_activations_of_one_microbatch() -> None:
    """Differentiated as it stands, the loop over microbatches would keep what each of them computes."""

    def loss(params: Any, rows: Any) -> jax.Array:
        hidden = rows["x"] @ params["in"]
        for _ in range(4):
            hidden = jnp.tanh(hidden)
        return jnp.mean((hidden @ params["out"]) ** 2)

    params = {"in": np.ones((4, 256), np.float32), "out": np.ones((256, 4), np.float32)}
    batch = {"x": np.ones((512, 4), np.float32)}

    def temporaries(k: int) -> int:
        step = sc.compile(sc.update(optax.lbfgs(memory_size=1)) @ sc.accumulate(k) @ sc.grad(loss))
        return step.lower(step.init(params), batch).compile().executable.memory_analysis().temp_size_in_bytes

    assert temporaries(16) < temporaries(1) / 4


@pytest.mark.parametrize(("k", "devices"), [(1, 1), (2, 1), (3, 1), (1, 2), (2, 8)])
def test_lbfgs_equals_the_hand_written_loop_step_by_step(k: int, devices: int) -> None:
    """Ten steps of a logistic regression on one batch: the loss after each, and the parameters at the end."""
    random = np.random.default_rng(0)
    batch = {"x": random.normal(size=(48, 5)).astype(np.float32), "y": (random.random(48) > 0.5).astype(np.float32)}

    def loss(params: Any, rows: Any) -> jax.Array:
        logits = rows["x"] @ params["w"]
        penalty = 0.01 * jnp.sum(params["w"] ** 2)
        return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, rows["y"])) + penalty

    solver, params = optax.lbfgs(), {"w": jnp.full(5, 0.5)}

    @jax.jit
    def by_hand(params: Any, opt_state: Any) -> Any:
        value, grad = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = solver.update(
            grad, opt_state, params, value=value, grad=grad, value_fn=lambda params: loss(params, batch)
        )
        return optax.apply_updates(params, updates), opt_state, value

    step = sc.compile(sc.update(solver) @ sc.accumulate(k) @ DATA @ sc.grad(loss), mesh=mesh_of(data=devices))
    state, opt_state = step.init(params), solver.init(params)
    for _ in range(10):
        state, metrics = step(state, batch)
        params, opt_state, value = by_hand(params, opt_state)
        # Sums in another order; the line search takes the same number of evaluations.
        np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(state.params["w"], params["w"], atol=1e-4)
    assert float(jnp.linalg.norm(jax.grad(loss)(params, batch)["w"])) < 1e-3, "it has converged"
