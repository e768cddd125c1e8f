"""Every optimizer of the installed optax: a step equals the hand-written loop, or says why it does not run it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of
from optimizer_table import ALIASES, OTHERS, ROWS, Row, as_text, candidates, exists

import stepc as sc
from stepc._language.optimizers import extra_arguments
from stepc.testing import assert_equal_trees

RESULTS = Path(__file__).parent / "RESULTS.md"
STEPS, NUM_ROWS = 3, 32
# One of each kind: plain, of arrays that mirror no parameter, in a wrapper, of another module, and each extra argument.
QUICK = (
    "adamw", "adafactor", "lion", "partition", "contrib.schedule_free_sgd", "contrib.muon", "contrib.sam",
    "contrib.reduce_on_plateau", "lbfgs", "scale_by_backtracking_linesearch", "contrib.sophia", "an object",
)  # fmt: skip


def shard(zero: int) -> sc.Transform:
    return sc.shard(sc.dp("data", zero=zero))


SETTINGS: dict[str, tuple[Callable[[sc.Transform], sc.Pipeline], int]] = {
    "k=1": (lambda update: update @ sc.grad(loss), 1),
    "k=4": (lambda update: update @ sc.accumulate(4) @ sc.grad(loss), 1),
    "zero=0": (lambda update: update @ sc.accumulate(2) @ shard(0) @ sc.grad(loss), 8),
    "zero=1": (lambda update: update @ shard(1) @ sc.grad(loss), 8),
    "zero=3": (lambda update: update @ sc.accumulate(2) @ shard(3) @ sc.grad(loss), 8),
    "skip": (lambda update: sc.skip_nonfinite() @ update @ sc.accumulate(2) @ sc.grad(loss), 1),
}


def loss(params: Any, rows: Any) -> jax.Array:
    """A positive loss whose Hessian is not constant."""
    error = jnp.tanh(rows["x"] @ params["w"] + params["b"]) - rows["y"]
    return jnp.mean(jnp.sum(error * error, axis=-1))


def fresh_params() -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    return {"w": random.uniform(0.1, 0.5, (8, 8)).astype(np.float32), "b": np.linspace(0.1, 1, 8, dtype=np.float32)}


def batch_of(number: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(number)
    return {
        "x": random.uniform(-1, 1, (NUM_ROWS, 8)).astype(np.float32),
        "y": random.uniform(-1, 1, (NUM_ROWS, 8)).astype(np.float32),
    }


def by_hand(optimizer: Any) -> tuple[Any, Any]:  # Any: an optimizer; trees
    """The loop that optax's documentation shows."""
    names = extra_arguments(optimizer)

    @jax.jit
    def step(params: Any, opt_state: Any, batch: Any) -> tuple[Any, Any]:
        def of_batch(params: Any) -> jax.Array:
            return loss(params, batch)

        value, grad = jax.value_and_grad(of_batch)(params)
        extra = {"value": value, "grad": grad, "value_fn": of_batch, "obj_fn": of_batch}
        given = {name: extra[name] for name in names}
        try:
            updates, opt_state = optimizer.update(grad, opt_state, params, **given)
        except TypeError:
            updates, opt_state = optimizer.update(grad, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params = jax.tree.map(jnp.asarray, fresh_params())
    opt_state = optimizer.init(params)
    for number in range(STEPS):
        params, opt_state = step(params, opt_state, batch_of(number))
    return params, opt_state


def by_step(optimizer: Any, setting: str) -> tuple[Any, Any]:  # Any: as above
    pipeline, devices = SETTINGS[setting]
    step = sc.compile(pipeline(sc.update(optimizer)), mesh=mesh_of(data=devices) if devices > 1 else None)
    state = step.init(fresh_params())
    for number in range(STEPS):
        state, _ = step(state, batch_of(number))
    assert step.traces == 1
    return state.params, state.opt_state


@pytest.fixture(autouse=True)
def rank_promotion() -> Iterator[None]:
    """optax's own code promotes ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


def check(name: str, row: Row) -> None:
    optimizer = row.make()
    if row.refused is not None:
        with pytest.raises(sc.StepcError) as caught:
            by_step(optimizer, "k=1")
        assert row.refused in str(caught.value)
        return
    expected = jax.device_get(by_hand(optimizer))
    for setting in SETTINGS:
        got = jax.device_get(by_step(optimizer, setting))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got[0])), f"{name}, {setting}"
        assert_equal_trees(got, expected, tolerance=row.tolerance, of=f"`{name}` in a step, {setting}, and by hand")


@pytest.mark.parametrize("name", [name for name in QUICK if exists(name)])
def test_an_optimizer_in_a_step_equals_the_hand_written_loop(name: str) -> None:
    check(name, ROWS[name])


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.refused and exists(name)])
def test_an_optimizer_that_no_step_can_run_is_refused(name: str) -> None:
    check(name, ROWS[name])


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if not row.refused and exists(name)])
def test_every_optimizer_in_a_step_equals_the_hand_written_loop(name: str) -> None:
    check(name, ROWS[name])


def test_every_public_name_of_optax_is_in_the_table() -> None:
    """A name that is missing is new in this optax: look at it, and add a row, or add it to `OTHERS`."""
    assert set(candidates()) - ROWS.keys() - OTHERS - ALIASES.keys() == set()


def test_the_results_are_those_of_the_table(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--regold"):
        RESULTS.write_text(as_text())
    assert RESULTS.read_text() == as_text()
