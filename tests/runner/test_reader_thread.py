"""The thread that reads ahead works under the settings of the caller."""

import contextvars
import decimal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh_of

import stepc as sc

PREFETCH = pytest.mark.parametrize("prefetch", [0, 2])


def loss(params: Any, batch: Any) -> jax.Array:
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


def wide_batches(num: int = 4) -> Iterator[dict[str, np.ndarray]]:
    for number in range(num):
        x = np.random.default_rng(number).normal(size=(4, 3))
        yield {"x": x, "y": x @ np.array([1.0, -2.0, 0.5]), "id": np.full(4, 2**40 + number)}


@PREFETCH
def test_float64_and_int64_batches_stay_wide_under_enable_x64(prefetch: int, tmp_path: Path) -> None:
    seen: list[Any] = []
    with jax.enable_x64(True):
        step = sc.compile(sc.update(optax.sgd(0.1)) @ sc.grad(loss))

        def noting(state: Any, batch: Any) -> Any:
            seen.append({name: leaf.dtype for name, leaf in batch.items()})
            return step(state, batch)

        state = step.init({"w": np.zeros(3)})
        expected = state.params["w"]
        for batch in wide_batches():
            expected = expected - 0.1 * jax.grad(lambda w, batch=batch: loss({"w": w}, batch))(expected)
        data = sc.Data(wide_batches(), prefetch=prefetch)
        keep = sc.Checkpoints(tmp_path, every=2)
        run = sc.run(noting, state, data, checkpoint=keep)
        again = sc.run(noting, state, [], steps=4, checkpoint=keep)  # what was saved and read is as wide
        assert run.state.params["w"].dtype == np.float64
        np.testing.assert_allclose(np.asarray(run.state.params["w"]), np.asarray(expected), rtol=1e-14)
        np.testing.assert_array_equal(np.asarray(again.state.params["w"]), np.asarray(run.state.params["w"]))
    assert seen == [{"x": np.float64, "y": np.float64, "id": np.int64}] * 4


@pytest.mark.parametrize(("devices", "num_placed"), [(1, 0), (2, 3)])
def test_batches_are_placed_ahead_where_that_moves_them(
    devices: int, num_placed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = None if devices == 1 else mesh_of(data=devices)
    shared = sc.grad(loss) if mesh is None else sc.shard(sc.dp("data")) @ sc.grad(loss)
    step = sc.compile(sc.update(optax.sgd(0.1)) @ shared, mesh=mesh)
    put, placed = sc.Step.put, []
    monkeypatch.setattr(sc.Step, "put", lambda step, batch: placed.append(batch) or put(step, batch))
    batches = [{"x": np.ones((4, 3), np.float32), "y": np.ones(4, np.float32)}] * 3
    run = sc.run(step, step.init({"w": np.zeros(3, np.float32)}), sc.Data(batches, prefetch=2))
    assert (run.steps, len(placed), step.traces) == (3, num_placed, 1)


SETTINGS: dict[str, tuple[Callable[[], AbstractContextManager[Any]], Callable[[], Any]]] = {
    "default_device": (lambda: jax.default_device(jax.devices()[3]), lambda: jnp.zeros(1).devices()),
    "matmul_precision": (
        lambda: jax.default_matmul_precision("float32"),
        lambda: jax.config.jax_default_matmul_precision,  # pyright: ignore[reportAttributeAccessIssue]
    ),
    "disable_jit": (jax.disable_jit, lambda: jax.config.jax_disable_jit),  # pyright: ignore[reportAttributeAccessIssue]
    "transfer_guard": (lambda: jax.transfer_guard("allow"), lambda: jax.config.jax_transfer_guard),  # pyright: ignore[reportAttributeAccessIssue]
    "mesh": (lambda: jax.set_mesh(mesh_of(data=4)), lambda: jax.sharding.get_abstract_mesh().shape_tuple),
    "numpy errors": (lambda: np.errstate(divide="raise"), lambda: np.geterr()["divide"]),
    "decimal": (lambda: decimal.localcontext(prec=7), lambda: decimal.getcontext().prec),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_iterator_sees_the_settings_of_the_caller(name: str) -> None:
    setting, look = SETTINGS[name]
    seen: list[Any] = []

    def batches() -> Iterator[Any]:
        seen.append(look())
        yield {"x": np.ones(2, np.float32)}

    def plain(state: Any, batch: Any) -> Any:
        return state, {"loss": jnp.float32(0)}

    before = look()
    state: Any = {"w": jnp.zeros(1)}
    with setting():
        sc.run(plain, state, sc.Data(batches(), prefetch=1))
        assert seen == [look()]
    assert look() == before != seen[0]


def test_iterator_sees_the_context_variables_of_the_caller_and_changes_none() -> None:
    shard: contextvars.ContextVar[int] = contextvars.ContextVar("shard", default=0)
    seen: list[int] = []

    def batches() -> Iterator[Any]:
        seen.append(shard.get())
        shard.set(9)
        yield {"x": np.ones(2, np.float32)}

    shard.set(3)
    state: Any = {"w": jnp.zeros(1)}
    sc.run(lambda state, batch: (state, {"loss": jnp.float32(0)}), state, sc.Data(batches(), prefetch=1))
    assert (seen, shard.get()) == ([3], 3)
