"""`accumulate(memory=...)`: the k that is found, what finding it costs, and that the step is that of a written k."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import PROBES, probe_batch, probe_params
from conftest import mesh_of

import stepc as sc
from examples.gpt import model as gpt
from stepc._compiler.search import CandidatePrograms, find_smallest_fit, live_bytes
from stepc.testing import assert_equal_trees, assert_equivalent

DATA = sc.shard(sc.dp("data"))
SGD = sc.update(optax.sgd(0.5))
ROWS, WIDTH = 64, 32


def wide(params: Any, rows: Any) -> jax.Array:
    """A loss whose activations need more memory than anything else."""
    return jnp.mean(jnp.square(jnp.tanh(rows["x"] @ params["in"]) @ params["out"]))


WIDE = {"in": np.full((WIDTH, 512), 0.1, np.float32), "out": np.full((512, WIDTH), 0.1, np.float32)}


def rows_of(num_rows: int) -> dict[str, np.ndarray]:
    return {"x": np.ones((num_rows, WIDTH), np.float32)}


@cache
def total(k: int) -> int:
    step = sc.compile(SGD @ sc.accumulate(k) @ sc.grad(wide))
    return step.lower(fresh(), rows_of(ROWS)).compile().memory().total


@cache
def fresh() -> sc.State:
    """A state that is lowered for, and never donated."""
    return sc.compile(SGD @ sc.grad(wide)).init(WIDE)


def tuning(memory: int | str, **options: Any) -> sc.Step:
    return sc.compile(SGD @ sc.accumulate(memory=memory) @ sc.grad(wide), **options)


@contextmanager
def compilations() -> Iterator[list[str]]:
    events: list[str] = []

    def note(event: str, duration: float, **about: Any) -> None:
        if event.endswith("backend_compile_duration"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield events
    jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.parametrize("k", [1, 2, 4, 64])
def test_memory_of_a_program_finds_its_k(k: int) -> None:
    plan = tuning(total(k)).lower(fresh(), rows_of(ROWS)).plan
    assert plan.search is not None
    assert (plan.search.chosen, plan.search.counts) == (k, (1, 2, 4, 8, 16, 32, 64))
    assert plan.loop_length == k


def test_memory_one_byte_short_finds_the_next_k() -> None:
    plan = tuning(total(4) - 1).lower(fresh(), rows_of(ROWS)).plan
    assert plan.loop_length == 8


def test_memory_compiles_what_the_search_says_and_nothing_twice() -> None:
    step = tuning(total(8))
    state = step.init(WIDE)
    with compilations() as events:
        for _ in range(3):
            state, metrics = step(state, rows_of(ROWS))
            jax.block_until_ready(metrics)
        lowered = step.lower(state, rows_of(ROWS))
        lowered.compile()
    assert lowered.plan.search is not None
    assert len(events) == lowered.plan.search.compilations
    assert step.traces == 1


def test_memory_is_found_again_for_another_batch_and_kept() -> None:
    step = tuning(total(4))
    state = step.init(WIDE)
    for num_rows in (ROWS, 2 * ROWS, ROWS, 2 * ROWS):
        state, _ = step(state, rows_of(num_rows))
    found = [step.lower(state, rows_of(num_rows)).plan.loop_length for num_rows in (ROWS, 2 * ROWS)]
    assert found[0] == 4 and found[1] > 4
    assert step.traces == 2


def test_memory_second_search_is_never_silent(caplog: pytest.LogCaptureFixture) -> None:
    step = tuning("1GiB")
    state = step.init(WIDE)
    step.lower(state, rows_of(ROWS))
    assert not caplog.records
    step.lower(state, rows_of(2 * ROWS))
    assert "became accumulate(1)" in caplog.text


def test_memory_twice_finds_the_same() -> None:
    plans = [tuning(total(8)).lower(fresh(), rows_of(ROWS)).plan for _ in range(2)]
    assert plans[0].search == plans[1].search


def test_plan_shows_the_k_and_how_it_was_found() -> None:
    memory = total(4)
    step = tuning(memory)
    lowered = step.lower(step.init(WIDE), rows_of(ROWS))
    assert repr(step.pipeline) == f"update(optax.sgd(0.5)) @ accumulate(memory={memory}) @ grad(wide)"
    assert lowered.plan.pipeline == "update(optax.sgd(0.5)) @ accumulate(4) @ grad(wide)"
    assert f"search\n  accumulate(memory={memory}) became accumulate(4)\n" in str(lowered.plan)
    assert f"{memory:,} B  fits, chosen" in lowered.compile().explain()


@pytest.mark.parametrize("probe", PROBES)
def test_memory_equals_the_step_with_that_k(probe: str) -> None:
    """Bitwise, on whole numbers: also for a loss that depends on which rows share a local microbatch."""
    source, mesh, batch = sc.grad(PROBES[probe]), mesh_of(data=2), probe_batch(1024)
    undivided = sc.compile(SGD @ DATA @ source, mesh=mesh)
    too_much = undivided.lower(undivided.init(probe_params()), batch).compile().memory().total
    step = sc.compile(SGD @ sc.accumulate(memory=too_much - 1) @ DATA @ source, mesh=mesh)
    lowered = step.lower(step.init(probe_params()), batch)
    written = sc.compile(SGD @ sc.accumulate(lowered.plan.loop_length) @ DATA @ source, mesh=mesh)
    assert lowered.plan.loop_length > 1
    assert_equal_trees(
        step(step.init(probe_params()), batch),
        written(written.init(probe_params()), batch),
        tolerance=0.0,
        of="two steps",
    )
    assert_equivalent(step, step.init(probe_params()), batch)


def test_memory_divides_the_rows_of_a_device_and_of_another_accumulation() -> None:
    pipeline = SGD @ sc.accumulate(2) @ sc.clip(1.0) @ sc.accumulate(memory="1GiB") @ DATA @ sc.grad(wide)
    step = sc.compile(pipeline, mesh=mesh_of(data=4))
    plan = step.lower(step.init(WIDE), rows_of(48)).plan
    assert plan.search is not None
    assert plan.search.counts == (1, 2, 3, 6)


def test_memory_under_repeat_counts_the_rows_of_one_step() -> None:
    step = sc.compile(sc.repeat(3) @ SGD @ sc.accumulate(memory="1GiB") @ sc.grad(wide))
    batch = {"x": np.ones((3, 8, WIDTH), np.float32)}
    plan = step.lower(step.init(WIDE), batch).plan
    assert plan.search is not None
    assert plan.search.counts == (1, 2, 4, 8)
    assert int(step(step.init(WIDE), batch)[0].step) == 3


def test_memory_of_shapes_alone_is_found() -> None:
    step = tuning(total(4))
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), WIDE)
    batch = {"x": jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)}
    assert step.lower(step.init(shapes), batch).plan.loop_length == 4


def test_memory_nothing_fits_leaves_the_state_alive() -> None:
    step = tuning("100 B")
    state = step.init(WIDE)
    with pytest.raises(sc.BudgetError) as raised:
        step(state, rows_of(ROWS))
    assert raised.value.broken == ("memory",)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_memory_named_by_the_error_fits() -> None:
    with pytest.raises(sc.BudgetError) as raised:
        tuning("100 B").lower(fresh(), rows_of(ROWS))
    (named,) = re.findall(r"`memory=(\d+)` is enough", str(raised.value))
    tuning(int(named)).lower(fresh(), rows_of(ROWS))
    with pytest.raises(sc.BudgetError):
        tuning(int(named) - 1).lower(fresh(), rows_of(ROWS))


def test_memory_and_a_budget_hold_together() -> None:
    step = tuning(total(4), budget=sc.Budget(traces=1, donated=True, total_bytes=total(4)))
    state, _ = step(step.init(WIDE), rows_of(ROWS))
    with pytest.raises(sc.BudgetError, match=r"traces +1 +2"):
        step(state, rows_of(2 * ROWS))
    assert int(state.step) == 1


@pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed: pip install -e '.[pods]'")
def test_memory_beyond_a_pod_is_refused_by_its_compiler_and_the_search_goes_on() -> None:
    """A v5e has 16 GB: its compiler finds no room for the activations of all rows at once."""
    pipeline = SGD @ sc.accumulate(memory="100GB") @ DATA @ sc.grad(wide)
    step = sc.compile(pipeline, mesh=sc.topology("tpu:v5e:2x2"))
    params = {
        "in": jax.ShapeDtypeStruct((4096, 8192), jnp.float32),
        "out": jax.ShapeDtypeStruct((8192, 8), jnp.float32),
    }
    plan = step.lower(step.init(params), {"x": jax.ShapeDtypeStruct((4 * 2**19, 4096), jnp.float32)}).plan
    assert plan.search is not None
    assert [one.outcome for one in plan.search.tried if one.k == 1] == ["refused by the compiler"]
    assert plan.search.chosen is not None and plan.search.chosen > 1


def test_memory_in_run_trains() -> None:
    step = tuning(total(4))
    run = sc.run(step, step.init(WIDE), [rows_of(ROWS)] * 3)
    assert (run.steps, step.traces) == (3, 1)


def test_reference_without_a_k_is_refused() -> None:
    with pytest.raises(sc.ConfigError, match=r"has no k yet"):
        tuning("1GiB").reference.init(WIDE)


SIZE = gpt.Size(layers=1, width=16, heads=2, context=16)
WINDOWS = {"tokens": np.ones((ROWS // 2, SIZE.context + 1), np.int32)}


def convolved(params: Any, rows: Any) -> jax.Array:
    seen = jax.lax.conv_general_dilated(rows["x"], params["kernel"], (1, 1), "SAME")
    return jnp.mean(jnp.square(jax.nn.relu(seen).mean((2, 3)) @ params["out"]))


MODELS: dict[str, tuple[sc.Transform, Any, Any]] = {
    "mlp": (sc.grad(wide), WIDE, rows_of(4 * ROWS)),
    "gpt": (sc.grad(sc.remat() @ gpt.make_loss(SIZE)), gpt.init(jax.random.key(0), SIZE), WINDOWS),
    "convolution": (
        sc.grad(convolved), {"kernel": jnp.ones((8, 2, 3, 3)), "out": jnp.ones((8, 3))},
        {"x": np.ones((ROWS, 2, 12, 12), np.float32)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_chosen_k_fits_and_the_next_smaller_does_not_for_twenty_budgets(name: str) -> None:
    source, params, batch = MODELS[name]
    lowered = {}
    num_rows = len(jax.tree.leaves(batch)[0])
    for k in (2**n for n in range(num_rows.bit_length())):
        step = sc.compile(sc.update(optax.adamw(1e-3)) @ sc.clip(1.0) @ sc.accumulate(k) @ source)
        lowered[k] = step.lower(step.init(params), batch)
    needs = {k: one.compile().memory() for k, one in lowered.items()}
    live = {k: live_bytes(one.jaxpr()) for k, one in lowered.items()}
    totals = {k: one.total for k, one in needs.items()}
    compiled: list[int] = []
    programs = CandidatePrograms(
        tuple(needs), needs[1].arguments, live.__getitem__, lambda k: [needs[k], compiled.append(k)][0]
    )
    for most in np.geomspace(min(totals.values()), max(totals.values()), 20).astype(int).tolist():
        _, chosen = find_smallest_fit(programs, most)
        assert chosen is not None
        assert totals[chosen] <= most
        assert chosen == 1 or totals[chosen // 2] > most
    assert len(compiled) / 20 <= 3
