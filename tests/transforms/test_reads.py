"""`grad(loss, reads=...)` and `ema(decay, every=n)` by hand: a teacher, a target network, a warm-up."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of

import stepc as sc
from stepc.testing import assert_equivalent

RATE, ROWS = 0.25, 16
PARAMS = {"w": jnp.asarray([[0.5, -1.0], [2.0, 0.25]]), "b": jnp.asarray([1.0, -0.5])}
BATCHES = [{"x": jnp.asarray(np.random.default_rng(n).normal(size=(ROWS, 2)), jnp.float32)} for n in range(4)]


def predicted(params: Any, x: Any) -> jax.Array:
    return jnp.tanh(x @ params["w"] + params["b"][None])


def taught(params: Any, rows: Any, *, ema: Any) -> jax.Array:
    """The student follows the teacher on rows that are turned round."""
    teacher = jax.lax.stop_gradient(predicted(ema, rows["x"][:, ::-1]))
    return jnp.mean((predicted(params, rows["x"]) - teacher) ** 2)


def warmed(params: Any, rows: Any, *, step: Any) -> jax.Array:
    return jnp.mean(predicted(params, rows["x"])) * jnp.minimum(1.0, (step + 1) / 4)


def trained(pipeline: Any, *, mesh: Any = None) -> Any:
    step = sc.compile(pipeline, mesh=mesh)
    state = step.init(PARAMS)
    for batch in BATCHES:
        assert_equivalent(step, state, batch)
        state, _ = step(state, batch)
    assert step.traces == 1
    return jax.device_get(state)


@pytest.mark.parametrize(("k", "devices", "zero"), [(1, 1, 0), (4, 1, 0), (2, 8, 0), (2, 2, 1), (2, 2, 3)])
def test_teacher_is_the_average_before_the_step_for_any_k_and_mesh(k: int, devices: int, zero: int) -> None:
    middle = sc.accumulate(k) @ sc.shard(sc.dp("data", zero=zero))
    pipeline = sc.ema(0.5) @ sc.update(optax.sgd(RATE)) @ middle @ sc.grad(taught, reads="ema")
    state = trained(pipeline, mesh=mesh_of(data=devices))
    student = teacher = PARAMS
    for batch in BATCHES:
        grads = jax.grad(lambda params, batch=batch, ema=teacher: taught(params, batch, ema=ema))(student)
        student = jax.tree.map(lambda leaf, grad: leaf - RATE * grad, student, grads)
        teacher = jax.tree.map(lambda old, new: 0.5 * old + 0.5 * new, teacher, student)
    chex.assert_trees_all_close(state.params, student, rtol=1e-5, atol=1e-6)  # sums in another order
    chex.assert_trees_all_close(state.slots["ema"], teacher, rtol=1e-5, atol=1e-6)


def test_target_network_is_a_copy_at_each_second_step() -> None:
    pipeline = sc.ema(0.0, every=2) @ sc.update(optax.sgd(RATE)) @ sc.accumulate(2) @ sc.grad(taught, reads=("ema",))
    state = trained(pipeline)
    student = target = PARAMS
    for number, batch in enumerate(BATCHES, start=1):
        grads = jax.grad(lambda params, batch=batch, ema=target: taught(params, batch, ema=ema))(student)
        student = jax.tree.map(lambda leaf, grad: leaf - RATE * grad, student, grads)
        target = student if number % 2 == 0 else target
    chex.assert_trees_all_close(state.params, student, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(state.slots["ema"], state.params)


def test_number_of_the_step_warms_a_coefficient_up_in_one_trace() -> None:
    state = trained(sc.update(optax.sgd(RATE)) @ sc.accumulate(2) @ sc.grad(warmed, reads="step"))
    params = PARAMS
    for number, batch in enumerate(BATCHES):
        grads = jax.grad(lambda params, batch=batch, n=number: warmed(params, batch, step=n))(params)
        params = jax.tree.map(lambda leaf, grad: leaf - RATE * grad, params, grads)
    chex.assert_trees_all_close(state.params, params, rtol=1e-5, atol=1e-6)


def test_each_step_of_repeat_reads_its_own_state() -> None:
    def both(params: Any, rows: Any, *, ema: Any, step: Any) -> jax.Array:
        return taught(params, rows, ema=ema) + warmed(params, rows, step=step)

    inner = sc.ema(0.5) @ sc.update(optax.sgd(RATE)) @ sc.grad(both, reads=("ema", "step"))
    one = trained(inner)
    step = sc.compile(sc.repeat(4) @ inner)
    batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *BATCHES)
    many, _ = step(step.init(PARAMS), batches)
    chex.assert_trees_all_close(jax.device_get((many.params, many.slots)), (one.params, one.slots), rtol=1e-6)


@pytest.mark.parametrize(
    "middle",
    [
        sc.sam(0.125) @ sc.accumulate(2),
        sc.loss_scale(initial=8.0) @ sc.accumulate(2),
        sc.accumulate(2) @ sc.clip(0.5),
        sc.rows(),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "wrapped", [taught, sc.remat() @ taught, sc.cast(jnp.bfloat16) @ taught], ids=["", "remat", "cast"]
)
def test_reading_among_other_transforms_equals_its_reference(middle: Any, wrapped: Any) -> None:
    step = sc.compile(sc.ema(0.5) @ sc.update(optax.adam(RATE)) @ middle @ sc.grad(wrapped, reads="ema"))
    state, _ = step(step.init(PARAMS), BATCHES[0])
    assert_equivalent(step, state, BATCHES[1], tolerance=0.1 if "cast" in repr(wrapped) else 1e-4)


def test_reading_costs_no_reduction_and_no_second_gradient() -> None:
    pipeline = sc.ema(0.5) @ sc.update(optax.sgd(RATE)) @ sc.accumulate(2) @ sc.shard(sc.dp("data"))
    step = sc.compile(pipeline @ sc.grad(taught, reads="ema"), mesh=mesh_of(data=4))
    compiled = step.lower(step.init(PARAMS), BATCHES[0]).compile()
    assert [one.kind for one in compiled.collectives()] == ["all-reduce"]


def test_frozen_leaves_are_none_in_the_average_that_is_read() -> None:
    def merged(params: Any, rows: Any, *, ema: Any) -> jax.Array:
        assert ema["b"] is None
        return taught(params, rows, ema={**params, "w": ema["w"]})

    trained(sc.ema(0.5) @ sc.update(optax.sgd(RATE)) @ sc.grad(merged, wrt="w", reads="ema"))


def test_name_that_the_pipeline_does_not_keep_is_refused() -> None:
    with pytest.raises(sc.ConfigError) as raised:
        sc.compile(sc.update(optax.sgd(RATE)) @ sc.grad(taught, reads="ema"))
    assert str(raised.value) == (
        "`grad(taught, reads=\"ema\")` reads 'ema', which the state does not have.\n\n"
        "  kept  step\n\n"
        "  Write `ema(decay) @ ...`: it keeps the slot `ema`."
    )
    with pytest.raises(sc.ConfigError, match="Did you mean 'step'"):
        sc.compile(sc.update(optax.sgd(RATE)) @ sc.grad(warmed, reads="steps"))


def test_loss_that_does_not_take_what_it_reads_is_refused() -> None:
    def plain(params: Any, rows: Any) -> jax.Array:
        return jnp.mean(predicted(params, rows["x"]))

    step = sc.compile(sc.update(optax.sgd(RATE)) @ sc.grad(plain, reads="step"))
    with pytest.raises(sc.LossError) as raised:
        step(step.init(PARAMS), BATCHES[0])
    assert str(raised.value) == (
        'The loss of `grad(plain, reads="step")` does not take what it reads.\n\n'
        "  read     step\n"
        "  missing  step\n\n"
        "  Write `def loss(params, rows, *, step)`."
    )


@pytest.mark.parametrize(
    ("wrong", "kind"), [(3, sc.FieldTypeError), (("ema", "ema"), sc.FieldValueError), ("a b", sc.FieldValueError)]
)
def test_names_that_are_none_are_refused(wrong: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        sc.grad(taught, reads=wrong)


@pytest.mark.parametrize("every", [0, 1.5, "2"])
def test_average_every_so_many_steps_needs_a_positive_integer(every: Any) -> None:
    with pytest.raises((sc.FieldTypeError, sc.FieldValueError)):
        sc.ema(0.5, every=every)
