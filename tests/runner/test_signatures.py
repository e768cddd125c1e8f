"""`Data(signatures="many")`: batches of several shapes, each compiled once."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from faults.plan import Remembering

import stepc as sc
from stepc.testing import assert_equal_trees

LENGTHS = (8, 16, 8, 8, 16, 4, 16)


def loss(params: Any, rows: Any) -> sc.Mean:
    tokens = jnp.tanh(rows["tokens"] * params["w"]) ** 2 * rows["mask"][:, None]
    return sc.Mean(tokens.sum(), rows["mask"].sum() * tokens.shape[1])


def batch_of(length: int, rows: int = 4, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(length + rows).normal(size=(rows, length))
    return {"tokens": numbers.astype(dtype), "mask": np.ones(rows, np.float32)}


def step_and_state() -> tuple[sc.Step, sc.State]:
    step = sc.compile(sc.update(optax.sgd(0.5)) @ sc.accumulate(2) @ sc.grad(loss))
    return step, step.init({"w": jnp.ones(())})


def by_a_loop(batches: list[Any]) -> Any:
    step, state = step_and_state()
    for batch in batches:
        state, _ = step(state, batch)
    return jax.device_get(state.params)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_each_signature_is_compiled_once(prefetch: int) -> None:
    batches, (step, state), logger = [batch_of(length) for length in LENGTHS], step_and_state(), Remembering()
    run = sc.run(step, state, sc.Data(batches, prefetch=prefetch, signatures="many"), loggers=[logger])
    assert (run.steps, step.traces) == (len(LENGTHS), 3)
    assert_equal_trees(jax.device_get(run.state.params), by_a_loop(batches), tolerance=0.0, of="a run and a loop")
    told = [(at, facts) for name, facts, at in logger.events if name == "recompiled"]
    why = "a batch of mask host float32[4], tokens host float32[4, {}]".format
    assert told == [(2, {"times": "1", "why": why(16)}), (6, {"times": "2", "why": why(4)})]
    assert logger.names().count("plan") == 1


def test_the_number_of_signatures_is_bounded() -> None:
    step, state = step_and_state()
    data = sc.Data([batch_of(length) for length in LENGTHS], signatures="many")
    with pytest.raises(sc.BuildError, match="Step 6 was compiled again: 2 times in this run, 1 allowed") as raised:
        sc.run(step, state, data, watchdog=sc.Watchdog(max_recompiles=1))
    assert raised.value.state_ok and raised.value.step == 6


def test_one_signature_refuses_another_length() -> None:
    step, state = step_and_state()
    with pytest.raises(sc.DataError, match="is not that of the first batch"):
        sc.run(step, state, [batch_of(8), batch_of(16)])


@pytest.mark.parametrize(
    ("other", "expected", "got"),
    [
        (batch_of(16, dtype=np.int32), "tokens  expected float32, got int32", ""),
        ({"tokens": batch_of(16)["tokens"]}, "mask  expected float32, got nothing", ""),
    ],
    ids=["dtype", "leaf"],
)
def test_only_shapes_may_differ(other: Any, expected: str, got: str) -> None:
    step, state = step_and_state()
    with pytest.raises(sc.DataError, match="differs from the first in more than its shapes") as raised:
        sc.run(step, state, sc.Data([batch_of(8), other], signatures="many"))
    assert expected in str(raised.value.__cause__)


@pytest.mark.parametrize("short", ["raise", "drop", "pad"])
def test_short_batch_is_one_of_fewer_rows_than_an_earlier_one_of_its_length(short: str) -> None:
    batches = [batch_of(8), batch_of(16), batch_of(16, rows=2)]
    step, state = step_and_state()
    run = sc.run(step, state, sc.Data(batches, short_batches=short, signatures="many"))
    assert (run.steps, step.traces) == {"raise": (3, 3), "drop": (2, 2), "pad": (3, 2)}[short]
    kept = batches[:2] if short == "drop" else batches
    # A padded sum adds rows of zeros, in another order.
    assert_equal_trees(jax.device_get(run.state.params), by_a_loop(kept), tolerance=1e-6, of="a run and a loop")


def test_short_batch_is_filled_up_to_the_fewest_rows_there_are() -> None:
    step, state = step_and_state()
    batches = [batch_of(8, rows=8), batch_of(8, rows=16), batch_of(8, rows=6), batch_of(8, rows=12)]
    run = sc.run(step, state, sc.Data(batches, short_batches="pad", signatures="many"))
    assert (run.steps, step.traces) == (4, 2)
    logged: list[int] = []
    placed = sc.Data(
        batches, short_batches="pad", signatures="many", place=lambda one: logged.append(len(one["mask"])) or one
    )
    step, state = step_and_state()
    sc.run(step, state, placed)
    assert logged == [8, 16, 8, 16]


def test_a_resumed_run_may_begin_with_another_length(tmp_path: Path) -> None:
    batches = [batch_of(length) for length in LENGTHS]
    step, state = step_and_state()
    saved = sc.Checkpoints(tmp_path, every=1, keep=9)
    sc.run(step, state, sc.Data(batches[:1], signatures="many"), checkpoint=saved)
    step, state = step_and_state()
    run = sc.run(step, state, sc.Data(batches[1:], signatures="many"), checkpoint=saved)
    assert run.steps == len(LENGTHS)
    assert_equal_trees(jax.device_get(run.state.params), by_a_loop(batches), tolerance=0.0, of="a run and a loop")
