"""Shardings: by `zero` over the axis of the rows, by rules over model axes; and what they cost."""

import re
from collections import Counter
from collections.abc import Iterator
from functools import reduce
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from catalogue import PROBES, every_probe, probe_batch
from conftest import mesh_of
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import stepc as sc
from stepc._compiler.layers import programs_in
from stepc._language.state import leaves_by_path
from stepc.testing import assert_equivalent
from stepc.testing.probes import WIDE, wide, wide_params
from stepc.testing.strategies import batches, meshes, pipelines, tensor_rules

LEVELS: dict[str, dict[str, Any]] = {
    "zero0": {}, "zero1": {"zero": 1}, "zero2": {"zero": 2}, "zero3": {"zero": 3},
    "zero3_microbatch": {"zero": 3, "gather": "microbatch"}, "zero3_layer": {"zero": 3, "gather": "layer"},
    "zero3_layer_step": {"zero": 3, "gather": ("layer", "step")},
}  # fmt: skip
SGD = sc.update(optax.sgd(0.5, momentum=0.5))
OPTIMIZERS: dict[str, optax.GradientTransformation] = {
    "momentum": optax.sgd(0.5, momentum=0.5),
    "adamw": optax.adamw(1e-2),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=3),
    "masked": optax.chain(
        optax.masked(optax.trace(0.9), {"deep": {"w": True}, "out": False, "b": True}), optax.scale(-0.5)
    ),
    "multi": optax.multi_transform(
        {"fast": optax.adam(1e-2), "slow": optax.sgd(0.1, momentum=0.9)},
        {"deep": {"w": "fast"}, "out": "slow", "b": "slow"},
    ),
}

# The spec of a leaf of the optimizer state on (data 4, model 2): with zero=0, and with zero > 0.
REPLICATED, OUT, DEEP = (P(), P()), (P(), P("data")), (P("model"), P("model", None, "data"))
ROWS, COLUMNS = (P("model"), P("model")), (P(), P(None, "data"))  # factors [8, 3] and [3, 8] of [8, 3, 8]
FAST, SLOW = "inner_states/fast/inner_state/0", "inner_states/slow/inner_state/0"
SLOTS: dict[str, dict[str, tuple[P, P]]] = {
    "momentum": {"0/trace/b": REPLICATED, "0/trace/deep/w": DEEP, "0/trace/out": OUT},
    "adamw": {
        "0/count": REPLICATED,
        "0/mu/b": REPLICATED, "0/mu/deep/w": DEEP, "0/mu/out": OUT,
        "0/nu/b": REPLICATED, "0/nu/deep/w": DEEP, "0/nu/out": OUT,
    },
    "adafactor": {
        "0/count": REPLICATED,
        "0/v_row/b": REPLICATED, "0/v_row/deep/w": ROWS, "0/v_row/out": REPLICATED,
        "0/v_col/b": REPLICATED, "0/v_col/deep/w": COLUMNS, "0/v_col/out": REPLICATED,
        "0/v/b": REPLICATED, "0/v/deep/w": REPLICATED, "0/v/out": OUT,
    },
    "masked": {"0/inner_state/trace/b": REPLICATED, "0/inner_state/trace/deep/w": DEEP},
    "multi": {
        f"{FAST}/count": REPLICATED, f"{FAST}/mu/deep/w": DEEP, f"{FAST}/nu/deep/w": DEEP,
        f"{SLOW}/trace/b": REPLICATED, f"{SLOW}/trace/out": OUT,
    },
}  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
def test_levels_equal_the_reference_bitwise_on_whole_numbers(level: str) -> None:
    for mesh in (mesh_of(data=8), mesh_of(data=2, replica=4), mesh_of(data=4, model=2)):
        data = sc.shard(sc.dp("data", **LEVELS[level]))
        for transforms in (sc.accumulate(4) @ data, data @ sc.accumulate(2), data):
            step = sc.compile(SGD @ transforms @ sc.grad(wide(every_probe)), mesh=mesh)
            assert_equivalent(step, step.init(wide_params()), probe_batch(32), tolerance=0.0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("level", LEVELS)
def test_levels_equal_the_reference_with_every_optimizer(level: str, optimizer: str) -> None:
    data = sc.shard(sc.dp("data", **LEVELS[level]), sc.tp({"deep/*": P("model")}, default=P()))
    pipeline = sc.update(OPTIMIZERS[optimizer]) @ sc.clip(1.0) @ sc.accumulate(2) @ data @ sc.grad(WIDE["over_rows"])
    step = sc.compile(pipeline, mesh=mesh_of(data=4, model=2))
    state = step.init(wide_params())
    specs = {path: leaf.sharding.spec for path, leaf in leaves_by_path(state)}
    for number in range(2):
        assert_equivalent(step, state, probe_batch(32, seed=number), tolerance=1e-4)
        state, _ = step(state, probe_batch(32, seed=number))
    assert step.traces == 1
    assert {path: leaf.sharding.spec for path, leaf in leaves_by_path(state)} == specs
    zero = LEVELS[level].get("zero", 0)
    slots = {f"opt_state/{path}": pair[zero > 0] for path, pair in SLOTS[optimizer].items()}
    params = {"params/b": REPLICATED[0], "params/deep/w": DEEP[zero == 3], "params/out": OUT[zero == 3]}
    assert specs == {**params, **slots, "step": P(), "rng": P()}


WIDTHS = {"in": 64, "hidden": 128, "out": 32}


def mlp(params: Any, rows: Any) -> jax.Array:
    hidden = jax.nn.relu(jnp.matmul(rows["x"], params["in"]["kernel"]) + params["in"]["bias"][None])
    return jnp.mean((jnp.matmul(hidden, params["out"]["kernel"]) - rows["y"]) ** 2)


def mlp_params() -> Any:
    random = np.random.default_rng(0)
    return {
        "in": {"kernel": random.normal(size=(64, 128)).astype(np.float32), "bias": np.zeros(128, np.float32)},
        "out": {"kernel": random.normal(size=(128, 32)).astype(np.float32)},
    }


def mlp_batch(num_rows: int) -> Any:
    random = np.random.default_rng(1)
    shapes = {"x": (num_rows, 64), "y": (num_rows, 32)}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


SIZE = 4 * (64 * 128 + 128 + 128 * 32)  # the bytes of the parameters, and of their gradient


def compiled(transform: sc.Transform, mesh: jax.sharding.Mesh, *, k: int = 4) -> sc.Compiled:
    pipeline = sc.update(optax.adam(1e-3)) @ sc.clip(1.0) @ sc.accumulate(k) @ transform @ sc.grad(mlp)
    step = sc.compile(pipeline, mesh=mesh)
    return step.lower(step.init(mlp_params()), mlp_batch(64 * k)).compile()


def traffic(step: sc.Compiled, axis: str = "data") -> Counter[tuple[str, bool]]:
    """The bytes of arrays communicated along an axis in a step, by kind and whether in a loop; scalars are left out."""
    found: Counter[tuple[str, bool]] = Counter()
    for row in step.collectives():
        if axis in row.axes:
            bytes_ = sum(shape.bytes for shape in row.payload if shape.elements > 1)
            found[row.kind, row.in_loop] += bytes_ * (row.executions or 0)
    return Counter({key: bytes_ for key, bytes_ in found.items() if bytes_})


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("zero0", {("all-reduce", False): SIZE}),
        ("zero1", {("reduce-scatter", False): SIZE, ("all-gather", False): SIZE}),
        ("zero2", {("reduce-scatter", True): 4 * SIZE, ("all-gather", False): SIZE}),
        ("zero3", {("all-gather", False): SIZE, ("reduce-scatter", False): SIZE}),
        # XLA on CPU takes the gathers out of the loop; the reduce-scatters cannot leave it.
        ("zero3_microbatch", {("all-gather", False): SIZE, ("reduce-scatter", True): 4 * SIZE}),
        ("zero3_layer", {("all-gather", False): SIZE, ("reduce-scatter", True): 4 * SIZE}),  # no scan over layers
    ],
)
def test_bytes_communicated_along_the_data_axis_are_those_of_the_level(level: str, expected: dict[Any, int]) -> None:
    step = compiled(sc.shard(sc.dp("data", **LEVELS[level])), mesh_of(data=8))
    print(step.collectives())
    assert traffic(step) == expected
    planned = {(one.kind, one.in_loop) for one in step.plan.collectives}
    assert {kind for kind, _ in expected} <= {kind for kind, _ in planned}


def test_shards_take_the_bytes_that_theory_says() -> None:
    temporaries = {}
    for level, options in LEVELS.items():
        transform = sc.shard(sc.dp("data", **options))
        step = sc.compile(
            sc.update(optax.adam(1e-3)) @ sc.accumulate(4) @ transform @ sc.grad(mlp), mesh=mesh_of(data=8)
        )
        state = step.init(mlp_params())
        zero = options.get("zero", 0)
        params, moments = SIZE // (8 if zero == 3 else 1), 2 * SIZE // (8 if zero else 1)
        table = step.shardings(state)
        counted = Counter[str]()
        for row in table.rows:
            counted[row.path.partition("/")[0]] += row.bytes_
        assert (counted["params"], counted["opt_state"]) == (params, moments + 4)
        assert table.bytes_ == params + moments + 16  # two counters and the key
        memory = step.lower(state, mlp_batch(256)).compile().memory()
        batch = 256 // 8 * 4 * (64 + 32)
        assert memory.arguments == pytest.approx(table.bytes_ + batch, rel=0.05)
        parts = {part.name: part.bytes for part in memory.parts}
        is_sharded = zero == 2 or "gather" in options
        assert parts["accumulator"] == pytest.approx(SIZE / 8 if is_sharded else SIZE, rel=0.05)
        temporaries[level] = memory.temporaries
    assert temporaries["zero2"] < temporaries["zero1"]
    assert temporaries["zero3_microbatch"] < temporaries["zero3"]


def test_hybrid_sharding_reduces_shards_over_the_inner_axis_first() -> None:
    transform = sc.shard(sc.dp(("replica", "data"), zero=1))
    step = compiled(transform, mesh_of(replica=2, data=4))
    assert traffic(step, "data") == {("reduce-scatter", False): SIZE, ("all-gather", False): SIZE}
    assert traffic(step, "replica") == {("all-reduce", False): SIZE // 4}
    two = sc.shard(sc.dp("replica")) @ sc.shard(sc.dp("data", zero=1))
    pipelines = [sc.update(optax.sgd(0.5)) @ one @ sc.grad(WIDE["in_order"]) for one in (transform, two)]
    steps = [sc.compile(one, mesh=mesh_of(replica=2, data=4)) for one in pipelines]
    for one in steps:
        assert_equivalent(one, one.init(wide_params()), probe_batch(16), tolerance=0.0)
    assert str(steps[0].shardings(steps[0].init(wide_params()))) == str(
        steps[1].shardings(steps[1].init(wide_params()))
    )


BOTH = {"zero_axes": ("replica", "data")}


@pytest.mark.parametrize("level", [name for name in LEVELS if name != "zero0"])
def test_state_is_sharded_along_several_axes_where_they_are_named(level: str) -> None:
    transform = sc.shard(sc.dp(("replica", "data"), **LEVELS[level], **BOTH))
    step = sc.compile(SGD @ sc.accumulate(2) @ transform @ sc.grad(WIDE["in_order"]), mesh=mesh_of(replica=2, data=4))
    state = step.init(wide_params())
    assert_equivalent(step, state, probe_batch(16), tolerance=0.0)
    spec = P(None, None, ("replica", "data")) if "layer" in level else P(("replica", "data"))
    assert state.opt_state[0].trace["deep"]["w"].sharding.spec == spec
    assert (state.params["deep"]["w"].sharding.spec == spec) == (LEVELS[level]["zero"] == 3)
    # The same shards and the same traffic as along one axis of that size.
    made = compiled(transform, mesh_of(replica=2, data=4))
    assert (
        traffic(made, "data")
        == traffic(made, "replica")
        == traffic(compiled(sc.shard(sc.dp("data", **LEVELS[level])), mesh_of(data=8)))
    )
    assert (
        made.memory().arguments
        == compiled(sc.shard(sc.dp("data", **LEVELS[level])), mesh_of(data=8)).memory().arguments
    )


def test_axes_of_the_state_are_the_last_ones_of_three() -> None:
    data = sc.dp(("pod", "replica", "data"), zero=3, **BOTH)
    step = compiled(sc.shard(data), mesh_of(pod=2, replica=2, data=2))
    assert traffic(step, "data") == {("all-gather", False): SIZE, ("reduce-scatter", False): SIZE}
    assert traffic(step, "pod") == {("all-reduce", False): SIZE // 4}
    assert repr(data) == 'dp(("pod", "replica", "data"), zero=3, zero_axes=("replica", "data"))'
    assert sc.dp(("replica", "data"), zero=1, zero_axes="data") == sc.dp(("replica", "data"), zero=1)


def test_model_axis_carries_only_what_the_model_needs() -> None:
    rules = sc.tp({"in/kernel": P(None, "model"), "in/bias": P("model"), "out/kernel": P("model")})
    mesh = mesh_of(data=4, model=2)
    plain = traffic(compiled(sc.shard(sc.dp("data"), rules), mesh), "model")
    for level, options in LEVELS.items():
        for transform in (
            sc.shard(sc.dp("data", **options), rules),
            sc.shard(rules) @ sc.shard(sc.dp("data", **options)),
        ):
            step = compiled(transform, mesh)
            assert traffic(step, "model") == plain, level
            # A device has half of each leaf's gradient, and no dimension of the bias is left to shard.
            sums = {key: size for key, size in traffic(step).items() if key[0] != "all-gather"}
            times = 4 if ("reduce-scatter", True) in sums else 1
            assert sum(sums.values()) == (SIZE - 512) // 2 * times + 256, level
    assert {in_loop for _, in_loop in plain} == {True}, "the sum over the hidden layer, once a microbatch"


@pytest.mark.parametrize("level", LEVELS)
def test_compiler_of_tpus_cannot_move_a_reduce_scatter_out_of_the_loop(level: str) -> None:
    step = sc.compile(
        SGD @ sc.accumulate(4) @ sc.shard(sc.dp("data", **LEVELS[level])) @ sc.grad(mlp), mesh=mesh_of(data=8)
    )
    text = step.lower(step.init(mlp_params()), mlp_batch(256)).stablehlo()
    scatters_in_loop = LEVELS[level].get("zero") == 2 or "gather" in LEVELS[level]
    assert text.count("optimization_barrier") == (3 if scatters_in_loop else 0)  # one for each leaf


@pytest.mark.parametrize("level", ["zero=1", "zero=3", "zero=3, layer"])
def test_dimensions_of_size_1_are_not_scattered(level: str) -> None:
    """With one in front, XLA for TPUs makes an all-reduce of a reduce-scatter."""
    options = {"zero=1": {"zero": 1}, "zero=3": {"zero": 3}, "zero=3, layer": {"zero": 3, "gather": "layer"}}[level]

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        def layer(stream: jax.Array, expert: jax.Array) -> tuple[jax.Array, None]:
            return jnp.einsum("bd,edf->bf", stream, expert), None

        return jnp.mean(jax.lax.scan(layer, rows, params["layers"])[0] ** 2)

    pipeline = sc.update(optax.sgd(0.5)) @ sc.accumulate(2) @ sc.shard(sc.dp("data", **options)) @ sc.grad(loss)
    step = sc.compile(pipeline, mesh=mesh_of(data=4))
    state, batch = step.init({"layers": jnp.ones((3, 1, 8, 8))}), jnp.arange(64.0).reshape(8, 8) % 3
    assert_equivalent(step, state, batch)
    shapes = re.findall(r":(\w+\[[\d,]*\]) = reduce_scatter\[", str(step.lower(state, batch).jaxpr()))
    assert shapes == [{"zero=3, layer": "f32[2,8]"}.get(level, "f32[3,2,8]")]


def test_transform_in_the_loop_that_needs_the_complete_gradient_gets_it() -> None:
    pipeline = SGD @ sc.accumulate(4) @ sc.clip(1.0) @ sc.shard(sc.dp("data", zero=2)) @ sc.grad(mlp)
    step = sc.compile(pipeline, mesh=mesh_of(data=8))
    state = step.init(mlp_params())
    made = step.lower(state, mlp_batch(256)).compile()
    assert traffic(made) == {("all-reduce", True): 4 * SIZE, ("all-gather", False): SIZE}
    assert "the accumulator is replicated: `clip(1.0)` is not linear" in str(made.plan)
    assert_equivalent(step, state, mlp_batch(256), tolerance=1e-4)


@settings(max_examples=20)
@given(data=st.data())
def test_random_exact_sharded_pipeline_equals_its_reference_bitwise(data: st.DataObject) -> None:
    climb(data, exact=True, tolerance=0.0)


@settings(max_examples=12)
@given(data=st.data())
def test_random_rounded_sharded_pipeline_equals_its_reference(data: st.DataObject) -> None:
    climb(data, exact=False, tolerance=1e-3)


SHAPES = {path: leaf.shape for path, leaf in leaves_by_path(wide_params())}


def climb(data: st.DataObject, *, exact: bool, tolerance: float) -> None:
    choices = [("data",), ("data", "model"), ("replica", "data"), ("data", "model", "expert"), ("data", "seq")]
    mesh = data.draw(meshes(axes=data.draw(st.sampled_from(choices))))
    axes = {name: size for name, size in mesh.shape.items() if name in ("data", "replica")}
    model_axes = {name: size for name, size in mesh.shape.items() if name in ("model", "expert")}
    probe = WIDE[data.draw(st.sampled_from(list(WIDE)))]
    rules: list[sc.Transform] = []
    times = 1
    if model_axes and data.draw(st.sampled_from([False, False, True])):  # experts along the axis of the rows
        along = data.draw(tensor_rules(SHAPES, axes={**model_axes, "data": axes["data"]}, pad=True))
        data_parallel = sc.dp("data", **LEVELS[data.draw(st.sampled_from(list(LEVELS)))])
        rules, times, axes = [sc.shard(data_parallel, along, mode="auto")], axes["data"], {}
    elif model_axes:
        rules = [sc.shard(data.draw(tensor_rules(SHAPES, axes=model_axes, pad=True)))]
    pipeline = data.draw(pipelines(axes=axes, exact=exact, loss=probe, offload=True))
    *outer, source = pipeline.transforms
    batch = data.draw(batches(pipeline, axes=axes))
    step = sc.compile(reduce(lambda one, other: one @ other, [*outer, *rules, source]), mesh=mesh)
    batch = jax.tree.map(lambda leaf: np.concatenate([leaf] * times, axis=step.rows_axis), batch)
    if step.steps_per_call > 1:
        tolerance = max(tolerance, 1e-6)  # after a step of so steep a loss numbers have more than 24 bits
    assert_equivalent(step, step.init(wide_params()), batch, tolerance=tolerance)


def attention(params: Any, rows: Any) -> jax.Array:
    """A loss over sequences: positions see those before them."""
    scores = jnp.einsum("btd,de,bse->bts", rows["tokens"], params["w"], rows["tokens"])
    seen = jnp.tril(jnp.ones(scores.shape[1:], bool))[None]
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e9), axis=-1)
    return jnp.mean((jnp.einsum("bts,bsd->btd", weights, rows["tokens"]) - rows["labels"]) ** 2)


@pytest.mark.parametrize("level", LEVELS)
def test_leaves_of_the_batch_are_sharded_over_a_sequence_axis_too(level: str) -> None:
    random = np.random.default_rng(0)
    batch = {name: random.normal(size=(16, 8, 4)).astype(np.float32) for name in ("tokens", "labels")}
    transform = sc.shard(sc.dp("data", batch={"tokens": P("data", "seq"), "lab*": P("data", "seq")}, **LEVELS[level]))
    step = sc.compile(SGD @ sc.accumulate(2) @ transform @ sc.grad(attention), mesh=mesh_of(data=4, seq=2))
    state = step.init({"w": random.normal(size=(4, 4)).astype(np.float32)})
    for given_ in (batch, jax.tree.map(jnp.asarray, batch)):
        assert_equivalent(step, state, given_)
    made = step.lower(state, batch).compile()
    shardings = made.executable.input_shardings[0][1]
    assert {name: sharding.spec for name, sharding in shardings.items()} == dict.fromkeys(batch, P("data", "seq"))
    assert step.traces == 1


def test_experts_along_a_model_axis_are_sharded_along_their_last_dimension() -> None:
    shapes = {"up": (2, 2, 32, 64), "down": (2, 2, 64, 32), "dense": (2, 64, 32)}

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        return jnp.mean(rows) * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))

    data, experts = sc.dp("data", zero=3, gather="layer"), P(None, "model")
    transform = sc.shard(data, sc.tp({"up": experts, "down": experts}, default=P()))
    step = sc.compile(SGD @ transform @ sc.grad(loss), mesh=mesh_of(data=4, model=2))
    state = step.init({name: jnp.zeros(shape) for name, shape in shapes.items()})
    assert {name: leaf.sharding.spec for name, leaf in state.params.items()} == {
        "up": P(None, "model", None, "data"), "down": P(None, "model", None, "data"), "dense": P(None, "data"),
    }  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
def test_devices_along_a_sequence_each_reduce_a_part_of_the_gradient(level: str) -> None:
    def loss(params: Any, rows: Any) -> jax.Array:
        return attention(params, rows) + jnp.mean((rows["tokens"] @ params["odd"]) ** 2)

    transform = sc.shard(sc.dp("data", batch={"*": P("data", "seq")}, **LEVELS[level]))
    step = sc.compile(SGD @ sc.accumulate(2) @ transform @ sc.grad(loss), mesh=mesh_of(data=4, seq=2))
    random = np.random.default_rng(0)
    batch = {name: random.normal(size=(16, 8, 4)).astype(np.float32) for name in ("tokens", "labels")}
    state = step.init({"w": random.normal(size=(4, 4)).astype(np.float32), "odd": np.ones((4, 3), np.float32)})
    assert_equivalent(step, state, batch)
    made = step.lower(state, batch).compile()
    assert "no parameter is sharded over seq: XLA adds up the gradient of 112 B there once a micro" in str(made.plan)
    if level == "zero0":
        outside = Counter[tuple[str, tuple[str, ...]]]()
        for one in made.collectives():
            if not one.in_loop:
                outside[one.kind, one.axes] += one.bytes
        sent = 4 * (4 * 4 + 4 * 3)
        assert outside == {("all-reduce", ("data",)): sent // 2 + 4, ("all-gather", ("seq",)): sent}  # and the loss
        return
    sent = 4 * (4 * 4 // 2 + 4 * 3)  # half of the first, and all of the second, whose 3 columns do not divide by 2
    in_loop = level == "zero2" or "gather" in LEVELS[level]
    assert traffic(made)["reduce-scatter", in_loop] == (2 if in_loop else 1) * sent


@pytest.mark.parametrize("is_named", [True, False])
@pytest.mark.parametrize("level", LEVELS)
def test_axis_that_nothing_names_shards_nothing(level: str, *, is_named: bool) -> None:
    """Nor does the gradient enter its reduction in parts along it, for which XLA would partition the loss."""

    def loss(params: Any, rows: Any) -> jax.Array:
        spec = P(None, "seq" if is_named else None)
        return attention(params, jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, spec), rows))

    transform = sc.shard(sc.dp("data", **LEVELS[level]))
    step = sc.compile(SGD @ sc.accumulate(2) @ transform @ sc.grad(loss), mesh=mesh_of(data=4, seq=2))
    random = np.random.default_rng(0)
    batch = {name: random.normal(size=(16, 8, 4)).astype(np.float32) for name in ("tokens", "labels")}
    state = step.init({"w": random.normal(size=(4, 4)).astype(np.float32)})
    assert_equivalent(step, state, batch)
    made = step.lower(state, batch).compile()
    sent = 4 * 4 * 4 // (2 if is_named else 1)
    if level == "zero0":
        (moved,) = (one.bytes for one in made.collectives() if one.kind == "all-reduce" and one.axes == ("data",))
        assert moved == sent + 4  # and the loss
    else:
        in_loop = level == "zero2" or "gather" in LEVELS[level]
        assert traffic(made)["reduce-scatter", in_loop] == (2 if in_loop else 1) * sent
    assert any(one.axes == ("seq",) for one in made.collectives()) is is_named
    assert ("no parameter is sharded over seq" in str(made.plan)) is is_named


def test_automatic_mode_leaves_the_sum_to_xla_and_the_plan_says_what_that_costs() -> None:
    transform = sc.shard(sc.dp("data"), sc.tp({"in/*": P(), "out/*": P()}), mode="auto")
    step = compiled(transform, mesh_of(data=8))
    assert traffic(step) == {("all-reduce", True): 4 * SIZE}
    assert "sums the gradient of 49,664 B over data at least once a microbatch, 4 times a step" in str(step.plan)
    pipeline = SGD @ sc.accumulate(4) @ transform @ sc.grad(mlp)
    again = sc.compile(pipeline, mesh=mesh_of(data=8))
    assert_equivalent(again, again.init(mlp_params()), mlp_batch(256), tolerance=1e-4)


@pytest.mark.parametrize("probe", ["over_rows", "coupling_rows"])
def test_automatic_mode_gives_the_loss_the_rows_of_all_devices(probe: str) -> None:
    step = sc.compile(SGD @ sc.shard(sc.dp("data"), mode="auto") @ sc.grad(WIDE[probe]), mesh=mesh_of(data=4))
    assert_equivalent(step, step.init(wide_params()), probe_batch(16), tolerance=0.0)


@pytest.mark.parametrize("level", [name for name in LEVELS if name != "zero0"])
def test_automatic_mode_sums_the_gradient_to_shards_in_the_loop(level: str) -> None:
    transform = sc.shard(sc.dp("data", **LEVELS[level]), mode="auto")
    made = compiled(transform, mesh_of(data=8))
    # XLA for CPU has no reduce-scatter of its own; those for TPUs and GPUs make one of it.
    assert traffic(made) == {("all-reduce", True): 4 * SIZE, ("all-gather", False): SIZE}
    assert {part.name: part.bytes for part in made.memory().parts}["accumulator"] == SIZE / 8
    assert "4 times a step, to shards of 6,208 B: a reduce-scatter, on CPU an all-reduce" in str(made.plan)
    assert ("reduce-scatter", True) in {(one.kind, one.in_loop) for one in made.plan.collectives}
    by_hand = compiled(sc.shard(sc.dp("data", **LEVELS[level])), mesh_of(data=8))
    assert made.memory().arguments == by_hand.memory().arguments
    step = sc.compile(SGD @ sc.accumulate(4) @ transform @ sc.grad(mlp), mesh=mesh_of(data=8))
    assert_equivalent(step, step.init(mlp_params()), mlp_batch(256), tolerance=1e-4)


def moe(params: Any, rows: Any) -> jax.Array:
    """Each row goes to one of eight experts, and back, through a matrix that is no expert."""

    def dispatched(x: jax.Array, experts: jax.Array) -> jax.Array:
        chosen = jax.nn.one_hot(jnp.argmax(x[:, :8], axis=1), 8)
        sent = jax.lax.all_to_all(jnp.einsum("ne,nd->end", chosen, x), "data", 0, 1, tiled=True)
        back = jax.lax.all_to_all(jnp.einsum("end,edh->enh", sent, experts), "data", 1, 0, tiled=True)
        return jnp.einsum("enh,ne->nh", back, chosen)

    moved = jax.shard_map(dispatched, in_specs=(P("data"), P("data")), out_specs=P("data"))
    return jnp.mean((moved(rows["x"], params["experts"]) @ params["out"] - rows["y"]) ** 2)


@pytest.mark.parametrize("level", LEVELS)
def test_experts_along_the_axis_of_the_rows_stay_and_zero_shards_the_others(level: str) -> None:
    random = np.random.default_rng(0)
    shapes = {"experts": (8, 64, 16), "out": (16, 32)}
    params = {name: random.normal(size=shape).astype(np.float32) / 8 for name, shape in shapes.items()}
    rules = sc.shard(sc.dp("data", **LEVELS[level]), sc.tp({"experts": P("data")}, default=P()), mode="auto")
    pipeline = sc.update(optax.adam(1e-3)) @ sc.clip(1.0) @ sc.accumulate(2) @ rules @ sc.grad(moe)
    step = sc.compile(pipeline, mesh=mesh_of(data=4))
    state = step.init(params)
    zero = LEVELS[level].get("zero", 0)
    specs = {path: leaf.sharding.spec for path, leaf in leaves_by_path(state)}
    assert specs["params/experts"] == specs["opt_state/0/mu/experts"] == P("data")
    assert specs["params/out"] == (P(None, "data") if zero == 3 else P())
    assert specs["opt_state/0/mu/out"] == (P(None, "data") if zero else P())
    assert_equivalent(step, state, mlp_batch(64), tolerance=1e-5)
    made = step.lower(state, mlp_batch(64)).compile()
    moved, out = traffic(made), 4 * 16 * 32
    assert moved["all-reduce", True] == 2 * out, "nothing of the experts"
    assert moved["all-gather", False] == (out if zero else 0)
    assert ("all-to-all", True) in moved and len(moved) == (3 if zero else 2)
    assert "`experts` is sharded over an axis of the rows, and its gradient is not reduced" in str(made.plan)
    state, _ = step(state, mlp_batch(64))
    assert {path: leaf.sharding.spec for path, leaf in leaves_by_path(state)} == specs
    step(state, mlp_batch(64))
    assert step.traces == 1


def test_automatic_mode_gathers_one_layer_at_a_time_too() -> None:
    found = {}
    for mode in ("manual", "auto"):
        transform = sc.shard(sc.dp("data", zero=3, gather="layer"), mode=mode)
        pipeline = sc.update(optax.adam(1e-3)) @ sc.accumulate(4) @ transform @ sc.grad(deep(jax.checkpoint))
        step = sc.compile(pipeline, mesh=mesh_of(data=8))
        state = step.init(deep_params())
        found[mode] = traffic(step.lower(state, mlp_batch(256)).compile())
        assert_equivalent(step, state, mlp_batch(256), tolerance=1e-4)
    gathered = {mode: moved["all-gather", True] for mode, moved in found.items()}
    assert gathered["auto"] == gathered["manual"] >= 2 * 4 * 4 * DEPTH * 2 * 64 * 128
    assert found["auto"]["all-reduce", True] == found["manual"]["reduce-scatter", True]


def test_xla_reduces_in_the_dtype_of_the_loss_not_in_one_that_its_gradient_is_converted_to() -> None:
    """Why `mode="auto"` refuses `reduce_dtype`. A sum in bfloat16 is one in float32 on CPU, and called promoted."""

    def converted(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), tree)

    def after(params: Any, rows: Any) -> Any:
        return converted(jax.grad(mlp)(params, rows))

    def within(params: Any, rows: Any) -> Any:
        return jax.grad(lambda params: mlp(*converted((params, rows))).astype(jnp.float32))(params)

    mesh = mesh_of(data=8)
    rows = jax.device_put(mlp_batch(64), NamedSharding(mesh, P("data")))
    params = jax.device_put(mlp_params(), NamedSharding(mesh, P()))
    for function, is_narrow in ((after, False), (within, True)):
        text = jax.jit(function, out_shardings=NamedSharding(mesh, P())).lower(params, rows).compile().as_text()
        assert text.count("all-reduce(") and ("_promoted" in text) is is_narrow


def constrained(spec: P) -> Any:
    def loss(params: Any, rows: Any) -> jax.Array:
        hidden = jnp.matmul(rows["x"], params["in"]["kernel"]) + params["in"]["bias"][None]
        hidden = jax.lax.with_sharding_constraint(jax.nn.relu(hidden), spec)
        return jnp.mean((jnp.matmul(hidden, params["out"]["kernel"]) - rows["y"]) ** 2)

    return loss


@pytest.mark.parametrize("level", LEVELS)
def test_constraints_on_model_axes_hold_inside_a_loss(level: str) -> None:
    transform = sc.shard(sc.dp("data", **LEVELS[level]), sc.tp({"in/kernel": P(None, "model")}, default=P()))
    step = sc.compile(
        SGD @ sc.accumulate(2) @ transform @ sc.grad(constrained(P(None, "model"))), mesh=mesh_of(data=4, model=2)
    )
    state = step.init(mlp_params())
    reference = sc.compile(SGD @ sc.accumulate(2) @ sc.grad(mlp))
    expected, _ = reference(reference.init(mlp_params()), mlp_batch(64))
    got, _ = step(state, mlp_batch(64))
    chex.assert_trees_all_close(jax.device_get(got.params), expected.params, rtol=1e-7, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16])
@pytest.mark.parametrize("level", LEVELS)
def test_sums_over_devices_in_a_narrow_type_are_close(level: str, dtype: Any) -> None:
    for mesh in (mesh_of(data=8), mesh_of(data=4, model=2)):
        transform = sc.shard(sc.dp("data", reduce_dtype=dtype, **LEVELS[level]))
        step = sc.compile(SGD @ sc.accumulate(2) @ transform @ sc.grad(mlp), mesh=mesh)
        state = step.init(mlp_params())
        assert_equivalent(step, state, mlp_batch(64), tolerance=3e-2)  # bfloat16 holds 8 bits
        short = {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(dtype).name]
        assert f"x{short}>" in step.lower(state, mlp_batch(64)).stablehlo()


@pytest.mark.parametrize(
    ("transform", "reductions"),
    [
        *((sc.shard(sc.dp("data", **LEVELS[level])), 1) for level in ("zero0", "zero1", "zero3")),
        (sc.shard(sc.dp("data", zero=2)), 4),
        (sc.shard(sc.dp(("replica", "data"), zero=1)), 1),
    ],
    ids=repr,
)
def test_budget_counts_reductions_of_shards(transform: sc.Transform, reductions: int) -> None:
    mesh = mesh_of(replica=2, data=4) if "replica" in repr(transform) else mesh_of(data=8)
    step = compiled(transform, mesh)
    step.check(sc.Budget(gradient_reductions=reductions, donated=True))
    with pytest.raises(sc.BudgetError):
        step.check(sc.Budget(gradient_reductions=reductions - 1))


DEPTH = 6


def deep(block: Any = None) -> Any:
    """A loss that scans over stacked layers; `block` wraps one."""

    def layer(stream: jax.Array, this: Any) -> tuple[jax.Array, None]:
        return stream + jax.nn.relu(jnp.matmul(stream, this["up"])) @ this["down"], None

    def loss(params: Any, rows: Any) -> jax.Array:
        stream, _ = jax.lax.scan((block or (lambda one: one))(layer), rows["x"], params["layers"])
        return jnp.mean((jnp.matmul(stream, params["head"]) - rows["y"]) ** 2)

    return loss


def deep_params() -> Any:
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return (random.normal(size=shape) / shape[-2] ** 0.5).astype(np.float32)

    return {"layers": {"up": normal(DEPTH, 64, 128), "down": normal(DEPTH, 128, 64)}, "head": normal(64, 32)}


LOSSES = {
    "plain": deep(), "remat_of_a_layer": deep(jax.checkpoint), "remat_of_all": sc.remat() @ deep(),
    "remat_with_a_policy": sc.remat("dots_saveable") @ deep(), "cast": sc.cast(jnp.float32) @ deep(),
    "bfloat16": sc.cast(jnp.bfloat16) @ sc.remat() @ deep(),
}  # fmt: skip


@pytest.mark.parametrize("gather", ["layer", ("layer", "step")], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_layers_gathered_one_at_a_time_equal_the_reference(name: str, gather: Any) -> None:
    for mesh, rules in (
        (mesh_of(data=8), ()),
        (mesh_of(data=4, model=2), (sc.tp({"layers/up": P(None, None, "model")}, default=P()),)),
    ):
        transform = sc.shard(sc.dp("data", zero=3, gather=gather), *rules)
        step = sc.compile(SGD @ sc.clip(1.0) @ sc.accumulate(2) @ transform @ sc.grad(LOSSES[name]), mesh=mesh)
        state = step.init(deep_params())
        # bfloat16 holds 8 bits, and XLA keeps more of them where it fuses.
        assert_equivalent(step, state, mlp_batch(64), tolerance=1e-4 if name != "bfloat16" else 5e-2)


def test_layers_gathered_one_at_a_time_cost_traffic_and_save_memory() -> None:
    found = {}
    for gather in ("step", "microbatch", "layer"):
        transform = sc.shard(sc.dp("data", zero=3, gather=gather))
        pipeline = sc.update(optax.adam(1e-3)) @ sc.accumulate(4) @ transform @ sc.grad(deep(jax.checkpoint))
        step = sc.compile(pipeline, mesh=mesh_of(data=8))
        made = step.lower(step.init(deep_params()), mlp_batch(256)).compile()
        found[gather] = made.memory().temporaries, traffic(made)
    assert found["layer"][0] < found["microbatch"][0] < found["step"][0]
    stack, head = 4 * DEPTH * 2 * 64 * 128, 4 * 64 * 32
    moved = found["layer"][1]
    assert moved["all-gather", True] in (2 * 4 * stack, 2 * 4 * stack + 4 * head)  # forward, and again for the gradient
    assert moved["reduce-scatter", True] == 4 * (stack + head)


def equations_in(jaxpr: Any, loops: int = 0) -> Iterator[tuple[Any, int]]:
    """The operations of a program, each with the number of loops that it is in."""
    for equation in jaxpr.eqns:
        yield equation, loops
        for inner in programs_in(equation):
            yield from equations_in(inner, loops + (equation.primitive.name == "scan"))


def moved_leaves(step: sc.Step, state: sc.State, kind: str) -> Counter[tuple[str, bool]]:
    """How often a step moves each leaf of `deep_params`, before XLA; and whether in the loop over microbatches."""
    found = Counter[tuple[str, bool]]()
    for equation, loops in equations_in(step.lower(state, mlp_batch(64)).traced.jaxpr.jaxpr):
        if equation.primitive.name == kind:
            leaf = (equation.outvars if kind == "all_gather" else equation.invars)[0].aval
            found[f"{leaf.dtype.name}[{', '.join(map(str, leaf.shape))}]", loops > 0] += 1
    return found


@pytest.mark.parametrize("name", ["plain", "remat_of_all", "bfloat16"])
@pytest.mark.parametrize("model", [0, 1, 2])
def test_parameters_outside_of_the_layers_are_gathered_once_a_step(name: str, model: int) -> None:
    rules = (sc.tp({"layers/up": P(None, None, "model")}, default=P()),) if model else ()
    axes, model = ({"data": 8 // model, "model": model}, model) if model else ({"data": 8}, 1)
    dtype = "bfloat16" if name == "bfloat16" else "float32"
    layers = {f"{dtype}[64, {128 // model}]", f"{dtype}[128, 64]"}
    programs = {}
    for gather in ("layer", ("layer", "step")):
        transform = sc.shard(sc.dp("data", zero=3, gather=gather), *rules)
        step = sc.compile(SGD @ sc.accumulate(4) @ transform @ sc.grad(LOSSES[name]), mesh=mesh_of(**axes))
        state = step.init(deep_params())
        programs[gather] = moved_leaves(step, state, "all_gather")
        assert {leaf for leaf, in_loop in programs[gather] if in_loop} >= layers
        scattered = moved_leaves(step, state, "reduce_scatter")
        assert scattered and all(in_loop for _, in_loop in scattered)
        assert any(leaf == "float32[64, 32]" for leaf, _ in scattered)
    head = f"{dtype}[64, 32]"
    assert programs["layer"][head, True] and not programs["layer"][head, False]
    assert programs["layer", "step"][head, False] == 1 and not programs["layer", "step"][head, True]


def test_plan_says_what_is_held_and_in_which_dtypes() -> None:
    """An embedding that the loss uses in two dtypes is held in both; layers are not, nor replicas."""

    def loss(params: Any, rows: Any) -> jax.Array:
        stream = rows["x"].astype(jnp.bfloat16) @ params["table"].astype(jnp.bfloat16)
        stream, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w.astype(x.dtype)), None), stream, params["layers"])
        return jnp.mean((stream.astype(jnp.float32) @ params["table"] * params["scale"]) ** 2)

    params = {"table": np.eye(64, dtype=np.float32), "layers": np.ones((3, 64, 64), np.float32) / 64}
    params["scale"] = np.ones((1, 1), np.float32)
    transform = sc.shard(sc.dp("data", zero=3, gather=("layer", "step")))
    step = sc.compile(SGD @ sc.accumulate(4) @ transform @ sc.grad(loss), mesh=mesh_of(data=8))
    state = step.init(params)
    batch = {"x": mlp_batch(64)["x"]}
    assert_equivalent(step, state, batch, tolerance=5e-2)  # bfloat16 holds 8 bits
    plan = str(step.lower(state, batch).plan)
    assert f"those outside of that scan are held for the step: {64 * 64 * (4 + 2):,} B beside their shards" in plan
    assert step.lower(state, batch).plan.collectives[0].reason.startswith("those outside of any scan over layers")


def test_a_step_of_one_microbatch_gathers_in_the_loss_either_way() -> None:
    texts = []
    for gather in ("layer", ("layer", "step")):
        transform = sc.shard(sc.dp("data", zero=3, gather=gather))
        step = sc.compile(SGD @ transform @ sc.grad(deep()), mesh=mesh_of(data=8))
        texts.append(moved_leaves(step, step.init(deep_params()), "all_gather"))
    assert texts[0] == texts[1] and texts[0]["float32[64, 32]", False] == 1


def test_layers_that_a_loss_rematerialises_stay_so() -> None:
    """Gathering parameters must not undo the `jax.checkpoint` of the loss itself: a wide layer shows it."""

    def wide(block: Any) -> Any:
        def layer(stream: jax.Array, this: Any) -> tuple[jax.Array, None]:
            return stream + jax.nn.relu(jnp.tile(stream, (1, 32)) * 2.0) @ this["down"], None

        def loss(params: Any, rows: Any) -> jax.Array:
            return jnp.mean(jax.lax.scan(block(layer), rows["x"], params["layers"])[0] ** 2)

        return loss

    params = {"layers": {"down": np.full((DEPTH, 32 * 64, 64), 1e-3, np.float32)}}
    temporaries = {}
    for name, block in {"kept": lambda layer: layer, "recomputed": jax.checkpoint}.items():
        pipeline = SGD @ sc.shard(sc.dp("data", zero=3, gather="layer")) @ sc.grad(wide(block))
        step = sc.compile(pipeline, mesh=mesh_of(data=8))
        made = step.lower(step.init(params), mlp_batch(8 * 64)).compile()
        temporaries[name] = made.memory().temporaries
    hidden = 4 * 64 * 32 * 64  # bytes of what one layer computes on the rows of one device
    assert temporaries["recomputed"] < temporaries["kept"] - (DEPTH - 2) * hidden


def test_leaf_that_zero_cannot_shard_says_which_dimension_is_taken_and_by_what() -> None:
    def loss(params: Any, rows: Any) -> jax.Array:
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)) * jnp.mean(rows["x"])

    rules = sc.tp({"tensor": P(None, "model")}, default=P())
    layout = sc.shard(sc.dp("data", zero=3, gather="layer"), rules)
    step = sc.compile(sc.update(optax.sgd(0.5)) @ layout @ sc.grad(loss), mesh=mesh_of(data=4, model=2))
    shapes = {"tensor": (3, 64), "odd": (3, 5), "head": (16, 63), "stack": (64, 64)}
    state = step.init({name: jnp.ones(shape) for name, shape in shapes.items()})
    plan = step.lower(state, {"x": jnp.ones((8, 2))}).plan
    assert {leaf.path: leaf.unsharded for leaf in plan.leaves if leaf.unsharded} == {
        "params/odd": "not divisible by data=4",
        "params/tensor": "data=4 divides only dimension 1, which is sharded over model",
    }
    # The first dimension may count layers, so it is the last choice.
    specs = {leaf.path: leaf.spec for leaf in plan.leaves}
    assert (specs["params/head"], specs["params/stack"]) == (P("data"), P(None, "data"))


def test_untied_head_is_sharded_where_layers_are_gathered_one_at_a_time() -> None:
    """It was replicated along `data`: 1.9 GB of arguments a chip for a model of 8 billion parameters, 0.4 by hand."""
    rules = sc.tp({"head": P(None, "model")}, default=P())
    layout = sc.shard(sc.dp("data", zero=3, gather="layer"), rules)
    step = sc.compile(SGD @ sc.accumulate(2) @ layout @ sc.grad(deep()), mesh=mesh_of(data=4, model=2))
    state = step.init(deep_params())
    assert state.params["head"].sharding.spec == P("data", "model")
    assert_equivalent(step, state, mlp_batch(64), tolerance=1e-5)  # sums over devices in another order


def test_stack_that_is_sharded_along_its_layers_is_gathered_whole() -> None:
    """Of the two stacks one has no other dimension that divides; the other is gathered one layer at a time still."""

    def loss(params: Any, rows: Any) -> jax.Array:
        def layer(stream: jax.Array, this: Any) -> tuple[jax.Array, None]:
            return jnp.tanh(stream @ this["w"] + this["scale"] @ jnp.ones((5, 64))), None

        return jnp.mean(jax.lax.scan(layer, rows["x"], params)[0] ** 2)

    params = {"w": np.full((8, 64, 64), 1e-2, np.float32), "scale": np.full((8, 1, 5), 1e-2, np.float32)}
    batch = {"x": np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)}
    step = sc.compile(SGD @ sc.shard(sc.dp("data", zero=3, gather="layer")) @ sc.grad(loss), mesh=mesh_of(data=4))
    state = step.init(params)
    assert [state.params[name].sharding.spec for name in ("w", "scale")] == [P(None, "data"), P("data")]
    assert_equivalent(step, state, batch, tolerance=1e-5)  # sums over devices in another order
    found = step.lower(state, batch).compile().collectives()
    gathers = sorted((one.bytes, one.in_loop) for one in found if one.kind == "all-gather")
    assert gathers[0] == (8 * 5 * 4, False) and all(one == (64 * 64 * 4, True) for one in gathers[1:])


@pytest.mark.parametrize("name", ["plain", "remat_of_a_layer", "remat_of_all", "bfloat16"])
def test_plan_warns_of_a_stack_that_is_sharded_along_its_layers(name: str) -> None:
    """Depth 6 over two devices: XLA gathers the whole stack over `model`, which a rule for another dimension avoids."""
    found = {}
    for rule in (P("model"), P(None, None, "model")):
        layout = sc.shard(sc.dp("data"), sc.tp({"layers/up": rule}, default=P()))
        step = sc.compile(SGD @ sc.accumulate(2) @ layout @ sc.grad(LOSSES[name]), mesh=mesh_of(data=4, model=2))
        state = step.init(deep_params())
        lowered = step.lower(state, mlp_batch(64))
        rows = [row for row in lowered.compile().collectives() if row.kind == "all-gather" and "model" in row.axes]
        gathers = [row for row in rows for shape in row.payload if shape.dims == (DEPTH, 64, 128)]
        found[rule] = [note for note in lowered.plan.notes if "scans over layers" in note], bool(gathers)
    size = 4 * DEPTH * 64 * 128
    note = (
        f"the loss scans over layers of `layers/up`, along the dimension that model shards: XLA gathers {size:,} B "
        "over model for the forward scan, and again for the backward; shard another dimension"
    )
    assert found == {P("model"): ([note], True), P(None, None, "model"): ([], False)}


def test_axis_of_the_rows_in_a_rule_names_the_axes_that_are_free() -> None:
    pipeline = (
        sc.update(optax.sgd(0.5)) @ sc.shard(sc.dp("data"), sc.tp({"up": P("data")})) @ sc.grad(PROBES["over_rows"])
    )
    with pytest.raises(sc.ShardingError) as raised:
        sc.compile(pipeline, mesh=mesh_of(data=4, model=2))
    automatic = "Experts that are sharded over the axis of the rows need `shard(dp(...), tp(...), mode='auto')`."
    others = "Parameters are sharded over an axis that shards no rows, such as 'model'."
    assert raised.value.suggestion == f"{others} {automatic}"
    with pytest.raises(sc.ShardingError) as raised:
        sc.compile(pipeline, mesh=mesh_of(data=8))
    assert raised.value.suggestion == automatic


# A transform, and the meshes that give some of its axes the size 1.
OF_SEQUENCE, OF_MATRICES = {"*": P("data", "seq")}, {"w": P(None, "model"), "v": P("model")}
DATA_SEQ = ({"data": 1, "seq": 1}, {"data": 1, "seq": 2}, {"data": 2, "seq": 1})
DATA_MODEL = ({"data": 1, "model": 1}, {"data": 1, "model": 2}, {"data": 2, "model": 1})
REPLICA_DATA = ({"replica": 1, "data": 1}, {"replica": 1, "data": 2}, {"replica": 2, "data": 1})
OF_SIZE_1: dict[str, tuple[sc.Transform, tuple[dict[str, int], ...]]] = {
    "batch": (sc.shard(sc.dp("data", batch=OF_SEQUENCE)), DATA_SEQ),
    "batch_zero": (sc.shard(sc.dp("data", zero=3, batch=OF_SEQUENCE)), DATA_SEQ),
    "batch_auto": (sc.shard(sc.dp("data", batch=OF_SEQUENCE), mode="auto"), DATA_SEQ),
    "batch_replica": (sc.shard(sc.dp(("replica", "data"), zero=3, batch={"*": P(("replica", "data"))})), REPLICA_DATA),
    "batch_two": (
        sc.shard(sc.dp("replica", batch={"*": P(("replica", "data"))})) @ sc.shard(sc.dp("data")), REPLICA_DATA,
    ),
    "tp": (sc.shard(sc.dp("data"), sc.tp(OF_MATRICES)), DATA_MODEL),
    "tp_zero": (sc.shard(sc.dp("data", zero=3), sc.tp(OF_MATRICES)), DATA_MODEL),
    "tp_auto": (sc.shard(sc.dp("data", zero=3), sc.tp(OF_MATRICES), mode="auto"), DATA_MODEL),
    "pad": (sc.shard(sc.dp("data"), sc.tp(OF_MATRICES, pad=True)), DATA_MODEL),
    "zero": (sc.shard(sc.dp("data", zero=3, gather="layer")), ({"data": 1},)),
    "zero_axes": (sc.shard(sc.dp(("replica", "data"), zero=3, zero_axes=("replica", "data"))), REPLICA_DATA),
    "reduce_dtype": (sc.shard(sc.dp("data", reduce_dtype="bfloat16", zero=2)), ({"data": 1},)),
    "experts": (
        sc.shard(sc.dp("data", zero=3), sc.tp({"w": P("data")}, default=P()), mode="auto"), ({"data": 1}, DATA_SEQ[1]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_SIZE_1)
def test_rules_on_axes_of_size_1_equal_the_reference_and_compile_once(name: str) -> None:
    def loss(params: Any, batch: Any) -> jax.Array:
        return jnp.mean(((batch["x"] @ params["w"] @ params["v"]).sum(-1) - batch["y"]) ** 2)

    transform, meshes_of_size_1 = OF_SIZE_1[name]
    params = {"w": jnp.ones((6, 6)), "v": jnp.ones((6, 4))}
    batch = {"x": jnp.arange(192.0).reshape(8, 4, 6) % 5, "y": jnp.arange(32.0).reshape(8, 4)}
    optimizer = sc.update(optax.sgd(2.0**-10, momentum=0.5))
    for sizes in meshes_of_size_1:
        step = sc.compile(optimizer @ sc.accumulate(2) @ transform @ sc.grad(loss), mesh=mesh_of(**sizes))
        assert_equivalent(step, step.init(params), batch)
        state = step.init(params)
        for _ in range(3):
            state, _ = step(state, batch)
        assert step.traces == 1
