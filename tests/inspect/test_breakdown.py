"""What the memory of a step is for: the parts are known, and they add up."""

import jax
import jax.numpy as jnp
import optax
import pytest
from conftest import mesh_of
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import stepc as sc
from stepc._compiler.stages import accumulator_bytes

S = jax.ShapeDtypeStruct
IN, OUT = 64 * 128 * 4, 128 * 32 * 4


def loss(params: dict[str, jax.Array], rows: dict[str, jax.Array]) -> jax.Array:
    return jnp.mean((jnp.tanh(rows["x"] @ params["in"]) @ params["out"]) ** 2)


def parts_of(k: int, mesh: jax.sharding.Mesh, *axes: str | None) -> tuple[sc.inspect.Memory, dict[str, int]]:
    pipeline = sc.update(optax.adam(1e-3)) @ sc.accumulate(k) @ sc.shard(sc.dp("data")) @ sc.grad(loss)
    step = sc.compile(pipeline, mesh=mesh)
    placed = NamedSharding(mesh, P(*axes))
    params = {"in": S((64, 128), jnp.float32, sharding=placed), "out": S((128, 32), jnp.float32)}
    compiled = step.lower(step.init(params), {"x": S((256, 64), jnp.float32)}).compile()
    needs = compiled.memory()
    assert sum(part.bytes for part in needs.parts if part.of == "arguments") == needs.arguments
    assert sum(part.bytes for part in needs.parts if part.of == "temporaries") == needs.temporaries
    return needs, {part.name: part.bytes for part in needs.parts}


def test_parts_of_arguments_are_those_of_the_state_and_the_batch() -> None:
    _, parts = parts_of(4, mesh_of(data=8))
    assert parts["parameters"] == IN + OUT
    assert parts["optimizer state"] == 2 * (IN + OUT) + 4
    assert parts["rest of the state"] == 4 + 8
    assert parts["batch"] == 256 // 8 * 64 * 4


def test_parts_of_leaves_sharded_over_a_model_axis_are_those_of_one_shard() -> None:
    _, parts = parts_of(4, mesh_of(data=4, model=2), None, "model")
    assert parts["parameters"] == IN // 2 + OUT
    assert parts["batch"] == 256 // 4 * 64 * 4


def test_leaf_of_the_batch_that_no_operation_uses_takes_nothing() -> None:
    step = sc.compile(sc.update(optax.sgd(1e-3)) @ sc.shard(sc.dp("data")) @ sc.grad(loss), mesh=mesh_of(data=8))
    state = step.init({"in": S((64, 128), jnp.float32), "out": S((128, 32), jnp.float32)})
    rows = S((256, 64), jnp.float32)
    made = step.lower(state, {"x": rows, "unused": rows}).compile()
    parts = {part.name: part.bytes for part in made.memory().parts}
    assert parts["batch"] == 256 // 8 * 64 * 4
    made.check(sc.Budget(gradient_reductions=1, donated=True))


@pytest.mark.parametrize("k", [2, 8])
def test_parts_of_temporaries_name_the_accumulator_whatever_k(k: int) -> None:
    needs, parts = parts_of(k, mesh_of(data=8))
    assert parts["accumulator"] == IN + OUT
    assert "\n  accumulator " in str(needs)


def test_parts_without_accumulation_have_no_accumulator() -> None:
    _, parts = parts_of(1, mesh_of(data=8))
    assert "accumulator" not in parts


def test_accumulator_of_a_loop_that_carries_other_shapes_is_none() -> None:
    program = jax.jit(lambda x: jax.lax.fori_loop(0, 8, lambda _, c: jnp.sin(c), x)).lower(S((8, 4), jnp.float32))
    assert accumulator_bytes(program.compile(), [(8, 4)]) == 8 * 4 * 4
    assert accumulator_bytes(program.compile(), [(8, 4), (8, 4)]) == 0
    assert accumulator_bytes(program.compile(), [(4, 8)]) == 0
