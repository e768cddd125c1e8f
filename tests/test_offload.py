"""A state in the memory of the host: `dp(offload="optimizer")`, and arrays that the caller has put there."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import PROBES, probe_batch, probe_params
from conftest import mesh_of
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import stepc as sc
from stepc._language.state import leaves_by_path
from stepc.testing import assert_equivalent
from stepc.testing.probes import WIDE, wide_params

ADAM = sc.update(optax.adam(1e-2))
HOST = "pinned_host"


def memories(state: sc.State) -> dict[str, str]:
    """The leaves that are not in the memory of the device."""
    kinds = ((path, leaf.sharding.memory_kind) for path, leaf in leaves_by_path(state))
    return {path: kind for path, kind in kinds if kind != "device"}


def moments(*params: str) -> dict[str, str]:
    return {f"opt_state/0/{name}/{path}": HOST for name in ("mu", "nu") for path in params}


def on_host(array: Any, sharding: Any = None) -> jax.Array:
    place = sharding or SingleDeviceSharding(jax.devices()[0])
    return jax.device_put(array, place.with_memory_kind(HOST))


@pytest.mark.parametrize("level", [{}, {"zero": 1}, {"zero": 3}, {"zero": 3, "gather": "layer"}], ids=str)
@pytest.mark.parametrize("outside", ["", "skip", "repeat"])
def test_offloaded_optimizer_state_stays_in_the_memory_of_the_host(level: dict[str, Any], outside: str) -> None:
    rules = sc.shard(sc.dp("data", offload="optimizer", **level), sc.tp({"deep/*": P("model")}, default=P()))
    pipeline = ADAM @ sc.clip(1.0) @ sc.accumulate(2) @ rules @ sc.grad(WIDE["over_rows"])
    batch = probe_batch(32)
    if outside == "skip":
        pipeline = sc.skip_nonfinite(limit=3) @ pipeline
    if outside == "repeat":
        pipeline = sc.repeat(2) @ pipeline
        batch = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), batch)
    step = sc.compile(pipeline, mesh=mesh_of(data=4, model=2))
    state = step.init(wide_params())
    # A scalar has no bytes to save.
    expected = moments("deep/w", "out")
    assert memories(state) == expected
    assert_equivalent(step, state, batch, tolerance=1e-4)  # sums over devices in another order
    compiled = step.lower(state, batch).compile()
    assert all(leaf.aliased for leaf in compiled.donated())
    for _ in range(3):
        state, _ = step(state, batch)
    assert memories(state) == expected
    assert step.traces == 1
    again = step.init(state.params, like=state)
    assert memories(again) == expected
    step(again, batch)
    assert step.traces == 1


def test_plan_and_table_say_what_is_in_the_memory_of_the_host() -> None:
    rules = sc.shard(sc.dp("data", zero=1, offload="optimizer"))
    step = sc.compile(ADAM @ rules @ sc.grad(WIDE["over_rows"]), mesh=mesh_of(data=4))
    state = step.init(wide_params())
    table = step.shardings(state)
    size = 2 * (4 * 8 * 3 * 8 + 4 * 16) // 4  # two moments of `deep/w` and `out`, over four devices
    assert f"bytes per device, {size} in pinned_host\n" in str(table)
    plan = step.lower(state, probe_batch(8)).plan
    note = f"4 leaves of the state, {size} B per device, in the memory of the host: a call moves what it uses to the "
    assert any(one.startswith(note) for one in plan.notes)
    shapes = step.init(jax.eval_shape(wide_params))
    assert str(step.shardings(shapes)) == str(table)
    assert str(step.lower(shapes, probe_batch(8)).plan) == str(plan)


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("has_mesh", [False, True])
def test_arrays_in_the_memory_of_the_host_stay_there(is_frozen: bool, has_mesh: bool) -> None:
    mesh = mesh_of(data=4) if has_mesh else None
    data = sc.shard(sc.dp("data")) if has_mesh else sc.accumulate(2)
    step = sc.compile(ADAM @ data @ sc.grad(PROBES["over_rows"], wrt="b" if is_frozen else "**"), mesh=mesh)
    params = probe_params()
    params["w"] = on_host(params["w"], NamedSharding(mesh, P()) if mesh else None)
    state = step.init(params)
    assert memories(state) == {"params/w": HOST}
    assert_equivalent(step, state, probe_batch(8), tolerance=1e-5)  # as above
    for _ in range(2):
        state, _ = step(state, probe_batch(8))
    assert memories(state) == {"params/w": HOST}
    assert step.traces == 1
    # What is frozen is moved to the device and never back: the new state has the same buffer.
    assert str(step.lower(state, probe_batch(8)).jaxpr()).count("MemorySpace.Host") == (not is_frozen)


def test_leaf_that_the_caller_moves_to_the_host_stays_there() -> None:
    step = sc.compile(ADAM @ sc.grad(PROBES["over_rows"]))
    state = step.init(probe_params())
    mu, nu = state.opt_state[0].mu, state.opt_state[0].nu
    moved = (state.opt_state[0]._replace(mu=jax.tree.map(on_host, mu), nu=nu), *state.opt_state[1:])
    state = sc.State(**{**vars(state), "opt_state": moved})
    for _ in range(3):
        state, _ = step(state, probe_batch(8))
    assert memories(state) == {"opt_state/0/mu/w": HOST, "opt_state/0/mu/b": HOST}
    assert step.traces == 1


def test_model_state_in_the_memory_of_the_host_stays_there() -> None:
    def loss(params: Any, rows: Any, table: Any) -> tuple[jax.Array, Any]:
        return jnp.mean((rows["x"] @ (params["w"] + table["w"]) + params["b"] - rows["y"]) ** 2), table

    source = sc.grad(loss, model_state={"**": "constant"})
    step = sc.compile(ADAM @ sc.shard(sc.dp("data")) @ source, mesh=mesh_of(data=4))
    state = step.init(probe_params(), model_state={"w": on_host(np.ones(3, np.float32))})
    assert_equivalent(step, state, probe_batch(8), tolerance=1e-5)  # as above
    state, _ = step(state, probe_batch(8))
    assert memories(state) == {"model_state/w": HOST}


def test_function_keeps_the_memory_too() -> None:
    rules = sc.shard(sc.dp("data", offload="optimizer"))
    step = sc.compile(ADAM @ rules @ sc.grad(WIDE["over_rows"]), mesh=mesh_of(data=4))
    state = step.init(wide_params())
    new, _ = jax.jit(step.function)(state, probe_batch(8))
    assert memories(new) == moments("deep/w", "out")
    expected, _ = step(state, probe_batch(8))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(new.params), jax.device_get(expected.params))


def test_optimizer_state_that_the_caller_has_put_elsewhere_goes_to_the_memory_of_the_host() -> None:
    rules = sc.shard(sc.dp("data", zero=1, offload="optimizer"))
    step = sc.compile(ADAM @ rules @ sc.grad(WIDE["over_rows"]), mesh=mesh_of(data=4))
    state = step.init(wide_params())
    elsewhere = replace(state, opt_state=jax.device_get(state.opt_state))
    new, _ = step(elsewhere, probe_batch(8))
    assert memories(new) == moments("deep/w", "out")
    assert step.traces == 1


def test_checkpoint_of_a_state_in_the_memory_of_the_host_is_read_on_another_mesh(tmp_path: Path) -> None:
    def step_on(offload: str | None, **axes: int) -> sc.Step:
        rules = sc.shard(sc.dp("data", zero=1, offload=offload))
        return sc.compile(ADAM @ rules @ sc.grad(WIDE["over_rows"]), mesh=mesh_of(**axes))

    step = step_on("optimizer", data=8)
    data = [probe_batch(16, seed=seed) for seed in range(2)]
    saved = sc.run(step, step.init(wide_params()), data, checkpoint=sc.Checkpoints(tmp_path, every=2)).state
    for offload, devices in (("optimizer", 2), (None, 8)):
        like = step_on(offload, data=devices).init(wide_params())
        read = sc.restore(tmp_path, like=like)
        assert memories(read) == memories(like) == (moments("deep/w", "out") if offload else {})
        jax.tree.map(np.testing.assert_array_equal, *jax.device_get((read.opt_state, saved.opt_state)))
        step_on(offload, data=devices)(read, probe_batch(16))
