"""A compiled step names the user's own lines: of the loss, and of the transforms, for every k and mesh."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from conftest import mesh_of
from jax.sharding import PartitionSpec as P

import stepc as sc
from stepc.inspect.hlo import Instruction, parse

ROWS = 128  # 4 for each of 4 microbatches on 8 devices: XLA drops the metadata of a product of one row


def loss(params: dict[str, jax.Array], rows: dict[str, jax.Array]) -> jax.Array:
    hidden = jnp.tanh(rows["x"] @ params["w"])
    return jnp.mean((hidden @ params["v"] - rows["y"]) ** 2)


PARAMS = {"w": jnp.ones((4, 16)), "v": jnp.ones((16, 2))}
BATCH = {"x": jnp.ones((ROWS, 4)), "y": jnp.ones((ROWS, 2))}


def compiled(pipeline: sc.Pipeline, devices: int) -> sc.Compiled:
    step = sc.compile(pipeline, mesh=mesh_of(data=devices))
    return step.lower(step.init(PARAMS), BATCH).compile()


def instructions(text: str) -> list[tuple[str, Instruction]]:
    """Each instruction that has metadata, with its source."""
    module = parse(text)
    return [
        (module.source(one), one)
        for computation in module.computations.values()
        for one in computation.instructions.values()
        if one.op_name
    ]


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("objective", [loss, sc.remat() @ loss], ids=["plain", "remat"])
def test_operations_of_the_loss_name_its_lines(
    objective: Callable[..., jax.Array] | sc.Pipeline, k: int, devices: int
) -> None:
    pipeline = sc.update(optax.adam(1e-3)) @ sc.clip(1.0) @ sc.accumulate(k) @ sc.shard(sc.dp("data"))
    found = instructions(compiled(pipeline @ sc.grad(objective), devices).hlo())
    first = loss.__code__.co_firstlineno
    products = {source.partition(" ")[0] for source, one in found if one.opcode == "dot"}
    assert products == {f"test_sources.py:{first + 1}", f"test_sources.py:{first + 2}"}
    assert {source.partition(" ")[0] for source, one in found if one.opcode == "tanh"} == {
        f"test_sources.py:{first + 1}"
    }
    # A path in brackets after the line does not repeat the scopes of stepc.
    assert not [source for source, _ in found if source.startswith("test_sources.py") and "stepc:" in source]


@pytest.mark.parametrize("k", [1, 4])
def test_collectives_of_the_loss_name_its_line_and_those_of_the_gradient_their_transform(k: int) -> None:
    line = loss.__code__.co_firstlineno + 2
    tensors = {"w": P(None, "model"), "v": P("model")}
    shard = sc.shard(sc.dp("data"), sc.tp(tensors))
    step = sc.compile(
        sc.update(optax.sgd(0.5)) @ sc.accumulate(k) @ shard @ sc.grad(loss), mesh=mesh_of(data=4, model=2)
    )
    program = step.lower(step.init(PARAMS), BATCH).compile()
    sources = {row.source.partition(" (jit")[0]: row.executions for row in program.collectives()}
    assert sources == {f"test_sources.py:{line}": k, f"{shard!r} ({shard.site})": 1, "gradient_norm/reduce_sum": 1}
    # What is built on them says the same: a budget names the line that breaks it, the page shows it.
    if k > 1:
        with pytest.raises(sc.BudgetError, match=rf"test_sources\.py:{line}"):
            program.check(sc.Budget(collectives_in_loops=0))
    assert f"test_sources.py:{line}" in str(program.facts().collectives)


def test_a_reduction_that_no_transform_asks_for_says_what_it_is() -> None:
    pipeline = sc.update(optax.sgd(0.5)) @ sc.accumulate(4) @ sc.shard(sc.dp("data", zero=1)) @ sc.grad(loss)
    sources = " ".join(row.source for row in compiled(pipeline, 8).collectives())
    assert "gradient_norm" in sources
    assert "lowering.py" not in sources


def test_a_profile_can_be_read_by_the_scopes_of_the_transforms() -> None:
    ema, update, clip, rows = sc.ema(0.5), sc.update(optax.adam(1e-3)), sc.clip(1.0), sc.rows()
    inner, grad = sc.clip(2.0), sc.grad(sc.cast(jnp.bfloat16) @ loss)
    text = compiled(ema @ update @ clip @ sc.accumulate(4) @ rows @ inner @ grad, 1).hlo()
    for transform in (ema, update, clip, rows, inner, grad):
        assert f"stepc:{transform!r} ({transform.site})".replace(" @ ", " . ") in text, transform


def test_a_name_with_an_at_sign_keeps_its_line() -> None:
    """XLA drops what follows an `@` in a name: of a composition of two shards, the line and the second."""
    inner, outer = sc.shard(sc.dp("data")), sc.shard(sc.dp("replica"))
    step = sc.compile(
        sc.update(optax.sgd(0.5)) @ outer @ sc.accumulate(2) @ inner @ sc.grad(loss), mesh=mesh_of(replica=2, data=4)
    )
    sources = {row.source for row in step.lower(step.init(PARAMS), BATCH).compile().collectives()}
    assert sources == {f"{outer!r} @ {inner!r} ({outer.site})"}


def scanning(params: dict[str, jax.Array], rows: dict[str, jax.Array]) -> jax.Array:
    hidden, _ = jax.lax.scan(lambda hidden, w: (jnp.tanh(hidden @ w), None), rows["x"], params["layers"])
    return jnp.mean((hidden @ params["head"] - rows["y"]) ** 2)


ALL = {"head, layers"}
EACH = {"head", "layers"}
LEVELS: list[tuple[dict[str, Any], dict[str, set[str]]]] = [
    ({"zero": 0}, {"all-reduce": ALL}),
    ({"zero": 1}, {"reduce-scatter": EACH, "all-reduce": {""}, "all-gather": EACH}),
    ({"zero": 2}, {"reduce-scatter": EACH, "all-reduce": {""}, "all-gather": EACH}),
    ({"zero": 3}, {"all-gather": EACH, "reduce-scatter": EACH, "all-reduce": {""}}),
    ({"zero": 3, "gather": "microbatch"}, {"all-gather": EACH, "reduce-scatter": EACH, "all-reduce": {""}}),
    ({"zero": 3, "gather": "layer"}, {"all-gather": EACH, "reduce-scatter": EACH, "all-reduce": {""}}),
]


@pytest.mark.parametrize(("level", "carried"), LEVELS, ids=lambda one: str(one) if "zero" in one else "")
def test_collectives_of_every_level_name_their_transform_and_their_parameters(
    level: dict[str, Any], carried: dict[str, set[str]]
) -> None:
    shard, clip, update = sc.shard(sc.dp("data", **level)), sc.clip(1.0), sc.update(optax.adam(0.5))
    step = sc.compile(update @ clip @ sc.accumulate(4) @ shard @ sc.grad(scanning), mesh=mesh_of(data=4))
    state = step.init({"layers": jnp.ones((3, 8, 8)), "head": jnp.ones((8, 4))})
    program = step.lower(state, {"x": jnp.ones((ROWS, 8)), "y": jnp.ones((ROWS, 4))}).compile()
    of_shard, of_clip = f"{shard!r} ({shard.site})", f"{clip!r} ({clip.site})"
    sources = {source for row in program.collectives() for source in row.source.split(", ")}
    # Since jax 0.11, XLA names the update for the gather of what it updates.
    of_update = set() if jax.__version_info__ < (0, 11) else {f"{update!r} ({update.site})"}
    assert sources <= {of_shard, of_clip, "gradient_norm/reduce_sum", *of_shard.split(", "), *of_update}
    assert all(
        of_shard in row.source or {row.kind, row.source} <= {"all-gather", *of_update} for row in program.collectives()
    )
    named = {row.kind: set[str]() for row in program.collectives()}
    for row in program.collectives():
        named[row.kind].add(row.parameters)
    assert named == carried
    # Nothing else names a file of ours either. optax has an `update.py` of its own.
    ours = {path.name for path in Path(sc.__file__).parent.rglob("*.py")} - {"update.py"}
    every = {name for source, _ in instructions(program.hlo()) for name in re.findall(r"([\w.]+\.py):", source)}
    assert "test_sources.py" in every
    assert not ours & every
    assert "stepc-leaves" not in "".join(source for source, _ in instructions(program.hlo()))


def test_parameters_of_a_large_model_are_patterns() -> None:
    def total(params: Any, rows: dict[str, jax.Array]) -> jax.Array:
        return jnp.mean(rows["x"]) * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))

    params = {"layers": [{"w": jnp.ones(3)} for _ in range(12)], "a(b": jnp.ones(2)}
    step = sc.compile(sc.update(optax.sgd(0.5)) @ sc.shard(sc.dp("data")) @ sc.grad(total), mesh=mesh_of(data=2))
    program = step.lower(step.init(params), BATCH).compile()
    assert [row.parameters for row in program.collectives()] == ["a?b, layers/*/w x12"]
    heading, row = str(program.collectives()).splitlines()
    assert heading.split() == "kind size axes executions in loop parameters source".split()
    assert "  a?b, layers/*/w x12  " in row
