"""Resuming with something changed: what may change does, and what changed is said."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from faults.plan import FaultPlan, Remembering, batch_of, by_a_plain_loop, digest, loss

import stepc as sc

RATES = {"old": optax.adam(1e-3), "new": optax.adam(3e-4)}
decaying = optax.adam(optax.cosine_decay_schedule(1e-3, 100))


def of(tx: Any) -> Any:
    return sc.update(tx) @ sc.clip(1.0) @ sc.accumulate(2) @ sc.grad(loss)


CHANGES: dict[str, tuple[Any, Any, str, str]] = {
    "optimizer": (
        sc.update(optax.adam(1e-3)) @ sc.clip(1.0) @ sc.grad(loss),
        sc.update(optax.adamw(1e-3)) @ sc.clip(1.0) @ sc.grad(loss),
        "update(optax.adam(1e-3))",
        "update(optax.adamw(1e-3))",
    ),
    "rate in a variable": (
        of(RATES["old"]),
        of(RATES["new"]),
        "update(tx) with scale.step_size=-0.001",
        "update(tx) with scale.step_size=-0.0003",
    ),
    "optimizer in a variable": (
        of(RATES["old"]),
        of(optax.adamw(1e-3, weight_decay=0.25)),
        "update(tx) with none",
        "update(tx) with add_decayed_weights.weight_decay=0.25",
    ),
    "clip and k": (
        of(RATES["old"]),
        sc.update(RATES["old"]) @ sc.clip(0.5) @ sc.accumulate(4) @ sc.grad(loss),
        "update(tx) @ clip(1.0) @ accumulate(2)",
        'update(RATES["old"]) @ clip(0.5) @ accumulate(4)',
    ),
    "one less": (
        of(RATES["old"]),
        sc.update(RATES["old"]) @ sc.accumulate(2) @ sc.grad(loss),
        "update(tx) @ clip(1.0)",
        'update(RATES["old"])',
    ),
}


def trained(pipeline: Any, folder: Path, steps: int, data: Any = None, **options: Any) -> tuple[sc.Run, Remembering]:
    step, logger = sc.compile(pipeline), Remembering()
    data = FaultPlan().batches(20) if data is None else data
    state = step.init({"w": np.zeros(3, np.float32)}, seed=7)
    keep = sc.Checkpoints(folder, every=100, **options)
    return sc.run(step, state, data, steps=steps, checkpoint=keep, loggers=[logger]), logger


@pytest.mark.parametrize("name", CHANGES)
def test_pipeline_that_changed_resumes_and_says_what_changed(name: str, tmp_path: Path) -> None:
    before, now, was, instead = CHANGES[name]
    first, _ = trained(before, tmp_path, 3)
    run, logger = trained(now, tmp_path, 5)
    assert [facts for event, facts, _ in logger.events if event == "pipeline_changed"] == [{"was": was, "now": instead}]
    by_hand = sc.compile(now)
    like = by_hand.init({"w": np.zeros(3, np.float32)})
    state = jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(first.state))
    for number in (4, 5):
        state, _ = by_hand(state, batch_of(number))
    assert digest(run.state) == digest(state)


@pytest.mark.parametrize("pipeline", [of(decaying), of(RATES["old"])])
def test_pipeline_that_stays_is_no_event(pipeline: Any, tmp_path: Path) -> None:
    trained(pipeline, tmp_path, 3)
    _, logger = trained(pipeline, tmp_path, 5)
    assert "resumed" in logger.names() and "pipeline_changed" not in logger.names()


def test_function_of_the_users_own_is_known_by_its_name(tmp_path: Path) -> None:
    def plain(state: Any, batch: Any) -> Any:
        return state, {"loss": jnp.float32(0)}

    def other(state: Any, batch: Any) -> Any:
        return state, {"loss": jnp.float32(0)}

    state: Any = {"w": jnp.zeros(1)}
    events = []
    for step, steps in ((plain, 2), (plain, 4), (other, 6)):
        logger = Remembering()
        keep = sc.Checkpoints(tmp_path, every=100)
        sc.run(step, state, FaultPlan().batches(20), steps=steps, checkpoint=keep, loggers=[logger])
        events.append([facts["now"].split(".")[-1] for name, facts, _ in logger.events if name == "pipeline_changed"])
    assert events == [[], [], ["other>"]]


def on_devices(batches: Any) -> Any:
    read = batches.plan.batch
    batches.plan.batch = lambda number: jax.tree.map(jnp.asarray, read(number))
    return batches


@pytest.mark.parametrize("prefetch", [(0, 3), (3, 0)])
@pytest.mark.parametrize("kind", ["numpy to jax", "jax to numpy", "same"])
def test_prefetching_and_the_kind_of_arrays_may_change(prefetch: Any, kind: str, tmp_path: Path) -> None:
    made = [FaultPlan().batches(20), FaultPlan().batches(20)]
    for which in {"numpy to jax": [1], "jax to numpy": [0], "same": []}[kind]:
        on_devices(made[which])
    pipeline = sc.update(optax.adam(0.05)) @ sc.clip(10.0) @ sc.grad(loss)
    for batches, ahead, steps in zip(made, prefetch, (4, 9), strict=True):
        run, logger = trained(pipeline, tmp_path, steps, sc.Data(batches, prefetch=ahead))
    assert digest(run.state) == digest(by_a_plain_loop(list(range(1, 10))))
    assert "data_not_checked" not in logger.names()


def test_batch_size_may_change_if_that_is_meant(tmp_path: Path) -> None:
    pipeline = sc.update(optax.adam(0.05)) @ sc.clip(10.0) @ sc.grad(loss)
    first, _ = trained(pipeline, tmp_path, 4)
    larger = FaultPlan().batches(20)
    larger.plan.batch = lambda number: batch_of(number, rows=8)
    with pytest.raises(sc.DataError) as raised:
        trained(pipeline, tmp_path, 6, larger)
    assert str(raised.value).startswith(
        "The data failed before step 5: BatchError: The signature of this batch is not that of the batches before the "
        "checkpoint.\n"
    )
    assert "n  expected int32[4], got int32[8]\n" in str(raised.value)
    assert "  If that is meant: Checkpoints(…, check_data=False).\n" in str(raised.value)
    run, _ = trained(pipeline, tmp_path, 6, larger, check_data=False)
    state, step = first.state, sc.compile(pipeline)
    for number in (5, 6):
        state, _ = step(state, batch_of(number, rows=8))
    assert digest(run.state) == digest(state)
