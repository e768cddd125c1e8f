"""Compiling for pods that this machine does not have. A test whose compiler is not installed is skipped."""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import stepc as sc
from stepc.inspect.roofline import DEVICES, device_of

HAS = {
    "tpu": importlib.util.find_spec("libtpu") is not None,
    "gpu": importlib.util.find_spec("jax_plugins") is not None
    and importlib.util.find_spec("jax_plugins.xla_cuda13") is not None,
}
needs_tpu = pytest.mark.skipif(not HAS["tpu"], reason="libtpu is not installed: pip install -e '.[pods]'")
needs_gpu = pytest.mark.skipif(not HAS["gpu"], reason="jax-cuda13-pjrt is not installed: pip install -e '.[pods]'")
PODS = [
    pytest.param("tpu:v5e:4x4", marks=needs_tpu),
    pytest.param("tpu:v6e:4x4", marks=needs_tpu),
    pytest.param("tpu:v5p:2x2x4", marks=needs_tpu),
    pytest.param("gpu:h100:2x8", marks=needs_gpu),
]
S = jax.ShapeDtypeStruct


def loss(params: dict[str, jax.Array], rows: dict[str, jax.Array]) -> jax.Array:
    return jnp.mean((jnp.tanh(rows["x"] @ params["in"]) @ params["out"] - rows["y"]) ** 2)


def compiled(mesh: jax.sharding.Mesh, k: int, **rules: Any) -> sc.Compiled:
    shard = sc.shard(sc.dp("data", **rules))
    step = sc.compile(sc.update(optax.adamw(1e-3)) @ sc.clip(1.0) @ sc.accumulate(k) @ shard @ sc.grad(loss), mesh=mesh)
    state = step.init({"in": S((256, 512), jnp.float32), "out": S((512, 128), jnp.float32)})
    batch = {"x": S((512, 256), jnp.float32), "y": S((512, 128), jnp.float32)}
    return step.lower(state, batch).compile()


@pytest.mark.parametrize("name", PODS)
def test_step_for_a_pod_reduces_each_element_once_whatever_k(name: str) -> None:
    budget = sc.Budget(gradient_reductions=1, collectives_in_loops=0, donated=True)
    mesh = sc.topology(name)
    bytes_ = set()
    for k in (1, 4, 8):
        program = compiled(mesh, k)
        program.check(budget)
        bytes_.add(program.collectives().executed_bytes)
        assert {axis for row in program.collectives() for axis in row.axes} == {"data"}
    assert len(bytes_) == 1


@needs_gpu
def test_offload_for_a_topology_that_describes_no_memories_is_refused() -> None:
    with pytest.raises(sc.ConfigError) as refused:
        compiled(sc.topology("gpu:h100:2x8"), 1, offload="optimizer")
    assert str(refused.value) == (
        "`opt_state/0/mu/in` is to be in the memory 'pinned_host', which the devices of the mesh do not describe.\n\n"
        "  device  NVIDIA H100 80GB HBM3\n\n"
        "  Leave out `offload` for these devices."
    )


@needs_tpu
def test_offload_compiles_for_a_topology_that_describes_its_memories() -> None:
    kinds = compiled(sc.topology("tpu:v5e:4x4"), 1, offload="optimizer").executable.input_shardings[0][0]
    assert kinds.opt_state[0].mu["in"].memory_kind == "pinned_host"


@pytest.mark.parametrize("name", PODS)
@pytest.mark.parametrize(("rules", "times"), [({"zero": 1}, 1), ({"zero": 2}, 4), ({"zero": 3, "gather": "layer"}, 4)])
def test_accumulator_stays_sharded_on_a_pod(name: str, rules: dict[str, Any], times: int) -> None:
    # A leaf whose shards are no whole tiles of a TPU is all-reduced there and cut.
    rows = compiled(sc.topology(name), 4, **rules).collectives()
    sums = [row for row in rows if row.kind in ("reduce-scatter", "all-reduce") and row.bytes > 1000]  # no scalars
    assert {row.executions for row in sums} == {times}


@pytest.mark.parametrize("name", PODS)
def test_topology_of_a_pod_lays_its_devices_along_the_axes(name: str) -> None:
    mesh = sc.topology(name, data=8, model=2)
    assert dict(mesh.shape) == {"data": 8, "model": 2}
    assert mesh.axis_types == (jax.sharding.AxisType.Auto,) * 2
    assert device_of(mesh.devices.flat[0].device_kind) == DEVICES[name.rpartition(":")[0]]
    with pytest.raises(sc.ConfigError, match="has 16 devices; the mesh asks for data=3"):
        sc.topology(name, data=3)


@needs_tpu
def test_topology_of_a_whole_pod_has_thousands_of_chips() -> None:
    assert sc.topology("tpu:v5p:8x16x16", data=512, model=4).size == 2048


@needs_tpu
def test_topology_that_cannot_be_is_a_message() -> None:
    with pytest.raises(sc.ConfigError, match="libtpu has no topology tpu:v5e:3x5"):
        sc.topology("tpu:v5e:3x5")


@needs_gpu
def test_topology_of_an_unknown_gpu_is_a_message() -> None:
    with pytest.raises(sc.ConfigError, match="unknown GPU 'k80'"):
        sc.topology("gpu:k80:8")


def test_devices_have_a_source_and_are_found_by_what_jax_calls_them() -> None:
    for name, row in DEVICES.items():
        assert row.source.startswith("https://")
        assert device_of(row.kind) == row == DEVICES[name]
    assert device_of("cpu") is None
