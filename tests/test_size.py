"""A program grows linearly with its leaves, and nothing of the user's is traced more often than it must be."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from conftest import mesh_of

import stepc as sc
from stepc._compiler.layers import programs_in

S = jax.ShapeDtypeStruct
SHARDED = [{}, {"zero": 1}, {"zero": 3, "gather": "layer"}]


def lowered(num_blocks: int, level: dict[str, Any]) -> tuple[sc.Lowered, Counter[str]]:
    """A step of blocks of two leaves in each of two scanned layers, and how often the user's functions ran in it."""
    calls, made = Counter[str](), optax.adamw(1e-3)

    def layer(stream: jax.Array, blocks: Any) -> tuple[jax.Array, None]:
        for block in blocks:
            stream = jax.nn.relu(stream @ block["kernel"] + block["bias"][None])
        return stream, None

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        calls["loss"] += 1
        return jnp.mean(jax.lax.scan(jax.checkpoint(layer), rows, params)[0] ** 2)

    def init(params: Any) -> Any:
        calls["init"] += 1
        return made.init(params)

    def update(*given: Any) -> Any:
        calls["update"] += 1
        return made.update(*given)

    gradient = sc.clip(1.0) @ sc.accumulate(2) @ sc.shard(sc.dp("data", **level)) @ sc.grad(loss)
    step = sc.compile(sc.update(optax.GradientTransformation(init, update)) @ gradient, mesh=mesh_of(data=2))
    state = step.init([{"kernel": S((2, 4, 4), jnp.float32), "bias": S((2, 4), jnp.float32)}] * num_blocks)
    calls.clear()
    return step.lower(state, S((8, 4), jnp.float32)), calls


def equations(jaxpr: Any) -> Iterator[Any]:  # Any, twice: a program, and its equations
    for equation in jaxpr.eqns:
        yield equation
        for inner in programs_in(equation):
            yield from equations(inner)


def num_equations(jaxpr: Any) -> int:
    return len(list(equations(jaxpr)))


@pytest.mark.parametrize("level", SHARDED, ids=str)
def test_equations_of_a_step_grow_linearly_with_the_leaves(level: dict[str, Any]) -> None:
    two, four, six = (num_equations(lowered(blocks, level)[0].jaxpr().jaxpr) for blocks in (2, 4, 6))
    assert six - four == four - two


@pytest.mark.parametrize(("level", "for_each_leaf"), [({}, 0), ({"zero": 1}, 4), ({"zero": 3}, 2)], ids=str)
def test_constraints_say_nothing_that_the_shardings_of_the_results_say(
    level: dict[str, Any], for_each_leaf: int
) -> None:
    step, _ = lowered(2, level)
    found = [one for one in equations(step.jaxpr().jaxpr) if one.primitive.name == "sharding_constraint"]
    assert len(found) == 4 * for_each_leaf


def test_lowering_traces_loss_and_gradient_once_and_the_optimizer_once() -> None:
    _, calls = lowered(1, {})
    assert calls == {"loss": 1, "update": 1}


def test_init_traces_the_init_of_the_optimizer_once() -> None:
    calls, made = [], optax.adamw(1e-3)

    def init(params: Any) -> Any:
        calls.append(1)
        return made.init(params)

    gradient = sc.shard(sc.dp("data")) @ sc.grad(lambda params, rows: jnp.mean(rows @ params))
    step = sc.compile(sc.update(optax.GradientTransformation(init, made.update)) @ gradient, mesh=mesh_of(data=2))
    step.init(jnp.ones(4))
    assert len(calls) == 1


def test_gradient_is_known_to_reach_all_parameters_without_tangents(monkeypatch: pytest.MonkeyPatch) -> None:
    def traced(*_: Any) -> Any:
        raise AssertionError("tangents are traced")

    monkeypatch.setattr(jax, "jvp", traced)
    lowered(1, {})


def test_step_takes_the_sum_of_squares_of_each_leaf_once() -> None:
    step, _ = lowered(5, {})
    squares = [one for one in equations(step.traced.jaxpr.jaxpr) if one.primitive.name == "square"]
    assert len(squares) == 5 * 2  # the step asks whether they are finite, and `clip` for their norm
