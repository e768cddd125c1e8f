"""Budgets: what is measured, what is refused, and that a broken one costs nothing but an error."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import PROBES, probe_batch, probe_params
from conftest import mesh_of
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import stepc as sc
from stepc._units import bytes_of
from stepc.inspect import Collective, Collectives, check
from stepc.inspect.budget import Measure, reductions_of
from stepc.inspect.hlo import Shape
from stepc.testing import assert_within_budget

ADAM = sc.update(optax.adam(1e-3))
DATA = sc.shard(sc.dp("data"))
LOSS = sc.grad(PROBES["over_rows"])
OUTSIDE = ADAM @ sc.clip(1.0) @ sc.accumulate(4) @ DATA @ LOSS
INSIDE = ADAM @ sc.accumulate(4) @ sc.clip(1.0) @ DATA @ LOSS
DEMANDING = sc.Budget(
    gradient_reductions=1, collectives=1, collectives_in_loops=0, collective_bytes="1 kB", donated=True
)


def compiled(pipeline: sc.Pipeline) -> sc.Compiled:
    step = sc.compile(pipeline, mesh=mesh_of(data=8))
    return step.lower(step.init(probe_params()), probe_batch(64)).compile()


def test_budget_that_is_kept_passes() -> None:
    compiled(OUTSIDE).check(DEMANDING)


def test_budget_broken_in_the_loop_names_every_broken_promise_and_the_line() -> None:
    with pytest.raises(sc.BudgetError) as raised:
        compiled(INSIDE).check(DEMANDING)
    assert raised.value.broken == ("gradient_reductions", "collectives", "collectives_in_loops")
    first = str(raised.value).splitlines()[3].split()
    assert first[:5] == ["gradient_reductions", "1", "4", "4", "x"]
    assert "all-reduce of 20 B over data in a loop: lower.py:" in str(raised.value)


@pytest.mark.parametrize("k", [1, 2, 8])
def test_budget_gradient_reductions_do_not_depend_on_k(k: int) -> None:
    compiled(ADAM @ sc.clip(1.0) @ sc.accumulate(k) @ DATA @ LOSS).check(sc.Budget(gradient_reductions=1))


def test_budget_on_one_device_has_no_reduction() -> None:
    step = sc.compile(ADAM @ sc.accumulate(4) @ LOSS)
    step.lower(step.init(probe_params()), probe_batch(64)).compile().check(
        sc.Budget(gradient_reductions=0, collectives=0, collective_bytes=0)
    )


def test_budget_gradient_split_over_a_model_axis_is_reduced_once() -> None:
    mesh = mesh_of(data=4, model=2)
    params = {"w": jax.device_put(jnp.ones((8, 6)), NamedSharding(mesh, P(None, "model")))}

    def loss(params: dict[str, jax.Array], rows: dict[str, jax.Array]) -> jax.Array:
        return jnp.mean((rows["x"] @ params["w"]) ** 2)

    step = sc.compile(ADAM @ sc.clip(1.0) @ sc.accumulate(2) @ DATA @ sc.grad(loss), mesh=mesh)
    batch = {"x": probe_batch(64)["x"][:, :1].repeat(8, axis=1)}
    program = step.lower(step.init(params), batch).compile()
    program.check(sc.Budget(gradient_reductions=1))
    with pytest.raises(sc.BudgetError):
        program.check(sc.Budget(gradient_reductions=0))


def row(kind: str, *dims: tuple[int, ...], executions: int | None = 1, axis: str = "data") -> Collective:
    return Collective(kind, 4, (axis,), executions, False, False, False, "", tuple(Shape("f32", one) for one in dims))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], 0),
        ([row("all-reduce", (100,), (60,), ())], 1),  # one, fused, with a metric
        ([row("all-reduce", (100,)), row("all-reduce", (60,)), row("all-reduce", ())], 1),  # split by size
        ([row("reduce-scatter", (160,)), row("all-gather", (160,))], 1),  # a gather reduces nothing
        ([row("all-reduce", (161,))], 1),  # a metric that was joined to the gradient
        ([row("all-reduce", (160,)), row("all-reduce", (20,))], 2),  # a part is reduced twice
        ([row("all-reduce", (160,), executions=8)], 8),
        ([row("all-reduce", (160,), executions=None)], None),
        ([row("all-reduce", (160,), axis="model")], 0),
    ],
)
def test_reductions_of_known_rows(rows: list[Collective], expected: int | None) -> None:
    assert reductions_of(Collectives(tuple(rows)), axes=("data",), elements=160).value == expected


def test_check_holds_any_jitted_function() -> None:
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))

    def body(x: jax.Array) -> jax.Array:
        return lax.scan(lambda c, _: (jnp.sin(lax.psum(c, "data")), None), x, length=6)[0]

    mapped = jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    program = jax.jit(mapped).lower(jax.ShapeDtypeStruct((64, 4), jnp.float32)).compile()
    check(sc.Budget(collectives=6, collectives_in_loops=6, collective_bytes=6 * 128, argument_bytes=128), program)
    with pytest.raises(sc.BudgetError, match="6 x all-reduce of 128 B over data in a loop: test_budget.py:"):
        check(sc.Budget(collectives=5), program)


def test_check_of_unknown_executions_is_broken() -> None:
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))

    def until(x: jax.Array) -> jax.Array:
        return lax.while_loop(lambda x: x[0, 0] < 9, lambda x: lax.psum(x, "data") + 1, x)

    mapped = jax.shard_map(until, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
    program = jax.jit(mapped).lower(jax.ShapeDtypeStruct((64, 4), jnp.float32)).compile()
    with pytest.raises(sc.BudgetError, match="unknown"):
        check(sc.Budget(collectives=1000), program)


def test_budget_copied_leaf_of_a_state_is_named() -> None:
    with pytest.raises(sc.BudgetError, match=r"donated +every leaf +all but 1 +opt_state/0/mu is copied"):
        check(
            sc.Budget(donated=True),
            jax.jit(lambda x: x).lower(1.0).compile(),
            known={"donated": Measure(1, ("opt_state/0/mu is copied",))},
        )


def test_compile_with_budget_runs_as_before_with_one_trace_and_one_compilation() -> None:
    counted: list[str] = []

    def note(event: str, duration: float, **about: object) -> None:
        if event.endswith("backend_compile_duration"):
            counted.append(event)

    step = sc.compile(OUTSIDE, mesh=mesh_of(data=8), budget=sc.Budget(gradient_reductions=1, traces=1, donated=True))
    state = step.init(probe_params())
    jax.monitoring.register_event_duration_secs_listener(note)
    for _ in range(3):
        state, metrics = step(state, probe_batch(64))
        jax.block_until_ready(metrics)
    jax.monitoring.unregister_event_duration_listener(note)
    assert (step.traces, len(counted), int(state.step)) == (1, 1, 3)


def test_compile_with_broken_budget_leaves_the_state_alive() -> None:
    step = sc.compile(INSIDE, mesh=mesh_of(data=8), budget=DEMANDING)
    state = step.init(probe_params())
    with pytest.raises(sc.BudgetError):
        step(state, probe_batch(64))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_compile_with_budget_refuses_a_second_trace_before_it_runs() -> None:
    step = sc.compile(OUTSIDE, mesh=mesh_of(data=8), budget=sc.Budget(traces=1))
    state, _ = step(step.init(probe_params()), probe_batch(64))
    with pytest.raises(sc.BudgetError, match=r"traces +1 +2"):
        step(state, probe_batch(128))
    assert int(state.step) == 1


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, 0), (12, 12), ("12B", 12), ("1.5 kB", 1500), ("12MiB", 12 * 2**20), ("2GiB", 2**31), ("3 GB", 3 * 10**9)],
)
def test_bytes_of_every_form(size: int | str, expected: int) -> None:
    assert bytes_of("temp_bytes", size) == expected


def test_budget_from_toml_is_the_budget_as_written(tmp_path: Path) -> None:
    path = tmp_path / "budget.toml"
    path.write_text('gradient_reductions = 1\ntemp_bytes = "2GiB"\ndonated = true\n')
    assert sc.Budget.from_toml(path) == sc.Budget(gradient_reductions=1, temp_bytes="2GiB", donated=True)


def test_budget_prints_as_it_was_written() -> None:
    written = "Budget(gradient_reductions=1, temp_bytes='2GiB', donated=True)"
    assert repr(eval(written, {"Budget": sc.Budget})) == written


def test_assert_within_budget_passes_for_three_steps_of_one_trace() -> None:
    step = sc.compile(OUTSIDE, mesh=mesh_of(data=8))
    state = step.init(probe_params())
    assert_within_budget(sc.Budget(gradient_reductions=1, traces=1), step, state, probe_batch(64))
    assert int(state.step) == 0
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_assert_within_budget_broken_raises() -> None:
    step = sc.compile(INSIDE, mesh=mesh_of(data=8))
    with pytest.raises(sc.BudgetError, match="gradient_reductions"):
        assert_within_budget(sc.Budget(gradient_reductions=1), step, step.init(probe_params()), probe_batch(64))


def test_assert_within_budget_counts_the_traces_of_the_steps_it_runs() -> None:
    step = sc.compile(OUTSIDE, mesh=mesh_of(data=8))
    state = step.init(probe_params())
    step.lower(state, probe_batch(128))
    with pytest.raises(sc.BudgetError, match=r"traces +1 +2"):
        assert_within_budget(sc.Budget(traces=1), step, state, probe_batch(64))


def test_assert_within_budget_of_shapes_needs_no_arrays() -> None:
    step = sc.compile(OUTSIDE, mesh=mesh_of(data=8))
    shapes = step.init(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), probe_params()))
    assert_within_budget(sc.Budget(gradient_reductions=1, traces=1), step, shapes, probe_batch(64))
